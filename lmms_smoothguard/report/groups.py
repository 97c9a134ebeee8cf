"""The copies' answers and their clusters, lettered for a reader: A is the group whose answer was returned."""

from __future__ import annotations

import string
from collections import Counter
from typing import NamedTuple

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.runs import Sample

_LOOKS = "ABCDEFG"


class Answer(NamedTuple):
    """One copy's answer; `copy` 0 is the clean input where there is one, noisy copies count from 1.

    `letter` tells groups apart; `look`, A to G, names a colour and an outline, which repeat from the eighth group on.
    """

    copy: int
    is_noisy: bool
    letter: str
    look: str
    text: str


class Group(NamedTuple):
    """A cluster of answers: its letter, its size, and its most frequent text."""

    letter: str
    look: str
    size: int
    text: str


def groups_of(sample: Sample) -> tuple[list[Answer], list[Group]]:
    """The answers of a defended sample, and its groups: the winning one first, then by size.

    Raises SmoothGuardError for a log without candidates, or whose answer is none of them.
    """
    texts, labels = sample.info.get("candidates"), sample.info.get("labels")
    if not texts or labels is None or len(texts) != len(labels):
        raise SmoothGuardError(
            f"sample {sample.question_id} has no labelled candidates in its log; expected a defended run"
        )
    winner = next(
        (label for text, label in zip(texts, labels, strict=True) if _same(text, sample.answer)),
        None,
    )
    if winner is None:
        raise SmoothGuardError(
            f"sample {sample.question_id} answered {sample.answer!r}, which is none of its candidates"
        )
    sizes = Counter(labels)
    order = sorted(sizes, key=lambda label: (label != winner, -sizes[label], label))
    marks = {label: (_letter(place), _LOOKS[place % len(_LOOKS)]) for place, label in enumerate(order)}
    # Without a clean copy suspicion is undefined, and every answer is of a noisy copy.
    first = 0 if sample.info.get("suspicion") is not None else 1
    answers = [
        Answer(number, number > 0, *marks[label], text.strip())
        for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=first)
    ]
    groups = []
    for label in order:
        texts_here = [answer.text for answer in answers if answer.letter == marks[label][0]]
        groups.append(Group(*marks[label], sizes[label], Counter(texts_here).most_common(1)[0][0]))
    return answers, groups


def _same(one: str, other: str) -> bool:
    return normalize_answer(one) == normalize_answer(other)


def _letter(place: int) -> str:
    """A to Z, then A2 and so on."""
    turn, place = divmod(place, 26)
    return string.ascii_uppercase[place] + (str(turn + 1) if turn else "")
