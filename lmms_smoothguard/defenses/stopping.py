"""When the copies answered so far settle the answer: rules for `early_stop`.

An answer that more than half of ALL copies share wins before any aggregator is asked (`aggregation.verdict.aggregate`),
so that much alone decides. Answers are compared as aggregation compares them, in the order of the copies.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence

Decides = Callable[[Sequence[str], int], bool]
"""(the first answers, N) -> whether no further copy is needed."""


def stop_rule(early_stop: str | float) -> Decides:
    """The rule of a config's `early_stop`: "off", "exact" or an error rate."""
    if early_stop == "off":
        return lambda answers, total: len(answers) >= total
    if early_stop == "exact":
        return exact
    return functools.partial(at_error_rate, alpha=float(early_stop))


def exact(answers: Sequence[str], total: int) -> bool:
    """One answer has more than half of all copies, whatever the remaining ones say; or none remain."""
    return len(answers) >= total or 2 * Counter(answers).most_common(1)[0][1] > total


def at_error_rate(answers: Sequence[str], total: int, *, alpha: float) -> bool:
    """`exact`, or a sequential test that copy 0's answer will have more than half of all copies.

    The noisy copies are exchangeable for whoever does not know the seed of the noise, so the number of matches among those seen is hypergeometric. If K of the
    M = N - 1 others match copy 0 and that is too few for a majority, the likelihood ratio of a fixed mixture of larger K
    against the likeliest such K is an e-process: the probability that it EVER reaches 1 / alpha is at most alpha (Ville).
    Copy 0 is the reference because it is chosen without looking at the others; under attack, where it is the poisoned
    one, the test keeps quiet and the exact rule decides. Without a clean copy, copy 0 is just the first noisy one.
    """
    if exact(answers, total):
        return True
    matches = sum(answer == answers[0] for answer in answers[1:])
    return _evidence(matches, len(answers) - 1 - matches, total) >= math.log(1 / alpha)


def stopping_point(answers: Sequence[str], total: int, decides: Decides) -> int | None:
    """The first number of copies that settles the answer, None if these do not. Never depends on how they were batched."""
    return next((count for count in range(1, len(answers) + 1) if decides(answers[:count], total)), None)


def fewest_more(answers: Sequence[str], total: int, decides: Decides) -> int:
    """The fewest further copies that could settle the answer, should they all agree with those before."""
    if not answers:
        return next(count for count in range(1, total + 1) if decides(["same"] * count, total))
    hopes = {answers[0], Counter(answers).most_common(1)[0][0]}
    left = total - len(answers)
    return next(
        count for count in range(1, left + 1) if any(decides([*answers, *[hope] * count], total) for hope in hopes)
    )


_ON_UNANIMITY = 0.95  # weight of "all match"; most clean requests are like that, and only they can stop much earlier


@functools.lru_cache(maxsize=4096)
def _evidence(matches: int, others: int, total: int) -> float:
    """The e-process's logarithm after so many matches with copy 0 and others, N = `total` copies in all."""
    pool = total - 1
    too_few = total // 2 - 1  # the largest K with 2 (K + 1) <= N
    alternatives = range(too_few + 1, pool + 1)
    if too_few < 0 or not alternatives:
        return -math.inf
    rest = len(alternatives) - 1
    weights = [_ON_UNANIMITY if k == pool and rest else (1 - _ON_UNANIMITY) / rest if rest else 1 for k in alternatives]
    mixture = sum(
        weight * math.exp(_likelihood(k, matches, others, pool))
        for weight, k in zip(weights, alternatives, strict=True)
    )
    null = max(_likelihood(k, matches, others, pool) for k in range(too_few + 1))
    if mixture == 0:
        return -math.inf
    return math.log(mixture) - null if null > -math.inf else math.inf


def _likelihood(matching: int, matches: int, others: int, pool: int) -> float:
    """log P(this very sequence) when `matching` of `pool` copies match, drawn without replacement."""
    return (
        _log_falling(matching, matches) + _log_falling(pool - matching, others) - _log_falling(pool, matches + others)
    )


def _log_falling(start: int, count: int) -> float:
    """log of start (start - 1) ... (start - count + 1)."""
    if count > start:
        return -math.inf
    return math.lgamma(start + 1) - math.lgamma(start - count + 1)
