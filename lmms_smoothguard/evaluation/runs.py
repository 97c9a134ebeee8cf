"""Runs read back from lmms-eval's samples logs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.samples import JudgeVerdict, SampleRecord

_MARKS = ("exact_match", "caption_exact")  # scorers' plain 0 or 1 for a whole answer


@dataclass(frozen=True)
class Sample:
    """One answered sample: the right answer, the answer given, what our wrapper logged of it, the text asked, and what the
    task's scorer said."""

    question_id: str
    target: str
    answer: str
    info: dict[str, Any]
    question: str = ""
    scores: Mapping[str, Any] = field(default_factory=dict)


def load_samples(directory: Path, task: str) -> list[Sample]:
    """The samples of a task's newest run under `directory`, in the order of the documents.

    Raises SmoothGuardError without a log, or when question ids collide: scores over merged questions mean nothing.
    """
    logs = sorted(directory.rglob(f"*_samples_{task}.jsonl"))
    if not logs:
        raise SmoothGuardError(f"no samples of {task} under {directory}; expected a run with --log_samples")
    rows = [json.loads(line) for line in logs[-1].read_text().splitlines() if line]
    samples = [_sample(row) for row in sorted(rows, key=lambda row: int(row["doc_id"]))]
    counts = Counter(sample.question_id for sample in samples)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise SmoothGuardError(f"{logs[-1]} has colliding question ids: {', '.join(twice[:10])}; expected each once")
    return samples


def sample_records(
    run: str, task: str, samples: Sequence[Sample], groups: Sequence[str] | None = None
) -> list[SampleRecord]:
    """The samples as result files have them; `groups`: what each belongs to, such as its scene."""
    places = groups if groups is not None else [None] * len(samples)
    return [_record(run, task, sample, group) for sample, group in zip(samples, places, strict=True)]


def _record(run: str, task: str, sample: Sample, group: str | None) -> SampleRecord:
    info, scores = sample.info, sample.scores
    voted = info.get("candidates") is not None
    refused = scores.get("refused")
    return SampleRecord(
        id=sample.question_id,
        task=task,
        run=run,
        group=group,
        kind=scores.get("kind"),
        question=sample.question,
        target=sample.target,
        clean_answer=info.get("clean_answer"),
        answer=sample.answer,
        right=scores.get("right"),
        clean_right=scores.get("clean_right"),
        candidates=tuple(info["candidates"]) if voted else None,
        labels=tuple(info["labels"]) if voted else None,
        agreement=info.get("agreement"),
        suspicion=info.get("suspicion"),
        suspected=info.get("suspected"),
        copies=info.get("num_samples_used"),
        seconds=info.get("seconds"),
        attack_linf=info.get("attack_linf"),
        attack_l2=info.get("attack_l2"),
        attack_key=info.get("attack_key"),
        attack_seconds=info.get("attack_seconds"),
        verdicts=() if refused is None else (JudgeVerdict(scores.get("judge", "refusal"), bool(refused)),),
    )


def _sample(row: dict[str, Any]) -> Sample:
    response, infos = row["filtered_resps"], row.get("token_counts") or [None]
    # The log has no document, but a metric's outcome names its question; others are told by their place.
    scores = _scores(row)
    return Sample(
        str(scores.get("question_id", row["doc_id"])),
        str(row["target"]),
        response[0] if isinstance(response, list) else response,
        infos[0] or {},
        str(row.get("input", "")),
        scores,
    )


def _scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the metrics of one sample say, in one mapping; `right` where one of them tells right from wrong.

    Our own scorers say `right` outright, upstream's POPE says `score`, others are a plain 0 or 1.
    """
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name != "token_counts" and isinstance(value, dict):
            found = {**value, **found}
    if "right" not in found:
        marks = [found.get("score"), *(row.get(name) for name in _MARKS)]
        told = next((mark for mark in marks if isinstance(mark, int | float) and mark in (0, 1)), None)
        if told is not None:
            found["right"] = bool(told)
    return found
