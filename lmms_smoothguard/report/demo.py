"""`smoothguard demo`, `report` and `results`: the main job, its page, and the rest of the README's table."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmms_smoothguard.errors import ConfigError, SmoothGuardError, did_you_mean
from lmms_smoothguard.evaluation.records import Run, read_record, write_run
from lmms_smoothguard.evaluation.runs import load_samples
from lmms_smoothguard.report.certified import run_certification
from lmms_smoothguard.report.experiments import HEARING, SEEING, Experiment, run, summarize
from lmms_smoothguard.report.page import write_page
from lmms_smoothguard.report.smoothed import CERTIFICATIONS, CERTIFICATIONS_OF_SOUNDS, SMOOTHED, Certification
from lmms_smoothguard.report.stronger import STRONGER
from lmms_smoothguard.report.tables import print_table

log = logging.getLogger(__name__)

_PIXEL = {"sigma": "0.2", "noise_space": "pixel"}
_NO_DEFENSE = {"defense": "none"}
_ATTACKED = (SEEING.attacked,)

# Fixed beforehand: 420 questions, L-inf 4/255, 40 steps, no early stop; SmoothGuard N = 10, sigma 0.2 in pixel units.
DEMO = (
    Experiment("plain", _NO_DEFENSE, about="undefended"),
    Experiment("smoothguard", _PIXEL, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
)
# Fixed beforehand likewise: L-inf 0.001 of full scale, SmoothGuard as it comes, N = 10, sigma 0.02 in amplitude.
DEMO_OF_SOUNDS = (
    Experiment("plain", _NO_DEFENSE, about="undefended", on=HEARING),
    Experiment("smoothguard", {"audio_sigma": "0.02"}, about="SmoothGuard, N = 10, sigma 0.02 amplitude", on=HEARING),
)
DEMOS: Mapping[str, tuple[Experiment, ...]] = {demo[0].on.model: demo for demo in (DEMO, DEMO_OF_SOUNDS)}
"""By the embedded model that they are about."""
_EOT = {"attack_eot": "8", "attack_batch_size": "128"}
REST = (
    Experiment("published", {"sigma": "0.1"}, about="SmoothGuard as published: N = 10, sigma 0.1 normalized"),
    Experiment("one_noisy_copy", _PIXEL | {"num_samples": "1", "include_clean": "false"}, about="one noisy copy alone, sigma 0.2 pixel"),
    Experiment("n20", _PIXEL | {"num_samples": "20"}, about="SmoothGuard, N = 20, sigma 0.2 pixel"),
    Experiment("n20_noisy_only", _PIXEL | {"num_samples": "20", "include_clean": "false"}, about="SmoothGuard, N = 20 without the clean copy, sigma 0.2 pixel"),
    Experiment("token", _PIXEL | {"level": "token"}, about="token level, N = 10, sigma 0.2 pixel"),
    Experiment("early_exact", _PIXEL | {"early_stop": "exact"}, about="early stop: exact, N = 10, sigma 0.2 pixel"),
    Experiment("early_rate", _PIXEL | {"early_stop": "0.01"}, about="early stop: 1 %, N = 10, sigma 0.2 pixel"),
    Experiment("plain_eps2", _NO_DEFENSE | {"attack_eps": "2/255"}, _ATTACKED, about="undefended"),
    Experiment("smoothguard_eps2", _PIXEL | {"attack_eps": "2/255"}, _ATTACKED, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("plain_eps8", _NO_DEFENSE | {"attack_eps": "8/255"}, _ATTACKED, about="undefended"),
    Experiment("smoothguard_eps8", _PIXEL | {"attack_eps": "8/255"}, _ATTACKED, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("faint_plain", _NO_DEFENSE, ("shapes_pope_faint",), 300, about="undefended"),
    Experiment("faint_smoothguard", _PIXEL, ("shapes_pope_faint",), 300, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("caption_plain", _NO_DEFENSE, ("shapes_caption", "shapes_caption_pgd"), 150, about="undefended"),
    Experiment("caption_smoothguard", _PIXEL, ("shapes_caption", "shapes_caption_pgd"), 150, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("faint_token", _PIXEL | {"level": "token"}, ("shapes_pope_faint",), 300, about="token level, N = 10, sigma 0.2 pixel"),
    Experiment("caption_token", _PIXEL | {"level": "token"}, ("shapes_caption", "shapes_caption_pgd"), 150, about="token level, N = 10, sigma 0.2 pixel"),
    Experiment("caption_early_exact", _PIXEL | {"early_stop": "exact"}, ("shapes_caption", "shapes_caption_pgd"), 150, about="early stop: exact, N = 10, sigma 0.2 pixel"),
    Experiment("smoothguard_eot40", _PIXEL | _EOT, _ATTACKED, 150, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("smoothguard_eot100", _PIXEL | _EOT | {"attack_steps": "100"}, _ATTACKED, 100, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
)  # fmt: skip


EXPERIMENTS = (*DEMO, *REST, *STRONGER)
"""What has a result file of its own, in the order in which they are run; `smoothed.SMOOTHED` is a table by itself."""


def run_demo(out: Path, limit: int, model: str = SEEING.model) -> Path:
    """Runs the two experiments on an embedded model and prints the table; each run's record and samples go to `out`, the page to
    the path returned. Raises ConfigError for a model without a demo, or where `out` has another model's."""
    if model not in DEMOS:
        raise ConfigError(f"model is {model!r}; {did_you_mean(model, DEMOS)}")
    if (other := _demo_in(out)) not in (None, model):
        raise ConfigError(
            f"out is {out}, which has the demo of {other}; expected another directory for that of {model}"
        )
    records = []
    for experiment in DEMOS[model]:
        run_ = _run(dataclasses.replace(experiment, limit=limit), out)
        write_run(out, *run_)
        records.append(run_.record)
    page = write_page(out, records, DEMOS[model][0].on)
    print_table(records)
    return page


