"""A confidence bound by betting: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting" (2023).

A gambler starts with 1 and bets, value after value, that the mean is above m: capital K_t(m) = prod (1 + l_i (x_i - m)). Each
stake l_i >= 0 hangs on the values before it alone (their "predictable plug-in"), so if the mean is m or less the
capital is a nonnegative supermartingale, and by Ville's inequality P(max_t K_t(m) >= 1 / alpha) <= alpha. The bound is the
largest m that makes it so rich: with l_i = min(plug-in, c / m) every factor falls as m grows, so those m are [0, bound].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmms_smoothguard.certify.checks import checked_alpha, unit_values

_CAP = 0.9
"""c: the share of the capital that one value can lose. Of .5, .75, .9, .95, .99, at n = 1,000: .9 and more are tightest where
values vary little (features of a good smoother), .75 and less for coins, where the KL bound beside it serves as well."""
_HALVINGS = 50


def betting_lower(values: Any, alpha: float) -> np.ndarray:
    """(n, ...) values in the order they were drawn, to (...) lower bounds of their means, rounded towards 0.

    The order must not hang on the values themselves. Raises ConfigError.
    """
    values, alpha = unit_values(values), checked_alpha(alpha)
    goal = np.log(1 / alpha)
    stakes = _plug_in(values, goal)
    low, high = np.zeros(values.shape[1:]), np.ones(values.shape[1:])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        gains = np.log1p(np.minimum(stakes, _CAP / middle) * (values - middle))
        rich = gains.cumsum(0).max(0) >= goal
        low, high = np.where(rich, middle, low), np.where(rich, high, middle)
    # Early luck may prove more than the whole sample does; a lower bound above the mean would only puzzle.
    made: np.ndarray = np.minimum(low, values.mean(0))
    return made


def _plug_in(values: np.ndarray, goal: float) -> np.ndarray:
    """Stakes sqrt(2 ln(1 / alpha) / (n variance so far)): best for this n if the variance stayed; starts from mean 1/2 and
    variance 1/4, as they do."""
    n = len(values)
    number = np.arange(1, n + 1, dtype=np.float64).reshape(-1, *[1] * (values.ndim - 1))
    means = (0.5 + values.cumsum(0)) / (number + 1)
    variances = (0.25 + ((values - means) ** 2).cumsum(0)) / (number + 1)
    before = np.concatenate([np.full_like(variances[:1], 0.25), variances[:-1]])
    made: np.ndarray = np.sqrt(2 * goal / (n * before))
    return made
