"""Suspicion as a detector of attacks: its AUROC with an interval, and its curve."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from lmms_smoothguard.evaluation.figures import Figure, finite
from lmms_smoothguard.evaluation.rates import Rate


def detection_auroc(clean: Sequence[float], attacked: Sequence[float]) -> float:
    """How well suspicion separates attacked from clean inputs; NaN where one kind is missing."""
    if not clean or not attacked:
        return float("nan")
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([0] * len(clean) + [1] * len(attacked), [*clean, *attacked]))


@dataclass(frozen=True)
class Detection:
    """A detector's AUROC over `clean` and `attacked` samples, with a 95 % interval over `groups` independent groups."""

    auroc: float
    low: float
    high: float
    clean: int
    attacked: int
    groups: int
    method: str = "DeLong's variance summed over groups (Obuchowski 1997), t interval on the logit"

    def figure(self) -> Figure:
        """As result files have it; `count` is that of clean and attacked samples together."""
        return Figure(
            value=finite(self.auroc),
            low=finite(self.low),
            high=finite(self.high),
            count=self.clean + self.attacked,
            groups=self.groups,
            method=f"AUROC, {self.method}",
        )


def detection(
    clean: Sequence[float],
    attacked: Sequence[float],
    clean_groups: Sequence[Hashable] | None = None,
    attacked_groups: Sequence[Hashable] | None = None,
) -> Detection:
    """AUROC of a score (more = attacked) with a 95 % interval.

    `*_groups`: what each sample belongs to, such as its scene. Samples of one group, clean and attacked, may depend on
    each other; groups may not. Without them every sample is a group of its own. Variance: DeLong et al. (1988), summed
    over groups as in Obuchowski (1997); interval: Student's t on the logit, so that it stays inside [0, 1]. Where the
    variance is 0 (perfect separation, one value alone) it is Wilson's interval of as many trials as there are pairs of
    a clean and an attacked sample with no group in common. Raises ValueError when a list of groups does not fit, or only one of the two is given.
    """
    if (clean_groups is None) != (attacked_groups is None):
        raise ValueError(
            "groups of one kind of sample only; expected both clean_groups and attacked_groups, or neither"
        )
    if clean_groups is None or attacked_groups is None:
        clean_groups, attacked_groups = range(len(clean)), range(len(clean), len(clean) + len(attacked))
    if len(clean_groups) != len(clean) or len(attacked_groups) != len(attacked):
        raise ValueError(
            f"{len(clean_groups)} and {len(attacked_groups)} groups for {len(clean)} clean and {len(attacked)} attacked "
            "samples; expected one for each"
        )
    numbers = {group: number for number, group in enumerate(dict.fromkeys([*clean_groups, *attacked_groups]))}
    value = detection_auroc(clean, attacked)
    if not clean or not attacked:
        return Detection(value, value, value, len(clean), len(attacked), len(numbers))
    # Each sample's share in AUROC's deviation; those of one group add up before they are squared.
    parts = np.zeros((2, len(numbers)))
    for part, groups, shares in zip(parts, (clean_groups, attacked_groups), _placements(clean, attacked), strict=True):
        np.add.at(part, [numbers[group] for group in groups], (shares - value) / len(shares))
    kinds = len(set(clean_groups)), len(set(attacked_groups))
    low, high = _logit_interval(value, parts, kinds)
    if np.isclose(parts.sum(0), 0, atol=1e-12).all():
        pairs = max(1, min(*kinds, len(numbers) // 2))
        low, high = Rate(round(value * pairs), pairs).interval
    return Detection(value, low, high, len(clean), len(attacked), len(numbers))


def _placements(clean: Sequence[float], attacked: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's components: of each clean sample, the share of attacked ones above it; of each attacked one, the share of
    clean ones below it. A tie counts half."""
    from scipy.stats import rankdata

    together, count = rankdata([*clean, *attacked]), len(clean)
    below_clean = together[:count] - rankdata(clean)
    below_attacked = together[count:] - rankdata(attacked)
    return 1 - below_clean / len(attacked), below_attacked / count


def _logit_interval(value: float, parts: np.ndarray, kinds: tuple[int, int]) -> tuple[float, float]:
    """parts: (2, groups), clean and attacked samples' deviations; kinds: groups that have samples of each kind."""
    from scipy.special import expit, logit
    from scipy.stats import t

    groups, fewest = parts.shape[1], min(kinds)
    if fewest < 2 or not 0 < value < 1:
        return 0.0, 1.0
    own = sum(float(part @ part) * count / (count - 1) for part, count in zip(parts, kinds, strict=True))
    variance = max(0.0, own + 2 * float(parts[0] @ parts[1]) * groups / (groups - 1))
    half = t.ppf(0.975, fewest - 1) * variance**0.5 / (value * (1 - value))
    return float(expit(logit(value) - half)), float(expit(logit(value) + half))


def roc_points(clean: Sequence[float], attacked: Sequence[float]) -> list[tuple[float, float, float]]:
    """(threshold, false alarms among clean, found among attacked), one for every value that occurs, from (0, 0) to (1, 1).

    Raises ValueError where one kind is missing.
    """
    if not clean or not attacked:
        raise ValueError(f"{len(clean)} clean and {len(attacked)} attacked samples; expected at least one of each")
    from sklearn.metrics import roc_curve

    false, true, thresholds = roc_curve(
        [0] * len(clean) + [1] * len(attacked), [*clean, *attacked], drop_intermediate=False
    )
    return [(float(h), float(f), float(t)) for h, f, t in zip(thresholds, false, true, strict=True)]
