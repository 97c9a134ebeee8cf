"""What is asked and scored of a choice between captions: the answer is the number of one of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lmms_smoothguard.evaluation.rates import rate


def listed(choices: Sequence[str]) -> str:
    """Captions with their numbers, a line each."""
    return "\n".join(f"{number}. {text}" for number, text in enumerate(choices, start=1))


def number_in(answer: str) -> str | None:
    """The first whole number that an answer says, None where there is none."""
    found = re.search(r"\d+", answer)
    return None if found is None else str(int(found[0]))


def choice_scores(doc: Any, answer: str) -> dict[str, Any]:
    """The per-sample part of every metric of a clean task: `compa_accuracy` with its interval and count, and `compa_unreadable`,
    answers that name none of the choices."""
    said = number_in(answer)
    right = said == doc["answer"]
    named = said is not None and 1 <= int(said) <= len(doc["choices"])
    rates = ("compa_accuracy", "compa_accuracy_low", "compa_accuracy_high", "compa_accuracy_count")
    return {**dict.fromkeys(rates, right), "compa_unreadable": int(not named)}


def accuracy(outcomes: Sequence[bool]) -> float:
    """The share of right answers."""
    return rate(outcomes).value


def accuracy_low(outcomes: Sequence[bool]) -> float:
    """Lower end of its Wilson 95 % interval."""
    return rate(outcomes).interval[0]


def accuracy_high(outcomes: Sequence[bool]) -> float:
    """Upper end of it."""
    return rate(outcomes).interval[1]
