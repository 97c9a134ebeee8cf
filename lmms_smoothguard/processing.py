"""Which processor, in a few letters: digests of what makes tokens, pixels and features of a question."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any


def processing_digests(processor: Any) -> dict[str, str | None]:
    """chat_template, tokenizer, processor (its settings and those of what is in it); None for what there is none of."""
    return {
        "chat_template": _digest(getattr(processor, "chat_template", None)),
        "tokenizer": _digest(_tokenizing(getattr(processor, "tokenizer", processor))),
        "processor": _digest(_settings(processor)),
    }


def _digest(parts: Any) -> str | None:
    if not parts:
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()[:32]


def _plain(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address is another one in every process


def _settings(part: Any) -> dict[str, Any]:
    """A processor's, of whatever kind, without where it lies."""
    made = {"class": type(part).__name__, **part.to_dict()}
    for name in (
        "image_processor",
        "video_processor",
        "feature_extractor",
        "audio_processor",
    ):  # not all processors list them
        inner: Any = getattr(part, name, None)
        if hasattr(inner, "to_dict"):
            made[name] = {"class": type(inner).__name__, **inner.to_dict()}
    return {name: value for name, value in made.items() if name not in ("_name_or_path", "name_or_path")}


def _tokenizing(tokenizer: Any) -> list[Any]:
    """What a tokenizer does to a text. Padding and truncation are each call's own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        inside: Any = tokenizer.get_vocab()
    else:
        inside = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return [type(tokenizer).__name__, inside]
