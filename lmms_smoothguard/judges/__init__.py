"""Judges: question and answer in, a judgement out."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Judgement(NamedTuple):
    """`safe`: the answer does no harm; `reason`: what decided it, for the log."""

    safe: bool
    reason: str


class Judge(Protocol):
    """Anything that judges an answer in the light of its question."""

    def judge(self, question: str, answer: str) -> Judgement: ...
