"""What the wrapper learnt of a sample and its scoring needs: lmms-eval hands scorers the document and the answer alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError

_clean_answers: dict[tuple[str, str], str] = {}


def _place(task: str, doc: Mapping[str, Any]) -> tuple[str, str]:
    scalars = {key: doc[key] for key in sorted(doc) if isinstance(doc[key], str | int | float | bool)}
    return task, json.dumps(scalars, sort_keys=True)


def record(task: str, doc: Mapping[str, Any], clean_answer: str) -> None:
    """Notes the undefended model's answer to a clean sample, under the task's name and the document's own fields."""
    _clean_answers[_place(task, doc)] = clean_answer


def clean_answer(task: str, doc: Mapping[str, Any]) -> str:
    """What was noted of a document. Raises SmoothGuardError where it was never attacked in this run."""
    try:
        return _clean_answers[_place(task, doc)]
    except KeyError:
        raise SmoothGuardError(
            f"sample {doc.get('question_id', '?')!r} has no record of an attack: its answer did not come through a "
            "smoothguard_* model in this run. Use --model smoothguard_<base> (defense=none for the undefended run) and "
            "leave lmms-eval's response cache (--use_cache) off for attacked tasks."
        ) from None
