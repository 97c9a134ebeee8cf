"""The feature certificate: how far a smoothed feature can turn away from the plain encoder's clean feature.

From draws z_i = <u, g(x + e_i)> in [-1, 1] a lower confidence bound of the score S(x) = E <u, g(x + e)>; from it FCSB(r) and
R(t) (`gaussian.py`).

Several tokens. An image has T features. Two certificates, and they say different things:

- `certify_feature`: about all of them at once. Written one behind the other and divided by sqrt(T), unit tokens make ONE unit
  vector F, and so do their references u; <u, F> is the mean over the tokens of <u_t, f_t>. So the mean is an inner product of
  unit vectors like any other, has one mean and one bound, and alpha is not split. It bounds the cosine between u and the
  smoothed tokens written one behind the other, E F. A few tokens may be far worse than the bound if others are better. Where
  every token's smoothed feature is brought to a length of its own (as a served model does), the mean over tokens of their
  cosines is 2 FCSB - 1 or more: the worst case is tokens with an inner product just below 0, whose cosine may be -1.
- `certify_tokens`: about each of them, all at once: T bounds at alpha / T each. It bounds every token's own cosine, whatever
  lengths they are brought to.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lmms_smoothguard.certify import gaussian
from lmms_smoothguard.certify.bounds import DEFAULT_METHODS, MeanBound, lower_mean, lower_means
from lmms_smoothguard.certify.checks import checked_alpha, checked_count, checked_radius, checked_sigma
from lmms_smoothguard.certify.gaussian import ABSTAIN, CERTIFIED, ServedBound, served_bound
from lmms_smoothguard.errors import ConfigError

CLEAN, SERVED = "clean", "served"
"""What a feature is compared with: the plain encoder's clean feature, or the mean of separate noisy draws."""


@dataclass(frozen=True)
class FeatureCertificate:
    """With probability 1 - alpha over the n draws: cos(u, E F(x + d + e)) >= FCSB(r) for every ||d||_2 <= r.

    score: the mean of the n inner products, an estimate; lower: the bound of its expectation that certifies; bound: how that
    was found, on (1 + z) / 2; sigma: in the units of the tensor the noise enters; tokens: in the mean (T); reference: what u
    is, "clean" or "served" (then n_selection draws made it, none of them among the n).
    """

    score: float
    lower: float
    bound: MeanBound
    sigma: float
    n: int
    alpha: float
    tokens: int = 1
    reference: str = CLEAN
    n_selection: int = 0

    @property
    def status(self) -> str:
        """ABSTAIN where no radius at all is certified."""
        return CERTIFIED if self.lower > 0 else ABSTAIN

    def at(self, radius: float) -> float | None:
        """FCSB(radius), the least cosine there; None means ABSTAIN."""
        return _told(gaussian.fcsb(self.lower, radius, self.sigma))

    def radius(self, similarity: float) -> float | None:
        """R(similarity): up to this L2 norm the cosine is that or more; None means ABSTAIN."""
        return _told(gaussian.radius(self.lower, similarity, self.sigma))

    def served(self, radius: float, n0: int, beta: float) -> ServedBound:
        """What holds at `radius` for the mean of n0 draws, with probability 1 - beta over them; alpha comes on top."""
        bound = self.at(radius)
        return served_bound(float("nan") if bound is None else bound, n0, beta)

    def token_mean(self, radius: float) -> float | None:
        """2 FCSB - 1: the least mean over tokens of their own cosines; FCSB for one token; None means ABSTAIN.

        At and below 0 it still holds, where FCSB itself is certified.
        """
        bound = self.at(radius)
        return bound if bound is None or self.tokens == 1 else 2 * bound - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"status": self.status, **asdict(self)}


