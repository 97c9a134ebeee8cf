"""POPE's five figures (Li et al. 2023, section 5) on yes / no questions, each with a 95 % interval."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

import numpy as np

from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.rates import rate, wilson
from lmms_smoothguard.evaluation.resampling import RESAMPLES, bootstrap_interval, group_sums, mean_size


def yes_or_no(answer: str) -> bool | None:
    """Whether an answer's first word is yes (True) or no (False), in any case; None for any other."""
    word = re.match(r"\W*(\w+)", answer.casefold())
    return {"yes": True, "no": False}.get(word[1]) if word else None


def pope_figures(
    answers: Sequence[str],
    targets: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Figure]:
    """accuracy, precision, recall, f1 and yes_ratio of answers to questions whose right answers are `targets`.

    "yes" is the positive class. Precision TP / (TP + FP); recall TP over ALL questions whose answer is yes; F1 their harmonic
    mean 2 TP / (2 TP + FP + FN). An answer that is neither is wrong, not a yes, and so a miss where yes was right:
    lmms-eval's own scorer leaves it out of recall, and takes its yes ratio from the right answers. Intervals: Wilson's for
    the four proportions; for F1 a bootstrap over `groups` (scenes; without them, questions). None where there is nothing
    to divide by. Raises ValueError for a target that is neither yes nor no.
    """
    said, right = [yes_or_no(answer) for answer in answers], [yes_or_no(target) for target in targets]
    if None in right:
        raise ValueError(f"target {targets[right.index(None)]!r} is neither yes nor no; expected a yes / no question")
    pairs = list(zip(said, right, strict=True))
    return {
        "accuracy": rate(one is other for one, other in pairs).figure(),
        "precision": rate(bool(truth) for word, truth in pairs if word).figure(),
        "recall": rate(word is True for word, truth in pairs if truth).figure(),
        "f1": _f1(pairs, list(range(len(pairs))) if groups is None else groups, seed, resamples),
        "yes_ratio": rate(word is True for word, _ in pairs).figure(),
    }


def _f1(pairs: Sequence[tuple[bool | None, bool | None]], groups: Sequence[Hashable], seed: int, times: int) -> Figure:
    """F1 = 2 J / (1 + J) with J = TP / (TP + FP + FN). The resampled groups have two more among them, one with errors alone and
    one with hits alone, as many as groups that have any have on average; where there are no errors, or no hits, at all,
    J's Wilson interval over the groups that count."""
    hits = [float(word is True and truth is True) for word, truth in pairs]
    errors = [float((word is True) is not truth) for word, truth in pairs]
    sums = group_sums([hits, errors], groups)
    sums = sums[:, sums.sum(0) > 0]  # a right no is in none of F1's terms
    counted, method = int(sums.sum()), f"F1, bootstrap over groups, {times} resamples, seed {seed}"
    if not counted:
        return Figure(value=None, low=None, high=None, count=0, groups=0, method=method)
    total = sums.sum(1)
    value = float(2 * total[0] / (2 * total[0] + total[1]))
    if not total.all():
        method = "F1, all right or all wrong: Wilson of TP / (TP + FP + FN) over groups"
        low, high = (2 * end / (1 + end) for end in wilson(float(value > 0), sums.shape[1]))
    else:
        more = np.diag([mean_size(sums[0]), mean_size(sums[1])])
        low, high = bootstrap_interval(np.append(sums, more, axis=1), _f1_of, seed, times)
    return Figure(value=value, low=low, high=high, count=counted, groups=sums.shape[1], method=method)


def _f1_of(totals: np.ndarray) -> np.ndarray:
    return np.asarray(2 * totals[0] / (2 * totals[0] + totals[1]))
