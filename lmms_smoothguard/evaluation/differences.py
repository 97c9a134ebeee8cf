"""Differences between two runs on the same samples, paired, with bootstrap 95 % intervals over independent groups."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import numpy as np

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.rates import wilson
from lmms_smoothguard.evaluation.resampling import RESAMPLES, bootstrap_interval, group_sums


def paired_difference(
    first: Mapping[str, float],
    second: Mapping[str, float],
    groups: Mapping[str, Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Figure:
    """Mean of `first` minus mean of `second`: outcomes (or values) of the same samples by id, in two runs.

    groups: what each sample belongs to, such as its scene; without it every sample is a group of its own. Groups are drawn
    with replacement, both runs' outcomes of a group together, so what the runs have in common cancels out; the interval is
    BCa (Efron 1987), `seed` makes it reproducible. Where every group has the same difference d (two runs that never
    differ, say) nothing varies between resamples: then it is Wilson's of |d| in as many trials as there are groups, to
    both sides if d is 0. Raises SmoothGuardError, with the first ids, where samples do not pair up.
    """
    check_paired(first, second)
    ids = list(first)
    names: list[Hashable] = [name if groups is None else groups[name] for name in ids]
    sums = group_sums([[first[name] - second[name] for name in ids], [1.0] * len(ids)], names)
    value, number = float(sums[0].sum() / sums[1].sum()), sums.shape[1]
    method = f"paired difference, BCa bootstrap over groups, {resamples} resamples, seed {seed}"
    if np.allclose(sums[0], value * sums[1], atol=1e-12):
        low, high = _constant(value, number)
        method = "paired difference, the same in every group: Wilson over groups"
    else:
        low, high = bootstrap_interval(sums, lambda totals: totals[0] / totals[1], seed, resamples)
    return Figure(value=value, low=low, high=high, count=len(ids), groups=number, method=method)


def check_paired(first: Mapping[str, object], second: Mapping[str, object]) -> None:
    """Raises SmoothGuardError unless both have samples, and the same ones."""
    if not first and not second:
        raise SmoothGuardError("no samples to pair up; expected two runs on the same samples")
    for here, there, name in ((first, second, "second"), (second, first, "first")):
        if missing := [str(sample) for sample in here if sample not in there]:
            raise SmoothGuardError(
                f"{len(missing)} samples are missing from the {name} run, the first: {', '.join(missing[:5])}; expected two "
                "runs on the same samples, and rates with one denominator"
            )


def _constant(value: float, groups: int) -> tuple[float, float]:
    ends = wilson(min(1.0, abs(value)), groups)
    if value == 0:
        return -ends[1], ends[1]
    low, high = (math.copysign(end, value) for end in ends)
    return min(low, high), max(low, high)
