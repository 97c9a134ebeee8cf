"""Answers in any order and not all of them: when the matter is settled, by whom, and what the verdict is then."""

from __future__ import annotations

import itertools

import pytest

from lmms_smoothguard.blackbox.ballot import Ballot
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.defenses.stopping import stop_rule, stopping_point


def ballot(early_stop="off", copies=5, quorum=3, **fields):
    return Ballot(SmoothGuardConfig(num_samples=copies, early_stop=early_stop, noise_space="pixel", **fields), quorum)


def fill(votes, answers):
    for copy, answer in answers:
        votes.add(copy, answer)
    return votes


def test_without_early_stopping_every_copy_is_waited_for():
    votes = fill(ballot(), enumerate("yyyy"))
    assert not votes.settled
    votes.fail(4)
    assert votes.settled
    verdict, copies = votes.verdict()
    assert (copies, verdict.agreement, votes.answered, votes.failed) == ([0, 1, 2, 3], 1.0, 4, 1)


@pytest.mark.parametrize("order", list(itertools.permutations(range(5)))[::7])
def test_more_than_half_of_all_settle_it_in_any_order(order):
    answers = ["no", "Yes", "yes.", "YES", "no"]
    votes = ballot("exact")
    for place, copy in enumerate(order):
        votes.add(copy, answers[copy])
        seen = [answers[number].lower().rstrip(".") for number in order[: place + 1]]
        assert votes.settled == (max(map(seen.count, seen)) >= 3 or place == 4)
    verdict, copies = votes.verdict()
    assert answers[copies[verdict.chosen]].lower().startswith("yes")


def test_the_verdict_does_not_hang_on_the_order():
    found = set()
    for order in itertools.permutations(range(4)):
        verdict, copies = fill(ballot(copies=4), [(copy, ["a", "b", "b", "a"][copy]) for copy in order]).verdict()
        found.add((verdict.chosen, verdict.labels, tuple(copies)))
    assert len(found) == 1


def test_a_rule_that_bears_errors_sees_the_first_copies_alone():
    """Ten copies, nine of which agree: whichever came, nothing is settled while copy 0 is missing but by more than half."""
    rule = stop_rule(0.05)
    enough = stopping_point(["yes"] * 10, 10, rule)
    assert enough < 6  # else it would be no other rule than exact
    late = ballot(0.05, copies=10, quorum=6)
    for copy in range(1, enough + 1):
        late.add(copy, "yes")
    assert not late.settled
    late.add(0, "yes")
    assert late.settled
    verdict, copies = late.verdict()
    assert copies == list(range(enough))  # what came beyond does not count
    assert verdict.agreement == 1


def test_a_failed_copy_ends_what_such_a_rule_sees():
    votes = ballot(0.05, copies=10, quorum=6)
    votes.fail(0)
    for copy in range(1, 6):
        votes.add(copy, "yes")
        assert not votes.settled
    votes.add(6, "yes")
    assert votes.settled  # six of ten: exact
    assert votes.verdict()[0].suspicion is None  # without the clean copy there is nothing to suspect


def test_when_there_is_no_hope():
    votes = ballot()
    votes.fail(0)
    votes.fail(1)
    assert not votes.hopeless
    votes.fail(1)
    assert not votes.hopeless  # told twice, failed once
    votes.fail(2)
    assert votes.hopeless


def test_suspicion_needs_the_clean_copy_to_be_the_first():
    told = list(enumerate(["no", "yes", "yes", "yes", "yes"]))
    verdict, _ = fill(ballot(), told).verdict()
    assert (verdict.suspected, verdict.suspicion) == (True, 1.0)
    without, _ = fill(ballot(include_clean=False), told).verdict()
    assert (without.suspected, without.suspicion) == (False, None)
    with pytest.raises(ValueError, match="no answers"):
        ballot().verdict()
