"""`early_stop`: what it may never change, how often it may be wrong, and how much it saves."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from lmms_smoothguard.aggregation.embedders import EmbedderContext, lexical
from lmms_smoothguard.aggregation.verdict import aggregate
from lmms_smoothguard.defenses.stopping import fewest_more, stop_rule, stopping_point

WORDS = ("yes", "no", "a red star", "a red square", "a blue circle", "two stars", "nothing")


def sequences(count, seed):
    """(answers, N): from unanimous to wild, N from 1 to 15."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        total, kinds = int(generator.integers(1, 16)), int(generator.integers(1, len(WORDS) + 1))
        shares = generator.dirichlet(np.full(kinds, generator.choice([0.1, 0.5, 2.0])))
        yield [WORDS[i] for i in generator.choice(kinds, total, p=shares)], total


@pytest.mark.parametrize("aggregator", ["vote", "medoid", "kmeans"])
@pytest.mark.parametrize("clean_first", [True, False])
def test_exact_stopping_never_changes_the_answer(aggregator, clean_first):
    count = {"kmeans": 300}.get(aggregator, 2500)
    decides, stopped = stop_rule("exact"), 0
    for answers, total in sequences(count, seed=1):
        settled = stopping_point(answers, total, decides)
        assert settled is not None

        def winner(listed):
            verdict = aggregate(
                listed, lambda: lexical(EmbedderContext()), aggregator=aggregator, clean_first=clean_first
            )
            return verdict.chosen

        assert winner(answers[:settled]) == winner(answers)
        stopped += settled < total
    assert stopped > count / 10


@pytest.mark.parametrize("total", [10, 11, 50])
@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_the_error_rate_holds_where_it_is_hardest_to_hold(total, alpha):
    """One too few of the copies agree with copy 0, so any early stop for it is wrong; random orders."""
    generator, trials, decides = np.random.default_rng(total), 6000, stop_rule(alpha)
    matching = total // 2 - 1  # of the others; with copy 0 they are exactly half, or just below
    wrong = 0
    for _ in range(trials):
        others = generator.permutation(["a"] * matching + ["b"] * (total - 1 - matching))
        answers = ["a", *others.tolist()]
        settled = stopping_point(answers, total, decides)
        wrong += (
            settled < total and aggregate(answers[:settled], _unused).chosen == 0 and answers.count("a") * 2 <= total
        )
    assert wrong <= binom.ppf(0.9999, trials, alpha)
    if alpha == 0.2:
        assert wrong > 0  # the test does stop early here, so the bound was put to the test


def test_the_error_rate_holds_for_random_answers():
    """Answers drawn from a distribution near the edge: early and full answers differ in at most alpha of the requests."""
    generator, alpha, trials = np.random.default_rng(3), 0.1, 4000
    decides, differ = stop_rule(alpha), 0
    for _ in range(trials):
        answers = generator.choice(["a", "b", "c"], 20, p=[0.48, 0.42, 0.1]).tolist()
        settled = stopping_point(answers, 20, decides)
        early = aggregate(answers[:settled], _letters, "vote").chosen
        full = aggregate(answers, _letters, "vote").chosen
        differ += answers[early] != answers[full]
    assert differ <= binom.ppf(0.9999, trials, alpha)


@pytest.mark.parametrize(
    ("early_stop", "total", "copies"),
    [("off", 10, 10), ("exact", 10, 6), (0.01, 10, 5), (0.05, 10, 4), ("exact", 50, 26), (0.01, 50, 7), (0.05, 50, 6)],
)
def test_copies_needed_when_all_agree(early_stop, total, copies):
    decides = stop_rule(early_stop)
    assert stopping_point(["a"] * total, total, decides) == copies
    assert fewest_more([], total, decides) == copies


@pytest.mark.parametrize("early_stop", ["off", "exact", 0.05])
def test_fewest_more_is_enough_and_not_too_many(early_stop):
    decides = stop_rule(early_stop)
    for answers, total in sequences(300, seed=5):
        seen = answers[: len(answers) // 2]
        if not seen or stopping_point(seen, total, decides):
            continue
        more = fewest_more(seen, total, decides)
        assert any(stopping_point([*seen, *[hope] * more], total, decides) for hope in seen)
        assert not any(stopping_point([*seen, *[hope] * (more - 1)], total, decides) for hope in seen)


def test_a_poisoned_clean_copy_does_not_stop_early():
    """Under attack only copy 0 says what the attacker wants: the test stays quiet, the exact rule decides for the rest."""
    answers = ["bad"] + ["good"] * 9
    assert stopping_point(answers, 10, stop_rule(0.05)) == 7


def _unused():
    raise AssertionError("two distinct answers need no vectors")


def _letters():
    return lambda texts: np.eye(3)[["abc".index(text) for text in texts]]