@dataclass(frozen=True)
class TokenCertificate:
    """With probability 1 - alpha over the n draws, for every token t at once: cos(u_t, E g_t(x + d + e)) >= FCSB_t(r).

    scores, lowers: (T,) as in FeatureCertificate; token_alpha: alpha / T, what each token's bound was given.
    """

    scores: tuple[float, ...]
    lowers: tuple[float, ...]
    sigma: float
    n: int
    alpha: float
    token_alpha: float
    methods: tuple[str, ...]
    reference: str = CLEAN
    n_selection: int = 0

    @property
    def status(self) -> str:
        """ABSTAIN where not all tokens have a certified radius."""
        return CERTIFIED if min(self.lowers) > 0 else ABSTAIN

    def at(self, radius: float) -> tuple[float | None, ...]:
        """Each token's least cosine at `radius`; None means ABSTAIN for that token."""
        checked_radius(radius)
        return tuple(_told(gaussian.fcsb(lower, radius, self.sigma)) for lower in self.lowers)

    def worst(self, radius: float) -> float | None:
        """The least cosine of any token; None means ABSTAIN for one of them at least."""
        found = self.at(radius)
        return None if None in found else min(bound for bound in found if bound is not None)

    def radius(self, similarity: float) -> float | None:
        """Up to this L2 norm every token's cosine is `similarity` or more; None means ABSTAIN."""
        return _told(gaussian.radius(min(self.lowers), similarity, self.sigma))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {"status": self.status, **asdict(self)}


def certify_feature(
    inner: Any,
    *,
    sigma: float,
    alpha: float = 0.001,
    reference: str = CLEAN,
    n_selection: int = 0,
    methods: tuple[str, ...] = DEFAULT_METHODS,
) -> FeatureCertificate:
    """From inner products of unit vectors: (n,) of one feature, or (n, T) of T tokens, whose mean is certified.

    In the order they were drawn, independent, u fixed before them. Raises ConfigError.
    """
    sigma, values = checked_sigma(sigma), _inner(inner)
    tokens = 1 if values.ndim == 1 else values.shape[1]
    line = values if values.ndim == 1 else values.mean(1)
    bound = lower_mean((1 + line) / 2, alpha, methods)
    return FeatureCertificate(
        score=float(line.mean()),
        lower=2 * bound.value - 1,
        bound=bound,
        sigma=sigma,
        n=len(line),
        alpha=bound.alpha,
        tokens=tokens,
        reference=reference,
        n_selection=n_selection,
    )


def certify_tokens(
    inner: Any,
    *,
    sigma: float,
    alpha: float = 0.001,
    reference: str = CLEAN,
    n_selection: int = 0,
    methods: tuple[str, ...] = DEFAULT_METHODS,
) -> TokenCertificate:
    """From (n, T) inner products of unit vectors: a bound for every token, at alpha / T each. Raises ConfigError."""
    sigma, values = checked_sigma(sigma), _inner(inner)
    if values.ndim != 2:
        raise ConfigError(f"inner products have the shape {values.shape}; expected (draws, tokens)")
    share = checked_alpha(alpha) / values.shape[1]
    lowers = 2 * lower_means((1 + values) / 2, share, methods) - 1
    return TokenCertificate(
        scores=tuple(float(score) for score in values.mean(0)),
        lowers=tuple(float(lower) for lower in lowers),
        sigma=sigma,
        n=len(values),
        alpha=float(alpha),
        token_alpha=share,
        methods=tuple(methods),
        reference=reference,
        n_selection=n_selection,
    )


def largest_score(n: int, alpha: float, methods: tuple[str, ...] = DEFAULT_METHODS) -> float:
    """The best lower bound that n draws can give at alpha: when every inner product is 1. Raises ConfigError."""
    return 2 * lower_mean(np.ones(checked_count(n)), alpha, methods).value - 1


def largest_feature_radius(
    n: int, alpha: float, sigma: float, similarity: float = 0.0, methods: tuple[str, ...] = DEFAULT_METHODS
) -> float | None:
    """The largest R(similarity) that n draws can certify at alpha; beyond it every certificate abstains, whatever the encoder.

    None where that similarity cannot be certified at all. Raises ConfigError.
    """
    return _told(gaussian.radius(largest_score(n, alpha, methods), similarity, sigma))


_ROUNDING = 1e-6
"""Of inner products of vectors that were brought to length 1 in float32."""


def _inner(inner: Any) -> np.ndarray:
    values = np.asarray(inner, dtype=np.float64)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ConfigError(f"inner products have the shape {values.shape}; expected (draws,) or (draws, tokens)")
    beyond = ~(np.abs(values) <= 1 + _ROUNDING)
    if bool(beyond.any()):
        raise ConfigError(
            f"an inner product is {values[beyond][0]}; expected those of unit vectors, in [-1, 1]: see `checks.unit_rows`"
        )
    made: np.ndarray = values.clip(-1, 1)
    return made


def _told(value: float) -> float | None:
    return None if np.isnan(value) else value
