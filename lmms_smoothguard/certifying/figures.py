"""What certificates say together: shares and means over pictures or questions, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmms_smoothguard.certify import ABSTAIN, fcsb, served_bound
from lmms_smoothguard.certify.gaussian import shifted
from lmms_smoothguard.certifying.asked import FEATURES, Certification
from lmms_smoothguard.certifying.workers import Worker
from lmms_smoothguard.evaluation.clusters import clustered_rate
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.rates import rate
from lmms_smoothguard.evaluation.resampling import bootstrap_interval

Records = Sequence[Mapping[str, Any]]


def figures(asked: Certification, records: Records, worker: Worker) -> dict[str, Figure]:
    """By name. Of features: `S`, `lower` and, at each radius r, `inner@r`, `cos0@r`, `cos<t>@r`, `served0@r`; of classes and answers:
    `accuracy`, `clean_accuracy`, `abstained` and, at each radius, `certified@r` and `certified_accuracy@r`. See `docs/certificates.md`.
    """
    return _of_features(asked, records, worker) if asked.what == FEATURES else _of_votes(asked, records, worker)


def _of_features(asked: Certification, records: Records, worker: Worker) -> dict[str, Figure]:
    scores = [record["certificate"]["score"] for record in records]
    lowers = np.array([record["certificate"]["lower"] for record in records])
    made = {"S": mean_figure(scores, asked.seed), "lower": mean_figure(lowers, asked.seed)}
    for radius in asked.radii:
        made[f"inner@{radius:g}"] = mean_figure(shifted(lowers, radius, asked.sigma), asked.seed)
        for similarity in dict.fromkeys((0.0, asked.similarity)):
            found = [cosine(lower, radius, asked.sigma) for lower in lowers]
            outcomes = [value is not None and value >= similarity for value in found]
            made[f"cos{similarity:g}@{radius:g}"] = share(outcomes, None, radius, worker.largest(similarity), asked)
        bounds = [served_bound(fcsb(lower, radius, asked.sigma), asked.n0, asked.served_beta) for lower in lowers]
        made[f"served0@{radius:g}"] = share(
            [bound.value is not None for bound in bounds], None, radius, worker.largest(0.0), asked
        )
    return made


def _of_votes(asked: Certification, records: Records, worker: Worker) -> dict[str, Figure]:
    groups, largest = _groups(records), worker.largest(0.0)
    radii = [record["certificate"]["radius"] for record in records]
    abstained = [radius is None for radius in radii]
    right = [record["right"] for record in records]
    labelled = all(found is not None for found in right)
    made = {"abstained": _rate(abstained, groups)}
    if labelled:
        made["accuracy"] = _rate(right, groups)
    for radius in asked.radii:
        held = [found is not None and found > radius for found in radii]
        made[f"certified@{radius:g}"] = share(held, groups, radius, largest, asked)
        if labelled:
            both = [one and fine for one, fine in zip(held, right, strict=True)]
            made[f"certified_accuracy@{radius:g}"] = share(both, groups, radius, largest, asked)
    return made


def cosine(lower: float, radius: float, sigma: float) -> float | None:
    """FCSB at a radius, None where it abstains."""
    found = fcsb(float(lower), radius, sigma)
    return None if np.isnan(found) else found


def share(
    outcomes: Sequence[bool], groups: Sequence[str] | None, radius: float, largest: float | None, asked: Certification
) -> Figure:
    """The share of certified outcomes; no value at a radius that n and alpha cannot certify, for 0 would read like a finding."""
    if largest is None or radius >= largest:
        most = "no radius" if largest is None else f"no radius of {largest:.4g} or more"
        return Figure(
            value=None, low=None, high=None, count=len(outcomes),
            method=f"{ABSTAIN}: {most} can be certified with n = {asked.n} and alpha = {asked.alpha:g}",
        )  # fmt: skip
    return _rate(outcomes, groups)


def _rate(outcomes: Sequence[bool], groups: Sequence[str] | None) -> Figure:
    return rate(outcomes).figure() if groups is None else clustered_rate(outcomes, groups)


def _groups(records: Records) -> list[str] | None:
    """Of questions that depend on each other; None where all are on their own."""
    named = [record["group"] or f"\0{record['id']}" for record in records]
    return named if len(set(named)) < len(named) else None


def mean_figure(values: Any, seed: int) -> Figure:
    """The mean over pictures with the bootstrap's percentile interval; no interval for a single one."""
    line = np.asarray(values, dtype=np.float64)
    low: float | None = None
    high: float | None = None
    if len(line) > 1:
        low, high = bootstrap_interval(np.stack([line, np.ones_like(line)]), lambda sums: sums[0] / sums[1], seed)
    return Figure(value=float(line.mean()), low=low, high=high, count=len(line), method="mean, bootstrap over pictures")
