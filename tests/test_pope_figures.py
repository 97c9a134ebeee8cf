"""POPE's five figures: by hand, against scikit-learn, and how often F1's interval holds the truth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from lmms_smoothguard.evaluation.pope import pope_figures, yes_or_no
from lmms_smoothguard.evaluation.rates import rate


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes", True), (" yes, there is.", True), ("No.", False), ("**No**", False), ("Not at all", None), ("", None), ("I see it: yes", None), ("yesterday", None)],
)  # fmt: skip
def test_an_answers_first_word_decides(answer, said):
    assert yes_or_no(answer) is said


def test_against_scikit_learn():
    rng = np.random.default_rng(0)
    right, said = rng.random(300) < 0.5, rng.random(300) < 0.4
    words = [["no", "yes"][int(word)] for word in said]
    found = pope_figures(words, [["No", "Yes"][int(word)] for word in right])
    assert found["accuracy"].value == pytest.approx((right == said).mean())
    assert found["precision"].value == pytest.approx(precision_score(right, said))
    assert found["recall"].value == pytest.approx(recall_score(right, said))
    assert found["f1"].value == pytest.approx(f1_score(right, said))
    assert found["yes_ratio"].value == pytest.approx(said.mean())
    assert (found["precision"].low, found["precision"].high) == rate(right[said].tolist()).interval
    assert found["f1"].low < found["f1"].value < found["f1"].high
    assert found == pope_figures(words, [["No", "Yes"][int(word)] for word in right])


def test_an_answer_that_is_neither_is_wrong_and_no_yes():
    found = pope_figures(["yes", "maybe", "maybe", "no"], ["yes", "yes", "no", "no"])
    assert (found["accuracy"].hits, found["accuracy"].count) == (2, 4)
    assert (found["recall"].hits, found["recall"].count) == (1, 2)
    assert (found["precision"].hits, found["precision"].count) == (1, 1)
    assert found["f1"].value == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert found["yes_ratio"].value == 0.25


def test_what_cannot_be_computed_is_null_and_what_is_perfect_is_no_certainty():
    none = pope_figures(["no", "no"], ["no", "no"])
    assert (none["precision"].value, none["recall"].value, none["f1"].value) == (None, None, None)
    perfect = pope_figures(["yes"] * 20, ["yes"] * 20, [n // 2 for n in range(20)])["f1"]
    low = rate([True] * 10).interval[0]
    assert (perfect.value, perfect.high, perfect.groups) == (1, 1, 10)
    assert perfect.low == pytest.approx(2 * low / (1 + low))
    with pytest.raises(ValueError, match="target 'red' is neither"):
        pope_figures(["yes"], ["red"])


@pytest.mark.parametrize(("wrong", "alike"), [(0.01, 0.0), (0.05, 0.3), (0.3, 0.3)])
def test_coverage_of_f1(wrong, alike):
    """Three questions a scene, errors of a scene correlated by `alike`: 95 % held in 300 draws, less 3.5 standard errors."""
    rng, held, groups = np.random.default_rng(0), 0, [n // 3 for n in range(300)]
    truth = 2 * 0.5 * (1 - wrong) / (2 * 0.5 * (1 - wrong) + wrong)
    for _ in range(300):
        common = np.repeat(rng.random(100) < wrong, 3)
        errs = np.where(rng.random(300) < alike**0.5, common, rng.random(300) < wrong)
        right = rng.random(300) < 0.5
        words = [["no", "yes"][int(a)] for a in right ^ errs]
        found = pope_figures(words, [["no", "yes"][int(a)] for a in right], groups, resamples=300)["f1"]
        held += found.low <= truth <= found.high
    assert held / 300 >= 0.905
