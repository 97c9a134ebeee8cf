"""Paired timing: every round runs all variants on the same request, in an order of its own; ratios are taken in a round.

So a machine that slows down slows both sides of a ratio, and no variant always runs right after the same other one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

_RESAMPLES = 9_999


class Interval(NamedTuple):
    """A median over `count` rounds with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, float]:
        """Ready for JSON."""
        return self._asdict()


class Rounds(NamedTuple):
    """`seconds` and what was `answered`, of every variant, one entry a round."""

    seconds: dict[str, list[float]]
    answered: dict[str, list[Any]]


def synchronize(device: str) -> None:
    """Waits until the device has done all it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def run_paired(
    tasks: Mapping[str, Callable[[int], Any]], rounds: int, *, warmup: int = 2, seed: int = 0, device: str = "cpu"
) -> Rounds:
    """Calls every task with the round's number, in an order shuffled anew for every round; `warmup` rounds are not kept.

    Raises ValueError without rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; expected at least 1")
    rng = np.random.default_rng(seed)
    names = list(tasks)
    kept = Rounds({name: [] for name in names}, {name: [] for name in names})
    for number in range(-warmup, rounds):
        for name in (names[i] for i in rng.permutation(len(names))):
            synchronize(device)
            start = time.perf_counter()
            answered = tasks[name](number % rounds)
            synchronize(device)
            seconds = time.perf_counter() - start
            if number >= 0:
                kept.seconds[name].append(seconds)
                kept.answered[name].append(answered)
    return kept


def median(values: Sequence[float] | np.ndarray) -> Interval:
    """The median with its bootstrap interval (percentiles, seeded). Raises ValueError without values."""
    from scipy.stats import bootstrap

    data = np.asarray(values, dtype=float)
    if not len(data):
        raise ValueError("median() got no values; expected at least one")
    value = float(np.median(data))
    if len(data) == 1 or np.ptp(data) == 0:
        return Interval(value, value, value, len(data))
    found = bootstrap(
        (data,),
        np.median,
        n_resamples=_RESAMPLES,
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high), len(data))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """The median of the ratios round by round: not the ratio of the medians. Raises ValueError where lengths differ."""
    if len(numerators) != len(denominators):
        raise ValueError(
            f"{len(numerators)} numerators for {len(denominators)} denominators; expected one a round of each"
        )
    return median(np.asarray(numerators, dtype=float) / np.asarray(denominators, dtype=float))
