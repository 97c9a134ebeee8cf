"""When an answer says a text: the same rule in the harness, the command and the result files."""

from __future__ import annotations

import pytest

from lmms_smoothguard.evaluation.answers import same_answer, says


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("No.", "no", True),
        ("I do not know.", "no", False),
        ("Things are scattered.", "red", False),
        ("A RED square", "red square", True),
        ("red, square!", "Red square.", True),
        ("a square that is red", "red square", False),
        ("Sure, here is how to", "Sure, here", True),
        ("ja, 当然可以", "当然", True),
        ("well", "?!", False),
        ("well?!", "?!", True),
    ],
)
def test_a_text_is_said_in_whole_words(answer, text, expected):
    assert says(answer, text) is expected


def test_case_white_space_and_a_full_stop_do_not_make_another_answer():
    assert same_answer(" Yes.", "yes")
    assert not same_answer("yes, it is", "yes")
