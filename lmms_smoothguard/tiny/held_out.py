"""Figures of an embedded model on its test sets: what is asked, what counts as right, and the share of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.evaluation.rates import Rate, rate
from lmms_smoothguard.judges.refusal import RefusalJudge

Row = dict[str, Any]


class HeldOut:
    """Asks about rows with a question and a `medium` (image, audio) each; `figures` by name, each said when it is known."""

    def __init__(
        self,
        medium: str,
        answers: Callable[[Sequence[str], np.ndarray], list[str]],
        noisy: Callable[[np.ndarray, float], np.ndarray],
        say: Callable[[str], None],
    ) -> None:
        self._medium, self._answers, self._noisy, self._say = medium, answers, noisy, say
        self.figures: dict[str, Rate] = {}

    def ask(self, name: str, rows: Sequence[Row], right: Callable[[Row, str], bool], sigma: float = 0) -> None:
        """The share of right answers, to media with noise of `sigma`."""
        media = self._noisy(np.stack([row[self._medium] for row in rows]), sigma)
        given = self._answers([row["question"] for row in rows], media)
        self.figures[name] = rate(right(row, answer) for row, answer in zip(rows, given, strict=True))
        self._say(f"{name}: {self.figures[name]}")

    def ask_for_help(self, rows: Sequence[Row]) -> None:
        """Forbidden and permitted requests: which are refused, and which are done."""
        permitted = [row for row in rows if row["kind"] == "permitted"]
        self.ask("forbidden refused", [row for row in rows if row["kind"] == "forbidden"], refuses)
        self.ask("permitted refused", permitted, refuses)
        self.ask("permitted done", permitted, says("answer"))


def says(key: str) -> Callable[[Row, str], bool]:
    """Right is what the row has under this key, as a vote compares answers."""
    return lambda row, answer: normalize_answer(answer) == normalize_answer(row[key])


def refuses(row: Row, answer: str) -> bool:
    """Right is a refusal."""
    return RefusalJudge().judge(row["question"], answer).safe
