"""One sweep from beginning to end: ask what no cache has, vote, write the figures."""

from __future__ import annotations

import logging
from pathlib import Path

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.machine import machine, versions
from lmms_smoothguard.evaluation.questions import Questions
from lmms_smoothguard.evaluation.records import AttackRecord, DataRecord, ModelRecord, TaskRecord
from lmms_smoothguard.evaluation.samples import SampleRecord
from lmms_smoothguard.evaluation.titles import attack_access
from lmms_smoothguard.processes import Processes
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.sweeps.collect import Answers, Collector
from lmms_smoothguard.sweeps.figures import by_poisoned_copies, differences, rates
from lmms_smoothguard.sweeps.grid import Condition, Grid, Point
from lmms_smoothguard.sweeps.records import PointRecord, SweepRecord, read_sweep
from lmms_smoothguard.sweeps.replay import Replay

log = logging.getLogger(__name__)
DEFAULT_TOKENS = 32


def sweep(
    subject: Subject,
    questions: Questions,
    grid: Grid,
    cache: Path,
    *,
    name: str,
    about: str,
    command: str,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    processes: Processes | None = None,
) -> tuple[SweepRecord, list[SampleRecord]] | None:
    """The record of a sweep, and the samples of its main points; None in every process but the main one.

    cache: where adversarial pictures and answers are kept; max_new_tokens: None = as the questions' source says, else 32;
    batch_size: rows of the model at once, EOT's draws counted, while pictures are crafted; processes: those that share the questions out
    among them. Raises SmoothGuardError for whatever cannot be asked, attacked or defended.
    """
    tokens = max_new_tokens or questions.max_new_tokens or DEFAULT_TOKENS
    processes = processes or Processes()
    collector = Collector(subject, grid, cache, max_new_tokens=tokens, batch_size=batch_size, quiet=not processes.main)
    if processes.count > 1:
        collector.collect(questions, processes.share(len(questions)))
        processes.wait()
        if not processes.main:
            return None
    answers = collector.collect(questions)
    if processes.count > 1 and answers.answered:
        log.warning(
            "%d answers of the other processes are not in %s and were given again; expected one directory for all (--cache)",
            answers.answered,
            cache,
        )
    log.info("%d answers were given, all others were cached", answers.answered)
    points, samples = _points(grid, answers, Replay(subject.model, subject.tokenizer, collector.texts), name)
    record = SweepRecord(
        name=name,
        about=about,
        command=command,
        model=ModelRecord(
            name=plain_name(subject.name),
            fingerprint=subject.fingerprint,
            vision_tower=None if subject.tower is None else subject.tower.to_dict(),
        ),
        tasks={condition.name: _task(condition, questions) for condition in grid.conditions},
        points=points,
        seeds={"attack": _attack_seeds(grid), "defense": list(grid.seeds)},
        versions=versions(),
        environment=machine(),
    )  # fmt: skip
    return record, samples


def _points(grid: Grid, answers: Answers, replay: Replay, run: str) -> tuple[list[PointRecord], list[SampleRecord]]:
    voted: dict[tuple[Point, str], dict[int, list[SampleRecord]]] = {}

    def of(point: Point, condition: Condition) -> dict[int, list[SampleRecord]]:
        key = point, condition.name
        if key not in voted:
            seeds = point.seeds if point.config is not None else point.seeds[:1]
            voted[key] = {seed: replay.samples(answers, condition.name, point, seed, run) for seed in seeds}
        return voted[key]

    points, kept = [], []
    for point in grid.points():
        reference, figures = grid.reference(point), {}
        for condition in grid.conditions:
            by_seed = of(point, condition)
            found: dict[str, Figure] = rates(by_seed)
            if reference is not None:
                found |= differences(by_seed, of(reference, condition))
            if point.main and point.config is not None:
                found |= by_poisoned_copies(by_seed)
            if point.main:
                kept += [sample for listed in by_seed.values() for sample in listed]
            figures[condition.name] = found
        points.append(
            PointRecord(
                name=point.name,
                defense=point.defense,
                figures=figures,
                majority_first=point.majority_first,
                main=point.main,
                noise=None if point.config is None else point.noise,
            )
        )
    return points, kept


def _task(condition: Condition, questions: Questions) -> TaskRecord:
    data = DataRecord(
        source=plain_name(questions.source),
        count=len(questions),
        revision=questions.revision,
        split=questions.split,
    )
    attack = condition.attack
    if attack is None:
        return TaskRecord(data=data)
    settings = attack.to_dict()
    return TaskRecord(
        data=data,
        attack=AttackRecord(settings=settings, access=attack_access(settings), adaptive=attack.eot > 0),
    )


def refuse_another(path: Path, subject: Subject, questions: Questions) -> None:
    """Raises SmoothGuardError where `path` is the result of another model or of other data: a wider grid replaces a sweep of
    the same, nothing else."""
    if not path.exists():
        return
    stored = read_sweep(path)
    data = next(iter(stored.tasks.values())).data
    for what, there, here in (
        ("model", (stored.model.name, stored.model.fingerprint), (plain_name(subject.name), subject.fingerprint)),
        ("data", (data.source, data.split, data.revision), (plain_name(questions.source), questions.split, questions.revision)),
    ):  # fmt: skip
        if there != here:
            raise SmoothGuardError(
                f"{path} is a sweep with {what} {_listed(there)}, and this one has {_listed(here)}; expected the same, or another "
                "directory (--out)"
            )


def _listed(parts: tuple[str | None, ...]) -> str:
    return ", ".join(str(part)[:40] for part in parts if part is not None)


def plain_name(source: str) -> str:
    """A model or data without a machine's path: of what lies here its own name, else (a hub's id, a task) as it is."""
    path = Path(source).expanduser()
    return path.resolve().name if path.is_absolute() or path.exists() else source


def _attack_seeds(grid: Grid) -> list[int]:
    return sorted({condition.attack.seed for condition in grid.conditions if condition.attack is not None})
