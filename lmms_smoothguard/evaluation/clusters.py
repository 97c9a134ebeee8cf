"""Rates of outcomes that depend on each other within groups: questions about one scene, one question under several seeds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.rates import wilson

PRIOR_GROUPS = 0.15
"""All-hit and all-miss groups of mean size, this many of each, that `clustered_rate` adds before it estimates its design
effect: from the two or three groups that hold all hits it would come out too small (`docs/decisions.md`)."""


def design_effect(outcomes: Sequence[bool], groups: Sequence[Hashable]) -> float:
    """How many times the variance of a rate is what independent outcomes would give, when those of one group (questions
    about one scene) depend on each other (Kish 1965). Intervals are too narrow by its square root.

    With y_g hits of the n_g outcomes of group g, G groups, p the rate, n outcomes:
    G / (G - 1) * sum (y_g - p n_g)^2 / (n p (1 - p)). NaN where there is nothing to tell it by: fewer than two groups, or
    outcomes all alike.
    """
    hits, sizes = _totals(outcomes, groups)
    if len(sizes) < 2 or len(set(map(bool, outcomes))) < 2:
        return float("nan")
    share, count = hits.sum() / sizes.sum(), sizes.sum()
    deviations = hits - share * sizes
    variance = len(sizes) / (len(sizes) - 1) * float(deviations @ deviations) / count**2
    return float(variance / (share * (1 - share) / count))


def clustered_rate(outcomes: Sequence[bool], groups: Sequence[Hashable]) -> Figure:
    """The share of true outcomes, its interval taken over groups; groups are independent of each other.

    Wilson's interval at the effective sample size n / deff, with Student's quantile on G - 1 degrees of freedom (Korn &
    Graubard 1998, Dean & Pagano 2015). deff is `design_effect` with `PRIOR_GROUPS` added, but never below 1: never
    narrower than of so many independent outcomes. In simulations it held the truth 93 to 99 % of the time
    (`docs/decisions.md`). Without outcomes the value is None, with fewer than two groups there is no interval.
    """
    from scipy.stats import t

    hits, sizes = _totals(outcomes, groups)
    count, number = len(outcomes), len(sizes)
    value = float(hits.sum() / count) if count else None
    method = "share, Wilson at n / design effect (at least 1) over groups, Student's quantile"
    if value is None or number < 2:
        return Figure(value=value, low=None, high=None, count=count, hits=int(hits.sum()), groups=number, method=method)
    effect = max(1.0, _steadied_effect(hits, sizes))
    low, high = wilson(value, count / effect, float(t.ppf(0.975, number - 1)))
    return Figure(
        value=value,
        low=low,
        high=high,
        count=count,
        hits=int(hits.sum()),
        groups=number,
        design_effect=effect,
        method=method,
    )


def _totals(outcomes: Sequence[bool], groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Hits and outcomes of every group."""
    totals: dict[Hashable, list[int]] = {}
    for outcome, group in zip(outcomes, groups, strict=True):
        total = totals.setdefault(group, [0, 0])
        total[0] += bool(outcome)
        total[1] += 1
    hits, sizes = np.array(list(totals.values()), dtype=float).reshape(-1, 2).T
    return hits, sizes


def _steadied_effect(hits: np.ndarray, sizes: np.ndarray) -> float:
    """The design effect with `PRIOR_GROUPS` groups that are all hits, and as many that are all misses."""
    size = sizes.mean()
    hits, sizes = np.append(hits, [size, 0.0]), np.append(sizes, [size, size])
    weights = np.append(np.ones(len(sizes) - 2), [PRIOR_GROUPS, PRIOR_GROUPS])
    number, count = weights.sum(), weights @ sizes
    share = weights @ hits / count
    variance = number / (number - 1) * (weights @ (hits - share * sizes) ** 2) / count**2
    return float(variance / (share * (1 - share) / count))
