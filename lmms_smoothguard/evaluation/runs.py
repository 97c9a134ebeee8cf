"""Runs read back from lmms-eval's samples logs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError


@dataclass(frozen=True)
class Sample:
    """One answered sample: what was asked, what was right, what was answered, and what our wrapper logged of it."""

    question_id: str
    doc: dict[str, Any]
    answer: str
    info: dict[str, Any]


def load_samples(directory: Path, task: str) -> list[Sample]:
    """The samples of a task's newest run under `directory`, in the order of the documents.

    Raises SmoothGuardError without a log, or when question ids collide: scores over merged questions mean nothing.
    """
    logs = sorted(directory.rglob(f"*_samples_{task}.jsonl"))
    if not logs:
        raise SmoothGuardError(f"no samples of {task} under {directory}; expected a run with --log_samples")
    rows = [json.loads(line) for line in logs[-1].read_text().splitlines() if line]
    rows.sort(key=lambda row: row["doc_id"])
    samples = []
    for row in rows:
        response = row["filtered_resps"][0]
        counts = row.get("token_counts") or [None]
        samples.append(
            Sample(
                str(row["doc"]["question_id"]),
                row["doc"],
                response[0] if isinstance(response, list) else response,
                counts[0] or {},
            )
        )
    ids = [sample.question_id for sample in samples]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise SmoothGuardError(f"{logs[-1]} has colliding question ids: {', '.join(twice[:10])}; expected each once")
    return samples
