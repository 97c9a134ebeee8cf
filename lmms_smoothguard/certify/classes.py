"""Prediction-wise certificate: the class a smoothed feature is nearest to, by cosine with unit prototypes u_k.

The smoothed classifier answers argmax_k s_k(x), s_k = <u_k, E g(x + e)> (its norm is common to all k, so this is also the
largest cosine). Selection draws choose y; fresh ones bound, for every other class j,

1. s_y from below and s_j from above: s_y(x + d) > s_j(x + d) where 2 r / sigma < Phi^-1((1 + s_y) / 2) - Phi^-1((1 + s_j) / 2),
   each side moving by r / sigma;
2. <w_j, E g> from below, w_j = (u_y - u_j) / ||u_y - u_j||: it stays above 0, which is s_y > s_j, where
   r / sigma < Phi^-1((1 + <w_j, E g>) / 2).

All bounds hold at once with probability 1 - alpha: half of alpha for each test, split evenly over its bounds (K and K - 1). So
the better test may be taken for every j, and the radius is the smallest over j. The classes must have names that differ: equal
prototypes cannot be told apart, and abstain.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lmms_smoothguard.certify.bounds import DEFAULT_METHODS, lower_means, upper_means
from lmms_smoothguard.certify.checks import checked_alpha, checked_count, checked_radius, checked_sigma, unit_rows
from lmms_smoothguard.certify.gaussian import ABSTAIN, CERTIFIED
from lmms_smoothguard.errors import ConfigError


@dataclass(frozen=True)
class ClassCertificate:
    """With probability 1 - alpha over the n draws: the smoothed classifier answers `label` for every ||d||_2 < radius.

    label, radius: None where it abstains; selected: what the selection draws chose; rival: the class that limits the radius;
    test: which of the two tests gave it, "scores" or "difference"; radius_scores, radius_difference: what each alone would
    give (negative: it abstains); scores: (K,) estimates from the n draws; split: of alpha, per bound of each test.
    """

    status: str
    label: int | None
    radius: float | None
    selected: int
    rival: int
    test: str
    radius_scores: float
    radius_difference: float
    scores: tuple[float, ...]
    sigma: float
    n: int
    n_selection: int
    alpha: float
    split: dict[str, float]
    methods: tuple[str, ...]

    def at(self, radius: float) -> str:
        """`certified` where the answer cannot change within `radius`, else ABSTAIN."""
        checked_radius(radius)
        return CERTIFIED if self.radius is not None and radius < self.radius else ABSTAIN

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def certify_class(
    selection: Any,
    estimation: Any,
    prototypes: Any,
    *,
    sigma: float,
    alpha: float = 0.001,
    methods: tuple[str, ...] = DEFAULT_METHODS,
) -> ClassCertificate:
    """selection: (n_selection, d) and estimation: (n, d) unit features g(x + e_i), of separate draws; prototypes: (K, d).

    All are brought to length 1. Raises ConfigError.
    """
    sigma, alpha = checked_sigma(sigma), checked_alpha(alpha)
    named = unit_rows(prototypes, "prototypes")
    if named.ndim != 2 or len(named) < 2:
        raise ConfigError(f"prototypes have the shape {named.shape}; expected (classes, width), two classes at least")
    chosen, fresh = _draws(selection, "selection", named, 1), _draws(estimation, "estimation", named, 2)
    selected = int((chosen @ named.T).mean(0).argmax())
    return _certified(selected, len(chosen), fresh, named, sigma, alpha, methods)


def _certified(
    selected: int,
    n_selection: int,
    fresh: np.ndarray,
    named: np.ndarray,
    sigma: float,
    alpha: float,
    methods: tuple[str, ...],
) -> ClassCertificate:
    from scipy.special import ndtri

    inner = (fresh @ named.T).clip(-1, 1)
    rivals = np.array([k for k in range(len(named)) if k != selected])
    split = {"scores": alpha / 2 / len(named), "difference": alpha / 2 / len(rivals)}
    own = lower_means((1 + inner[:, [selected]]) / 2, split["scores"], methods)
    others = upper_means((1 + inner[:, rivals]) / 2, split["scores"], methods)
    by_scores = sigma / 2 * (ndtri(own) - ndtri(others))
    apart = np.linalg.norm(named[selected] - named[rivals], axis=1)
    # Equal prototypes have no direction between them; as an inner product of -1 they abstain.
    steps = np.where(apart > 0, (inner[:, [selected]] - inner[:, rivals]) / np.where(apart > 0, apart, 1), -1.0)
    by_difference = sigma * ndtri(lower_means((1 + steps.clip(-1, 1)) / 2, split["difference"], methods))
    best = np.maximum(by_scores, by_difference)
    worst = int(best.argmin())
    radius = float(best[worst])
    certified = radius > 0
    return ClassCertificate(
        status=CERTIFIED if certified else ABSTAIN,
        label=selected if certified else None,
        radius=radius if certified else None,
        selected=selected,
        rival=int(rivals[worst]),
        test="scores" if by_scores[worst] >= by_difference[worst] else "difference",
        radius_scores=float(by_scores.min()),
        radius_difference=float(by_difference.min()),
        scores=tuple(float(score) for score in inner.mean(0)),
        sigma=sigma,
        n=len(fresh),
        n_selection=n_selection,
        alpha=alpha,
        split=split,
        methods=tuple(methods),
    )


def largest_class_radius(
    n: int, alpha: float, sigma: float, classes: int, methods: tuple[str, ...] = DEFAULT_METHODS
) -> float:
    """The largest radius that n draws can certify at alpha among so many classes. Raises ConfigError."""
    from scipy.special import ndtri

    sigma, classes = checked_sigma(sigma), checked_count(classes, "classes", 2)
    ones = np.ones(checked_count(n))
    share = checked_alpha(alpha) / 2
    best = max(float(lower_means(ones, share / count, methods)) for count in (classes, classes - 1))
    return float(sigma * ndtri(best))


def _draws(features: Any, name: str, named: np.ndarray, least: int) -> np.ndarray:
    rows = unit_rows(features, f"{name} features")
    if rows.ndim != 2 or rows.shape[1] != named.shape[1]:
        raise ConfigError(
            f"{name} features have the shape {rows.shape}; expected (draws, {named.shape[1]}), as wide as the prototypes"
        )
    checked_count(len(rows), f"the number of {name} draws", least)
    return rows
