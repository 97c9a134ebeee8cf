"""One measured figure as result files have it: a value, its 95 % interval, how many things it counts, and by what method."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """The same figure by itself under each of `count` seeds: smallest, largest, standard deviation (n - 1)."""

    count: int
    min: float
    max: float
    sd: float


@dataclass(frozen=True, kw_only=True)
class Figure:
    """`value` with `low` and `high`, the ends of its 95 % interval; None where it is undefined or has no interval.

    count: the samples (or trials) behind it; hits: of those, for a rate; groups: independent units (scenes) where samples
    depend on each other; design_effect: how many times independent samples' variance it has (Kish 1965); seeds: its
    spread, where several seeds are pooled; method: how value and interval were made, for a reader.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int
    method: str
    hits: int | None = None
    groups: int | None = None
    design_effect: float | None = None
    seeds: Spread | None = None

    def to_dict(self) -> dict[str, Any]:
        """Ready for strict JSON, without the optional fields that say nothing."""
        needed = ("value", "low", "high", "count", "method")
        return {name: field for name, field in asdict(self).items() if name in needed or field is not None}


def finite(value: float | None) -> float | None:
    """None in place of NaN and infinities, which strict JSON does not know."""
    return float(value) if value is not None and math.isfinite(value) else None
