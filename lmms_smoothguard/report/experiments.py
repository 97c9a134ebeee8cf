"""An experiment: one run of lmms-eval on an embedded model, and its figures with intervals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.records import Run
from lmms_smoothguard.report.logs import run_of_logs
from lmms_smoothguard.tiny import PLACES


@dataclass(frozen=True)
class Embedded:
    """An embedded model, lmms-eval's wrapper of it, and the tasks that it is asked, clean and attacked.

    medium: what these tasks ask about.
    """

    model: str
    wrapper: str
    clean: str
    attacked: str
    medium: Literal["picture", "clip"]

    @property
    def place(self) -> Path:
        """The model's directory."""
        return PLACES[self.model]


SEEING = Embedded("tiny-llava", "smoothguard_llava", "shapes_pope", "shapes_pope_pgd", "picture")
HEARING = Embedded("tiny-audio", "smoothguard_qwen2_audio", "sounds_pope", "sounds_pope_pgd", "clip")


@dataclass(frozen=True)
class Experiment:
    """A row of a table: model arguments (without `pretrained`), tasks (none: the model's own two), questions of each."""

    name: str
    model_args: Mapping[str, str]
    tasks: Sequence[str] = ()
    limit: int = 420
    about: str = field(default="", compare=False)
    on: Embedded = SEEING

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks) or (self.on.clean, self.on.attacked))

    def command(self, pretrained: str, out: str) -> list[str]:
        """lmms-eval's own command line."""
        arguments = ",".join(f"{key}={value}" for key, value in {"pretrained": pretrained, **self.model_args}.items())
        return [
            "lmms-eval", "--model", self.on.wrapper, "--model_args", arguments, "--tasks", ",".join(self.tasks),
            "--limit", str(self.limit), "--log_samples", "--output_path", out,
        ]  # fmt: skip


def run(experiment: Experiment, out: Path, cache: Path) -> Run:
    """Runs lmms-eval and summarises its samples log. Raises SmoothGuardError when it fails."""
    directory = out / experiment.name
    shutil.rmtree(directory, ignore_errors=True)  # an older run's log must never pass for this one's
    command = experiment.command(str(experiment.on.place), str(directory))
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
    return summarize(experiment, directory, cache)


def summarize(
    experiment: Experiment,
    directory: Path,
    cache: Path,
    environment: Mapping[str, Any] | None = None,
    package_versions: Mapping[str, str | None] | None = None,
) -> Run:
    """The record and the samples of one run, from its logs in `directory`; the rest as in `logs.run_of_logs`."""
    return run_of_logs(
        directory,
        experiment.tasks,
        name=experiment.name,
        about=experiment.about,
        command=" ".join(experiment.command(f"$(smoothguard model {experiment.on.model})", f"runs/{experiment.name}")),
        cache=cache / "attacks",
        environment=environment,
        package_versions=package_versions,
    )
