"""Gaussian smoothing of similarities: the bound FCSB(r), its inverse R(t), and what a finite number of draws keeps of it.

Let g map a noisy input to a unit vector, u be a fixed unit vector and s(x) = E <u, g(x + e)>, e ~ N(0, sigma^2 I). Then
h = (1 + s) / 2 is the Gaussian smoothing of a function with values in [0, 1], so Phi^-1(h) is (1 / sigma)-Lipschitz in L2
(Salman et al. 2019, lemma 2), and for every d with ||d|| <= r

    <u, E g(x + d + e)> >= 2 Phi(Phi^-1((1 + s(x)) / 2) - r / sigma) - 1 = erf(erfinv(s(x)) - r / (sigma sqrt 2)) = FCSB(r).

||E g|| <= 1, so where FCSB(r) >= 0 the cosine of u and E g is no smaller than the inner product, and FCSB bounds it as well;
below 0 the division by the norm would turn the inequality round: nothing is certified there, and the answer is NaN. (At
exactly 0, E g itself may vanish; the cosine is 0 or more wherever it exists.) Tight: a half-space attains it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lmms_smoothguard.certify.bounds import kl_deviation
from lmms_smoothguard.certify.checks import (
    checked_alpha,
    checked_count,
    checked_radius,
    checked_score,
    checked_sigma,
)
from lmms_smoothguard.errors import ConfigError

CERTIFIED, ABSTAIN = "certified", "ABSTAIN"
"""The two states of every certificate. ABSTAIN is no value of 0: nothing was certified, neither good nor bad."""


def shifted(score: Any, radius: Any, sigma: float) -> Any:
    """erf(erfinv(score) - radius / (sigma sqrt 2)): the bound of the inner product, negative ones included."""
    from scipy.special import erf, erfinv

    return erf(erfinv(score) - np.asarray(radius) / (sigma * np.sqrt(2)))


def fcsb(score: float, radius: float, sigma: float) -> float:
    """FCSB(r): the least cosine at L2 distance `radius`, given E <u, g> >= score at the centre; NaN means ABSTAIN.

    Raises ConfigError for a score outside [-1, 1], a negative radius, sigma not above 0.
    """
    bound = float(shifted(checked_score(score), checked_radius(radius), checked_sigma(sigma)))
    return bound if bound >= 0 else float("nan")


def radius(score: float, similarity: float, sigma: float) -> float:
    """R(t) = sigma (Phi^-1((1 + score) / 2) - Phi^-1((1 + t) / 2)): up to there the cosine is `similarity` = t or more.

    NaN means ABSTAIN: score <= t, so that t is not even certified without an attack. Infinite for a score of 1. Raises
    ConfigError, also for t below 0, which no certificate is about.
    """
    from scipy.special import erfinv

    score, sigma = checked_score(score), checked_sigma(sigma)
    similarity = checked_similarity(similarity)
    if score <= similarity:
        return float("nan")
    return float(sigma * np.sqrt(2) * (erfinv(score) - erfinv(similarity)))


def checked_similarity(similarity: Any) -> float:
    """A cosine in [0, 1) that is asked for. Raises ConfigError."""
    found = checked_score(similarity, "similarity")
    if found < 0:
        raise ConfigError(f"similarity is {similarity!r}; expected 0 or more: below 0 no cosine is certified")
    return found


@dataclass(frozen=True)
class ServedBound:
    """What the mean m of n0 fresh draws keeps of a certified `fcsb`, with probability 1 - beta over these draws.

    value: cos(u, m) > value, by KL-Chernoff; hoeffding: the same by Hoeffding's inequality, for comparison; both None where
    they say nothing (ABSTAIN). For one request of an attacker who does not know the draws: x + d is chosen before them. For k
    requests give beta / k.
    """

    status: str
    value: float | None
    hoeffding: float | None
    fcsb: float | None
    n0: int
    beta: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def served_bound(fcsb: float, n0: int, beta: float) -> ServedBound:
    """The bound for the mean of n0 draws, from one for their expectation (NaN, ABSTAIN, stays so).

    (1 + <u, m>) / 2 is the mean of n0 independent values in [0, 1] whose expectation is (1 + fcsb) / 2 or more. Raises
    ConfigError.
    """
    n0, beta = checked_count(n0, "n0", 1), checked_alpha(beta, "beta")
    if np.isnan(fcsb):
        return ServedBound(ABSTAIN, None, None, None, n0, beta)
    mean = (1 + checked_score(fcsb, "fcsb")) / 2
    value = _or_none(2 * kl_deviation(mean, n0, beta) - 1)
    plain = _or_none(2 * (mean - float(np.sqrt(np.log(1 / beta) / (2 * n0)))) - 1)
    return ServedBound(ABSTAIN if value is None else CERTIFIED, value, plain, float(fcsb), n0, beta)


def _or_none(bound: float) -> float | None:
    return bound if bound >= 0 else None
