"""Result files' own JSON: strict, versioned, checked field by field when written and when read."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.samples import SCHEMA_VERSION

STRICT: dict[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""`__pydantic_config__` of every part of a result file."""
T = TypeVar("T")


def written(kind: type[T], plain: Mapping[str, Any], where: str) -> str:
    """The text of a file that `parsed` reads back as a `kind`. Raises SmoothGuardError for what it could not."""
    try:
        text = json.dumps(plain, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise SmoothGuardError(f"{where} is no strict JSON: {error}; expected null for what is undefined") from error
    parsed(kind, text, where)
    return text


def parsed(kind: type[T], text: str, where: str) -> T:
    """Raises SmoothGuardError for no strict JSON, an unknown schema version, and a field that is missing, unknown or of another
    type."""
    try:
        stored = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise SmoothGuardError(f"{where} is no strict JSON: {error}") from error
    version = stored.get("schema_version") if isinstance(stored, Mapping) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise SmoothGuardError(
            f"{where} has schema_version {version!r}; this package reads {SCHEMA_VERSION}. Make the result again with it, or "
            "read it with the version of lmms-smoothguard that wrote it"
        )
    wanted: Any = kind
    adapter, refused = _adapter(wanted)
    try:
        record: T = adapter.validate_json(text)
    except refused as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        found = "" if first["type"] == "missing" else f" (found {first['input']!r:.80})"
        raise SmoothGuardError(f"{where}: {place}: {first['msg']}{found}") from error
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is none of JSON's values; expected null")


@functools.cache
def _adapter(kind: type[Any]) -> tuple[Any, Any]:
    """What reads and checks a `kind`, and the error it raises."""
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError as error:
        raise SmoothGuardError(
            "records need pydantic, which is not installed; pip install 'lmms-smoothguard[report]'"
        ) from error
    return TypeAdapter(kind), ValidationError