def _demo_in(directory: Path) -> str | None:
    """The model whose demo's logs are in a directory, both of them."""
    for model, demo in DEMOS.items():
        if all(any((directory / e.name).rglob(f"*_samples_{e.on.attacked}.jsonl")) for e in demo):
            return model
    return None


def run_report(directory: Path) -> Path:
    """Writes the page of earlier runs again, from their logs alone, and returns its path.

    The table has every experiment whose logs are there. Raises SmoothGuardError unless both of the demo's are.
    """
    model = _demo_in(directory)
    if model is None:
        missing = [e.name for e in DEMO if not any((directory / e.name).rglob("*_samples_*.jsonl"))]
        raise SmoothGuardError(
            f"{directory} has no run named {' and none named '.join(missing or ['plain'])} of one embedded model; expected a directory "
            f"that `smoothguard demo --out {directory}` has filled"
        )
    demo = DEMOS[model]
    records = []
    for experiment in demo if model != SEEING.model else EXPERIMENTS:
        if any((directory / experiment.name).rglob("*_samples_*.jsonl")):
            count = len(load_samples(directory / experiment.name, experiment.tasks[-1]))
            # The machine that ran it need not be this one.
            stored = directory / f"{experiment.name}.json"
            old = read_record(stored) if stored.exists() else None
            asked = dataclasses.replace(experiment, limit=count)
            place, ran_on = directory / experiment.name, ({}, {}) if old is None else (old.environment, old.versions)
            records.append(summarize(asked, place, directory / "cache", *ran_on).record)
    return write_page(directory, records, demo[0].on)


def run_results(
    out: Path, results: Path, only: Sequence[str] = (), *, smoothing: bool = False, sounds: bool = False
) -> None:
    """Runs every experiment that has no result file yet, or those in `only` whether or not they have one, and writes records and
    samples to `results`. smoothing: those of the feature-smoothing table alone, its certificates among them; sounds: the certificates
    of answers about sounds alone. Raises SmoothGuardError for both of them, and for names that are not among what is asked for.
    """
    if smoothing and sounds:
        raise SmoothGuardError("results has both --smoothing and --sounds; expected one of them at a time")
    results.mkdir(parents=True, exist_ok=True)
    experiments: tuple[Experiment, ...] = EXPERIMENTS
    certifications: tuple[Certification, ...] = ()
    if smoothing:
        experiments, certifications = SMOOTHED, CERTIFICATIONS
    if sounds:
        experiments, certifications = (), CERTIFICATIONS_OF_SOUNDS
    known = {one.name for one in experiments} | {one.name for one in certifications}
    if unknown := set(only) - known:
        raise SmoothGuardError(f"unknown experiment {sorted(unknown)[0]!r}; known: {', '.join(sorted(known))}")

    def wanted(name: str) -> bool:
        return name in only or (not only and not (results / f"{name}.json").exists())

    for experiment in experiments:
        if wanted(experiment.name):
            write_run(results, *_run(experiment, out))
    for certification in certifications:
        if wanted(certification.name):
            run_certification(certification, out, results)
    if experiments:
        print_table([read_record(path) for e in experiments if (path := results / f"{e.name}.json").exists()])


def _run(experiment: Experiment, out: Path) -> Run:
    return run(experiment, out, out / "cache")
