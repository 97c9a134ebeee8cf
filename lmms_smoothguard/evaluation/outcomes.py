"""Outcomes of a run's samples by id: what rates, differences and pooled seeds are made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal, TypeVar

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.samples import SampleRecord

T = TypeVar("T")
OutcomeName = Literal["accuracy", "asr", "recovery", "suspected"]


def outcomes(samples: Sequence[SampleRecord], name: OutcomeName) -> dict[str, bool]:
    """The outcomes of ONE task's samples whose share is the rate `name`, by sample id.

    "accuracy": right; "asr": wrong in the end, of those that were right when clean and undefended, and no others;
    "recovery": the undefended clean answer; "suspected". Raises SmoothGuardError where a sample lacks what it takes.
    """
    if len(tasks := sorted({sample.task for sample in samples})) > 1:
        raise SmoothGuardError(f"samples are of the tasks {', '.join(tasks)}; expected those of one task")
    counted = [s for s in samples if name != "asr" or _has(s.clean_right, s, "clean_right")]
    return {sample.id: _OUTCOMES[name](sample) for sample in counted}


def groups_of_samples(samples: Sequence[SampleRecord]) -> dict[str, Hashable]:
    """What each sample belongs to, by id: its group, or itself alone."""
    return {s.id: ("group", s.group) if s.group is not None else ("sample", s.id) for s in samples}


def _has(value: T | None, sample: SampleRecord, field: str) -> T:
    if value is None:
        raise SmoothGuardError(
            f"{sample.run}: {sample.task}[{sample.id}] has no {field}; expected a run whose task scores it"
        )
    return value


def _recovered(sample: SampleRecord) -> bool:
    from lmms_smoothguard.aggregation.verdict import normalize_answer

    return normalize_answer(sample.answer) == normalize_answer(_has(sample.clean_answer, sample, "clean_answer"))


_OUTCOMES: dict[str, Callable[[SampleRecord], bool]] = {
    "accuracy": lambda sample: _has(sample.right, sample, "right"),
    "asr": lambda sample: not _has(sample.right, sample, "right"),
    "recovery": _recovered,
    "suspected": lambda sample: _has(sample.suspected, sample, "suspected"),
}
