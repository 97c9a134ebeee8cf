"""Means with Student's 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lmms_smoothguard.evaluation.figures import Figure


@dataclass(frozen=True)
class Mean:
    """The mean of `count` values; `low` and `high` are Student's 95 % interval, None for a single value."""

    value: float
    low: float | None
    high: float | None
    count: int

    def figure(self) -> Figure:
        """As result files have it."""
        return Figure(**asdict(self), method="mean, Student's t")


def mean(values: Sequence[float]) -> Mean:
    """The mean with its interval. Raises ValueError without values."""
    from scipy.stats import t

    data = np.asarray(values, dtype=float)
    if not len(data):
        raise ValueError("mean() got no values; expected at least one")
    value = float(data.mean())
    if len(data) == 1:
        return Mean(value, None, None, 1)
    half = float(t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / len(data) ** 0.5)
    return Mean(value, value - half, value + half, len(data))
