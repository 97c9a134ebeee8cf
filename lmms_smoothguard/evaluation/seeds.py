"""Several seeds pooled: k answers to each of n questions are k n outcomes, but not k n independent ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.clusters import clustered_rate
from lmms_smoothguard.evaluation.differences import check_paired, paired_difference
from lmms_smoothguard.evaluation.figures import Figure, Spread
from lmms_smoothguard.evaluation.outcomes import OutcomeName, groups_of_samples, outcomes
from lmms_smoothguard.evaluation.records import Record, Run


def pooled_rate(by_seed: Mapping[Hashable, Mapping[str, bool]], groups: Mapping[str, Hashable] | None = None) -> Figure:
    """The rate over all outcomes of all seeds; `by_seed`: each seed's outcomes of the same questions, by question id.

    The interval is `clustered_rate`'s, all outcomes of a question (or of its group, such as a scene) being one cluster. It
    speaks of other questions under THESE seeds: what a seed does to all questions alike it cannot know, for which see
    `seeds`, the rate's smallest and largest value and its standard deviation between seeds. Raises SmoothGuardError for
    fewer than two seeds, or where the seeds' samples are not the same.
    """
    if len(by_seed) < 2:
        raise SmoothGuardError(f"{len(by_seed)} seeds to pool; expected at least two")
    first, *others = by_seed.values()
    for other in others:
        check_paired(first, other)
    told = [(outcome, name) for answered in by_seed.values() for name, outcome in answered.items()]
    places: list[Hashable] = [name if groups is None else groups[name] for _, name in told]
    pooled = clustered_rate([outcome for outcome, _ in told], places)
    shares = np.array([sum(answered.values()) / len(answered) for answered in by_seed.values()])
    spread = Spread(len(shares), float(shares.min()), float(shares.max()), float(shares.std(ddof=1)))
    return dataclasses.replace(pooled, seeds=spread)


def pooled_over_runs(runs: Sequence[Run], task: str, name: OutcomeName) -> Figure:
    """The rate `name` of a task, over runs that differ in nothing but their seeds. Raises SmoothGuardError otherwise."""
    check_poolable([run.record for run in runs], task)
    by_seed: dict[Hashable, dict[str, bool]] = {run.record.name: outcomes(run.of(task), name) for run in runs}
    return pooled_rate(by_seed, groups_of_samples(runs[0].of(task)))


def difference_of_runs(first: Run, second: Run, task: str, name: OutcomeName, *, seed: int = 0) -> Figure:
    """The rate `name` of a task in `first` minus that in `second`, over the same samples; see `paired_difference`.

    ASR is over those that the undefended model gets right: where two runs do not agree on them, as two models do not,
    their rates have different denominators, and the difference is refused with a SmoothGuardError.
    """
    groups = groups_of_samples(first.of(task))
    return paired_difference(outcomes(first.of(task), name), outcomes(second.of(task), name), groups, seed=seed)


def check_poolable(records: Sequence[Record], task: str) -> None:
    """Raises SmoothGuardError unless the records are of one setting (model, data, attack, defence) under different seeds."""
    for record in records:
        if task not in record.tasks:
            raise SmoothGuardError(f"{record.name} has no task {task!r}; it has {', '.join(record.tasks)}")
    for record in records[1:]:
        for (place, one), (_, other) in zip(_settings(records[0], task), _settings(record, task), strict=True):
            if one != other:
                raise SmoothGuardError(
                    f"{records[0].name} and {record.name} differ in {place}: {_apart(one, other)}; expected runs that differ "
                    "in nothing but their seeds"
                )
    used: dict[tuple[tuple[str, int | None], ...], str] = {}
    for record in records:
        seeds = tuple(sorted(record.seeds.items()))
        if seeds in used and None not in record.seeds.values():
            raise SmoothGuardError(
                f"{used[seeds]} and {record.name} have the same seeds, {dict(seeds)}; pooled they would count everything twice"
            )
        used[seeds] = record.name


def _settings(record: Record, task: str) -> list[tuple[str, Any]]:
    """What a rate hangs on, by name, without seeds."""
    stored = record.tasks[task]
    attack = None if stored.attack is None else dataclasses.asdict(stored.attack)
    if attack is not None:
        attack["settings"] = {name: value for name, value in attack["settings"].items() if name != "seed"}
    defense = record.defense
    return [
        ("model", dataclasses.asdict(record.model)),
        ("data", dataclasses.asdict(stored.data)),
        ("attack", attack),
        ("defense", defense and {name: value for name, value in defense.items() if name != "seed"}),
    ]


def _apart(one: Any, other: Any) -> str:
    """The first field in which two settings differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in [*one, *other]:
            if name not in one or name not in other or one[name] != other[name]:
                return f"{name} {_apart(one.get(name), other.get(name))}"
    return f"{one!r} and {other!r}"
