"""An experiment: one run of lmms-eval on the embedded model, and its figures with intervals."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.metrics import attack_success_rate, design_effect, detection, mean, rate, recovery
from lmms_smoothguard.evaluation.runs import Sample, load_samples
from lmms_smoothguard.report.documents import scenes_of

CLEAN, ATTACKED = "shapes_pope", "shapes_pope_pgd"


@dataclass(frozen=True)
class Experiment:
    """A row of a table: model arguments (without `pretrained`), tasks, questions of each."""

    name: str
    model_args: Mapping[str, str]
    tasks: Sequence[str] = (CLEAN, ATTACKED)
    limit: int = 420
    about: str = field(default="", compare=False)

    def command(self, pretrained: str, out: str) -> list[str]:
        """lmms-eval's own command line."""
        arguments = ",".join(f"{key}={value}" for key, value in {"pretrained": pretrained, **self.model_args}.items())
        return [
            "lmms-eval", "--model", "smoothguard_llava", "--model_args", arguments, "--tasks", ",".join(self.tasks),
            "--limit", str(self.limit), "--log_samples", "--output_path", out,
        ]  # fmt: skip


def run(experiment: Experiment, out: Path, pretrained: Path, cache: Path) -> dict[str, Any]:
    """Runs lmms-eval and summarises its samples log. Raises SmoothGuardError when it fails."""
    directory = out / experiment.name
    shutil.rmtree(directory, ignore_errors=True)  # an older run's log must never pass for this one's
    command = experiment.command(str(pretrained), str(directory))
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "SMOOTHGUARD_CACHE": str(cache),
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run([sys.executable, "-m", "lmms_eval", *command[1:]], env=environment, check=False)
    # lmms-eval exits with 0 after most failures: only a log shows that it ran through.
    if done.returncode or any(not list(directory.rglob(f"*_samples_{task}.jsonl")) for task in experiment.tasks):
        raise SmoothGuardError(f"lmms-eval failed (exit code {done.returncode}), see above: {' '.join(command)}")
    return summarize(experiment, directory)


def summarize(experiment: Experiment, directory: Path) -> dict[str, Any]:
    """The figures of one run, ready for JSON."""
    samples = {task: load_samples(directory, task) for task in experiment.tasks}
    figures: dict[str, Any] = {task: _task_figures(task, listed) for task, listed in samples.items()}
    for task in experiment.tasks:
        clean = task.removesuffix("_pgd")
        if clean != task and clean in samples and samples[task][0].info.get("suspicion") is not None:
            figures[task]["detection"] = _detection(clean, samples[clean], samples[task])
    return {
        "name": experiment.name,
        "about": experiment.about,
        "command": " ".join(experiment.command("$(smoothguard model tiny-llava)", f"runs/{experiment.name}")),
        "figures": figures,
    }


def is_right(sample: Sample, answer: str) -> bool:
    """Whether `answer` is the sample's right answer."""
    return normalize_answer(answer) == normalize_answer(sample.target)


def _detection(task: str, clean: Sequence[Sample], attacked: Sequence[Sample]) -> dict[str, Any]:
    """Suspicion as a detector; questions about one scene depend on each other, so scenes are what counts."""
    found = detection(
        [sample.info["suspicion"] for sample in clean],
        [sample.info["suspicion"] for sample in attacked],
        scenes_of(task, clean),
        scenes_of(task, attacked),
    )
    return found.to_dict()


def _task_figures(task: str, samples: Sequence[Sample]) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "accuracy": rate(is_right(s, s.answer) for s in samples).to_dict(),
        "seconds_per_answer": fmean(s.info["seconds"] for s in samples),
    }
    if "agreement" in samples[0].info:
        figures["agreement"] = mean([s.info["agreement"] for s in samples]).to_dict()
        figures["copies"] = mean([s.info["num_samples_used"] for s in samples]).to_dict()
        figures["suspected"] = rate(s.info["suspected"] for s in samples).to_dict()
    if "clean_answer" in samples[0].info:
        clean = [s.info["clean_answer"] for s in samples]
        clean_right = [is_right(s, text) for s, text in zip(samples, clean, strict=True)]
        right = [is_right(s, s.answer) for s in samples]
        figures["asr"] = attack_success_rate(clean_right, right).to_dict()
        figures["asr"]["design_effect"] = _design_effect(task, samples, clean_right, right)
        figures["recovery"] = recovery(clean, [s.answer for s in samples]).to_dict()
        figures["attack"] = samples[0].info["attack"]
        figures["largest_linf_in_grey_levels"] = 255 * max(s.info["attack_linf"] for s in samples)
        figures["attack_seconds"] = fmean(s.info["attack_seconds"] for s in samples)
    return figures


def _design_effect(
    task: str, samples: Sequence[Sample], clean_right: Sequence[bool], right: Sequence[bool]
) -> float | None:
    """Of ASR, over scenes; None where it is undefined."""
    counted = [sample for sample, was_right in zip(samples, clean_right, strict=True) if was_right]
    wrong = [not now for now, was_right in zip(right, clean_right, strict=True) if was_right]
    effect = design_effect(wrong, scenes_of(task, counted))
    return None if math.isnan(effect) else effect
