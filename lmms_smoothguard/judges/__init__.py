"""Judges: a question and its answer in, a judgement out.

One is named as users write it: `refusal`, `guard/<hub id or directory>`, `llm/<model name>`, `<registered name>/<argument>`;
`lmms_smoothguard.judges.loading` turns names into judges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable


class Verdict(StrEnum):
    """What a judge found. The last two are no opinion: they are counted and shown, never taken for one of the first two.

    unparseable: the judge spoke, but its verdict could not be read. unjudged: it could not be reached, or failed.
    """

    SAFE = "safe"
    UNSAFE = "unsafe"
    UNPARSEABLE = "unparseable"
    UNJUDGED = "unjudged"


@dataclasses.dataclass(frozen=True)
class Judgement:
    """`verdict`: a Verdict or its name; `reason`: what decided it, for the log; `category`: the kind of harm, where the judge
    names one. Raises ValueError for another verdict."""

    verdict: Verdict
    reason: str = ""
    category: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "verdict", Verdict(self.verdict))

    @property
    def safe(self) -> bool:
        """Whether the verdict is `safe`; not the opposite of `unsafe`, see `Verdict`."""
        return self.verdict is Verdict.SAFE

    def to_dict(self) -> dict[str, str | None]:
        """Ready for JSON."""
        return {"verdict": str(self.verdict), "reason": self.reason, "category": self.category}


class Exchange(NamedTuple):
    """What is judged: an answer in the light of its question."""

    question: str
    answer: str


class Judge(Protocol):
    """Anything that judges an answer in the light of its question.

    It may have a `version` (a str): what has to be the same for two rates to be comparable. It stands in the log.
    """

    def judge(self, question: str, answer: str) -> Judgement: ...


@runtime_checkable
class BatchJudge(Judge, Protocol):
    """A judge that is faster with many exchanges at once; `judge_batch` gives one judgement each, in their order."""

    def judge_batch(self, exchanges: Sequence[Exchange]) -> Sequence[Judgement]: ...
