"""The difference of two rates over the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Difference(NamedTuple):
    """First rate minus second, over `count` pairs, with a 95 % interval; how often only the one or the other was true."""

    value: float
    low: float
    high: float
    count: int
    only_first: int
    only_second: int

    def to_dict(self) -> dict[str, float]:
        """Ready for JSON."""
        return self._asdict()


def paired_difference(pairs: Sequence[tuple[bool, bool]]) -> Difference:
    """Agresti & Min (2005): Wald's interval after half an observation more in each cell of the 2 x 2 table, so that it has a
    width where no pair disagrees. Raises ValueError without pairs."""
    from scipy.stats import norm

    if not pairs:
        raise ValueError("paired_difference() got no pairs; expected at least one")
    first = sum(a and not b for a, b in pairs)
    second = sum(b and not a for a, b in pairs)
    count, more, less = len(pairs) + 2, first + 0.5, second + 0.5
    middle = (more - less) / count
    half = float(norm.ppf(0.975)) * (more + less - (more - less) ** 2 / count) ** 0.5 / count
    return Difference((first - second) / len(pairs), middle - half, middle + half, len(pairs), first, second)
