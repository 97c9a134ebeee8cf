"""What the wrapper learnt of a sample and its scoring needs: harnesses hand scorers the document and the answer alone.

Entries are kept under (task, the document's own scalar fields). A scorer is not told its task's name, but it is known which
task is being scored: so one scoring function serves any number of tasks, those that others derive from ours too.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError


@dataclass(frozen=True)
class Note:
    """`clean_answer`: the undefended model's to the clean sample; `left_out`: why it was not attacked, None if it was."""

    clean_answer: str
    left_out: str | None = None


_notes: dict[str, dict[str, Note]] = {}
"""Document -> task -> note."""
_scored: ContextVar[str | None] = ContextVar("scored", default=None)


def place(doc: Mapping[str, Any]) -> str:
    """What tells documents of one task apart: all their fields but images and other nested ones."""
    scalars = {key: doc[key] for key in sorted(doc) if isinstance(doc[key], str | int | float | bool)}
    return json.dumps(scalars, sort_keys=True)


def record(task: str, doc: Mapping[str, Any], note: Note) -> None:
    """Keeps a note on a document of a task."""
    _notes.setdefault(place(doc), {})[task] = note


def clear() -> None:
    """Forgets everything: a run is never scored by the attacks of an earlier one."""
    _notes.clear()


def look_up(doc: Mapping[str, Any], task: str | None = None) -> Note:
    """What was noted of a document; `task` None is the one that lmms-eval is scoring.

    Raises SmoothGuardError where it was never attacked in this run.
    """
    notes = _notes.get(place(doc), {})
    task = task or _task_being_scored()
    if task is not None and task in notes:
        return notes[task]
    if task is None and len(set(notes.values())) == 1:  # called by hand, outside a harness
        return next(iter(notes.values()))
    raise SmoothGuardError(
        f"sample {doc.get('question_id', '?')!r} of {task or 'an unnamed task'} has no record of an attack: its answer did "
        "not come through a smoothguard_* model in this run. Use --model smoothguard_<base> (defense=none for the "
        "undefended run) and leave lmms-eval's response cache (--use_cache) off for attacked tasks."
    )


@contextlib.contextmanager
def scoring(task: str) -> Iterator[None]:
    """Says which task is being scored inside, for a harness that does not."""
    token = _scored.set(task)
    try:
        yield
    finally:
        _scored.reset(token)


def _task_being_scored() -> str | None:
    """What lm-eval is scoring, or lmms-eval: set there around a task's scoring, for the bills of its LLM judges; it has no
    public reader."""
    usage_metrics = sys.modules.get("lmms_eval.models.model_utils.usage_metrics")
    name = _scored.get() or getattr(usage_metrics, "_CURRENT_TASK_CONTEXT", None)
    return name if isinstance(name, str) else None
