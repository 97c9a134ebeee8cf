"""What the wrapper learnt of a sample and its scoring needs: lmms-eval hands scorers the document and the answer alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError


@dataclass(frozen=True)
class Finding:
    """`clean_answer`: the undefended model's answer to the clean sample; `info`: everything that goes into the log."""

    clean_answer: str
    info: dict[str, Any]


_findings: dict[tuple[str, str], Finding] = {}


def _place(attack: str, doc: Mapping[str, Any]) -> tuple[str, str]:
    scalars = {key: doc[key] for key in sorted(doc) if isinstance(doc[key], str | int | float | bool)}
    return attack, json.dumps(scalars, sort_keys=True)


def record(attack: str, doc: Mapping[str, Any], finding: Finding) -> None:
    """Notes a finding under the attack's name and the document's own fields."""
    _findings[_place(attack, doc)] = finding


def look_up(attack: str, doc: Mapping[str, Any]) -> Finding:
    """The finding of a document. Raises SmoothGuardError where it was never attacked in this run."""
    try:
        return _findings[_place(attack, doc)]
    except KeyError:
        raise SmoothGuardError(
            f"sample {doc.get('question_id', '?')!r} has no record of an attack: its answer did not come through a "
            "smoothguard_* model in this run. Use --model smoothguard_<base> (defense=none for the undefended run) and "
            "leave lmms-eval's response cache (--use_cache) off for attacked tasks."
        ) from None
