"""One-sided confidence bounds for the mean of independent, equally distributed values in [0, 1], and for shares.

Each holds at fixed n, for every distribution on [0, 1]: P(true mean < lower bound) <= alpha.

- `hoeffding`: mean - sqrt(ln(1 / alpha) / 2n).
- `kl` (Chernoff's): the smallest p with n KL(mean || p) <= ln(1 / alpha); never below Hoeffding's (Pinsker).
- `bernstein`: Maurer & Pontil (2009), theorem 4, with the sample variance.
- `betting`: Waudby-Smith & Ramdas (2023), see `betting.py`; by far the tightest where values vary little.

An upper bound is 1 minus the lower bound of 1 - values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lmms_smoothguard.certify.betting import betting_lower
from lmms_smoothguard.certify.checks import checked_alpha, checked_count, unit_values
from lmms_smoothguard.errors import ConfigError, did_you_mean

_HALVINGS = 60
"""A bisection of [0, 1] down to the last bit."""
DEFAULT_METHODS = ("betting", "kl")
"""Betting for values that vary little, KL-Chernoff for those that jump between 0 and 1. Hoeffding's is never tighter than
the latter, and Bernstein's was wider than betting in everything tried, so alpha is not spent on them."""


@dataclass(frozen=True)
class MeanBound:
    """A one-sided bound of a mean: `value`, the tightest of `each`.

    side: "lower" or "upper"; alpha: in all; split: what each method was given of it (together alpha); each: their bounds;
    method: whose the value is; mean: of the n values.
    """

    value: float
    side: str
    method: str
    mean: float
    n: int
    alpha: float
    split: dict[str, float]
    each: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def hoeffding_lower(values: Any, alpha: float) -> np.ndarray:
    """(n, ...) values to (...) lower bounds, 0 at least."""
    values, alpha = unit_values(values), checked_alpha(alpha)
    made: np.ndarray = np.maximum(0.0, values.mean(0) - np.sqrt(np.log(1 / alpha) / (2 * len(values))))
    return made


def bernstein_lower(values: Any, alpha: float) -> np.ndarray:
    """(n, ...) values to (...) lower bounds: mean - sqrt(2 V ln(2 / alpha) / n) - 7 ln(2 / alpha) / (3 (n - 1)), 0 at least."""
    values, alpha = unit_values(values), checked_alpha(alpha)
    n, log = len(values), np.log(2 / alpha)
    width = np.sqrt(2 * values.var(0, ddof=1) * log / n) + 7 * log / (3 * (n - 1))
    made: np.ndarray = np.maximum(0.0, values.mean(0) - width)
    return made


def kl_lower(values: Any, alpha: float) -> np.ndarray:
    """(n, ...) values to (...) lower bounds of their means, see `kl_below`."""
    values, alpha = unit_values(values), checked_alpha(alpha)
    return kl_below(values.mean(0), len(values), alpha)


def kl_below(share: Any, n: int, alpha: float) -> np.ndarray:
    """The smallest true mean p at which an observed mean `share` of n is not yet unlikely: n KL(share || p) <= ln(1 / alpha).

    From P(observed mean >= q) <= exp(-n KL(q || p)) for q >= p. Rounded towards 0.
    """
    share, cost = np.asarray(share, dtype=np.float64), np.log(1 / alpha) / n
    return _last_true(np.zeros_like(share), share, lambda p: _kl(share, p) >= cost)


def kl_deviation(mean: float, n: int, beta: float) -> float:
    """The value q that the mean of n draws stays above with probability 1 - beta, whose TRUE mean is `mean` or more.

    From P(observed mean <= q) <= exp(-n KL(q || mean)) for q <= mean. 0, which says nothing, where even n zeros are too likely.
    """
    n, beta = checked_count(n, "n0", 1), checked_alpha(beta, "beta")
    cost, top = np.log(1 / beta) / n, np.asarray(mean, dtype=np.float64)
    return float(_last_true(np.zeros_like(top), top, lambda q: _kl(q, top) >= cost))


