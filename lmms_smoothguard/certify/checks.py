"""Refusals: values that no certificate can be made with."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from lmms_smoothguard.errors import ConfigError


def _number(value: Any) -> float:
    """The value as a float; NaN for what is none, a truth value among them."""
    if isinstance(value, bool | np.bool_):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def checked_sigma(sigma: Any) -> float:
    """A noise level above 0, in the units of the tensor the noise enters. Raises ConfigError."""
    found = _number(sigma)
    if not 0 < found < math.inf:
        raise ConfigError(
            f"sigma is {sigma!r}; expected a number above 0, such as 0.25: without noise nothing is smoothed, and nothing "
            "can be certified"
        )
    return found


def checked_count(count: Any, name: str = "n", least: int = 2) -> int:
    """A number of samples. Raises ConfigError."""
    try:
        found = operator.index(count)
    except TypeError:
        found = -1
    if found < least or isinstance(count, bool):
        raise ConfigError(f"{name} is {count!r}; expected a whole number of samples, {least} at least, such as 1000")
    return found


def checked_alpha(alpha: Any, name: str = "alpha") -> float:
    """A probability of error inside (0, 1). Raises ConfigError."""
    found = _number(alpha)
    if not 0 < found < 1:
        raise ConfigError(
            f"{name} is {alpha!r}; expected a probability of error between 0 and 1, both left out, such as 0.001"
        )
    return found


def checked_radius(radius: Any) -> float:
    """An L2 radius, 0 at least. Raises ConfigError."""
    found = _number(radius)
    if not 0 <= found < math.inf:
        raise ConfigError(f"radius is {radius!r}; expected an L2 norm, 0 or more, in the units of sigma, such as 0.25")
    return found


def checked_score(score: Any, name: str = "score") -> float:
    """A similarity in [-1, 1]. Raises ConfigError."""
    found = _number(score)
    if not -1 <= found <= 1:
        raise ConfigError(f"{name} is {score!r}; expected an inner product of unit vectors, between -1 and 1")
    return found


def unit_values(values: Iterable[Any] | np.ndarray) -> np.ndarray:
    """(n, ...) values in [0, 1] as float64, two at least. Raises ConfigError."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim == 0:
        raise ConfigError(f"values is the number {values!r}; expected a list of samples")
    checked_count(len(found), "the number of values")
    if not bool(((found >= 0) & (found <= 1)).all()):
        strange = found[~((found >= 0) & (found <= 1))][0]
        raise ConfigError(
            f"a value is {strange}; expected all of them in [0, 1]: map an inner product z to (1 + z) / 2 first"
        )
    return found


def unit_rows(features: Any, name: str = "features") -> np.ndarray:
    """(..., d) features, each row of them brought to length 1, as float64.

    Raises ConfigError for rows that have no direction: zero, NaN or infinite ones.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim == 0 or rows.size == 0:
        raise ConfigError(f"{name} have the shape {rows.shape}; expected (tokens, width), neither of them 0")
    if not bool(np.isfinite(rows).all()):
        raise ConfigError(
            f"{name} have values that are not finite; expected finite ones: run the encoder in float32 or bfloat16 "
            "(float16 overflows)"
        )
    # A largest entry of 1 first: squares of very small and very large ones would leave the range of numbers.
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    if not bool((largest > 0).all()):
        dead = int((largest == 0).sum())
        raise ConfigError(
            f"{name} have {dead} zero rows of {largest.size}; a zero feature has no direction, and no cosine can be "
            "certified: leave such tokens out, or take another layer"
        )
    rows = rows / largest
    made: np.ndarray = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return made
