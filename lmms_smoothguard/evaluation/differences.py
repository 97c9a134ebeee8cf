"""Differences between two runs on the same samples, paired, with bootstrap 95 % intervals over independent groups."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.rates import wilson
from lmms_smoothguard.evaluation.resampling import RESAMPLES, bootstrap_interval, group_sums, mean_size


def paired_difference(
    first: Mapping[str, bool],
    second: Mapping[str, bool],
    groups: Mapping[str, Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Figure:
    """The rate of `first` minus that of `second`: outcomes of the same samples by id, in two runs.

    groups: what each sample belongs to, such as its scene; without it every sample is a group of its own. Groups are drawn
    with replacement, both runs' outcomes of a group together, so what the runs have in common cancels out; `seed` makes it
    reproducible. Two groups more, one of each sign and as large as those that differ are on average, keep the interval from
    being too narrow where few differ, as Bonett & Price (2012) do for single pairs; the value has them not. Where no outcome
    differs it is Wilson's interval of none in as many trials as there are groups, to both sides. Raises SmoothGuardError, with
    the first ids, where samples do not pair up.
    """
    check_paired(first, second)
    ids = list(first)
    names: list[Hashable] = [name if groups is None else groups[name] for name in ids]
    sums = group_sums([[float(first[name]) - float(second[name]) for name in ids], [1.0] * len(ids)], names)
    number, method = sums.shape[1], f"paired difference, bootstrap over groups, {resamples} resamples, seed {seed}"
    if all(bool(first[name]) == bool(second[name]) for name in ids):
        high = wilson(0.0, number)[1]
        low, method = -high, "paired difference, none differ: Wilson over groups"
    else:
        amount, size = mean_size(sums[0]), sums[1].mean()
        more = np.array([[amount, -amount], [size, size]])
        low, high = bootstrap_interval(np.append(sums, more, axis=1), _ratio, seed, resamples)
    value = float(sums[0].sum() / sums[1].sum())
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


def _ratio(totals: np.ndarray) -> np.ndarray:
    return np.asarray(totals[0] / totals[1])