def _kl(share: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of two coins, in nats."""
    from scipy.special import rel_entr

    made: np.ndarray = rel_entr(share, other) + rel_entr(1 - share, 1 - other)
    return made


def _last_true(low: np.ndarray, high: np.ndarray, holds: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The largest value between where `holds` holds, which it does from `low` up to some point."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        true = holds(middle)
        low, high = np.where(true, middle, low), np.where(true, high, middle)
    return low


METHODS: dict[str, Callable[[Any, float], np.ndarray]] = {
    "betting": betting_lower,
    "kl": kl_lower,
    "bernstein": bernstein_lower,
    "hoeffding": hoeffding_lower,
}


def lower_means(values: Any, alpha: float, methods: Sequence[str] = DEFAULT_METHODS) -> np.ndarray:
    """(n, ...) values to (...) lower bounds, each column's the tightest of `methods` at alpha split evenly among them.

    alpha is each column's own: split it over the columns first where all bounds must hold at once.
    """
    share = checked_alpha(alpha) / len(_known(methods))
    made: np.ndarray = np.max([METHODS[name](values, share) for name in methods], axis=0)
    return made


def upper_means(values: Any, alpha: float, methods: Sequence[str] = DEFAULT_METHODS) -> np.ndarray:
    """As `lower_means`, from above."""
    return 1 - lower_means(1 - unit_values(values), alpha, methods)


def lower_mean(values: Any, alpha: float, methods: Sequence[str] = DEFAULT_METHODS) -> MeanBound:
    """The tightest of several lower bounds at a split alpha, so that all of them hold at once with probability 1 - alpha.

    values: n of them in [0, 1], IN THE ORDER THEY WERE DRAWN: the betting bound reads them one after another, and an order
    made from the values (sorted ones) would void it. Raises ConfigError.
    """
    values = _line(values)
    split = {name: checked_alpha(alpha) / len(methods) for name in _known(methods)}
    each = {name: float(METHODS[name](values, share)) for name, share in split.items()}
    best = max(each, key=lambda name: each[name])
    return MeanBound(each[best], "lower", best, float(values.mean()), len(values), float(alpha), split, each)


def upper_mean(values: Any, alpha: float, methods: Sequence[str] = DEFAULT_METHODS) -> MeanBound:
    """As `lower_mean`, from above."""
    values = _line(values)
    below = lower_mean(1 - values, alpha, methods)
    each = {name: 1 - bound for name, bound in below.each.items()}
    return MeanBound(
        1 - below.value, "upper", below.method, float(values.mean()), len(values), below.alpha, below.split, each
    )


def _line(values: Any) -> np.ndarray:
    found = unit_values(values)
    if found.ndim != 1:
        raise ConfigError(
            f"values have the shape {found.shape}; expected one line of samples (lower_means takes columns)"
        )
    return found


def _known(methods: Sequence[str]) -> Sequence[str]:
    if not methods or len(set(methods)) < len(methods):
        raise ConfigError(f"methods are {tuple(methods)}; expected one or more of {', '.join(METHODS)}, each once")
    for name in methods:
        if name not in METHODS:
            raise ConfigError(f"no confidence bound is called {name!r}; {did_you_mean(name, METHODS)}")
    return methods


# -- shares: Clopper & Pearson (1934), exact ---------------------------------------------------------------------------


def clopper_pearson_lower(hits: int, n: int, alpha: float) -> float:
    """The lower bound, one-sided at alpha, of a probability that came true `hits` times of n. Raises ConfigError."""
    from scipy.stats import beta

    hits, n = _hits(hits, n)
    return float(beta.ppf(checked_alpha(alpha), hits, n - hits + 1)) if hits else 0.0


def clopper_pearson_upper(hits: int, n: int, alpha: float) -> float:
    """The upper bound, one-sided at alpha. Raises ConfigError."""
    from scipy.stats import beta

    hits, n = _hits(hits, n)
    return float(beta.ppf(1 - checked_alpha(alpha), hits + 1, n - hits)) if hits < n else 1.0


def _hits(hits: Any, n: Any) -> tuple[int, int]:
    n = checked_count(n, least=1)
    found = checked_count(hits, "hits", 0)
    if found > n:
        raise ConfigError(f"hits is {hits} of n = {n}; expected as many at most")
    return found, n
