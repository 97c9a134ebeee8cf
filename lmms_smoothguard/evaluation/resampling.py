"""Bootstrap intervals of sums over independent groups, through `scipy.stats.bootstrap`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

RESAMPLES = 9999
_AT_ONCE = 4_000_000  # resampled values held in memory at a time


def group_sums(values: Sequence[Sequence[float]], groups: Sequence[Hashable]) -> np.ndarray:
    """The sums of each of `values`' rows over groups: (rows, samples) to (rows, groups), groups as they first occur."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    places = np.array([numbers[group] for group in groups], dtype=int)
    sums = np.zeros((len(values), len(numbers)))
    for row, line in zip(sums, values, strict=True):
        np.add.at(row, places, np.asarray(line, dtype=float))
    return sums


def mean_size(values: np.ndarray) -> float:
    """The mean of what is not 0, in absolute value; 1 where all is."""
    sizes = np.abs(values[values != 0])
    return float(sizes.mean()) if len(sizes) else 1.0


def bootstrap_interval(
    sums: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The percentile 95 % interval of `statistic`, groups drawn with replacement.

    sums: (rows, groups), two groups at least; statistic: from totals (rows, ...) to values (...). BCa held the truth less
    often where few groups say anything (`docs/decisions.md`).
    """
    from scipy.stats import bootstrap

    def of(*rows: np.ndarray, axis: int = -1) -> np.ndarray:
        return statistic(np.stack([row.sum(axis) for row in rows]))

    found = bootstrap(
        tuple(sums),
        of,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // sums.shape[1]),
        vectorized=True,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
