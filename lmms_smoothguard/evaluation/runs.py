"""Runs read back from lmms-eval's samples logs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError


@dataclass(frozen=True)
class Sample:
    """One answered sample: the right answer, the answer given, what our wrapper logged of it, and the text asked."""

    question_id: str
    target: str
    answer: str
    info: dict[str, Any]
    question: str = ""


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


def _sample(row: dict[str, Any]) -> Sample:
    response, infos = row["filtered_resps"], row.get("token_counts") or [None]
    # The log has no document, but a metric's outcome names its question; others are told by their place.
    outcomes = [value for value in row.values() if isinstance(value, dict) and "question_id" in value]
    return Sample(
        str(outcomes[0]["question_id"] if outcomes else row["doc_id"]),
        str(row["target"]),
        response[0] if isinstance(response, list) else response,
        infos[0] or {},
        str(row.get("input", "")),
    )
