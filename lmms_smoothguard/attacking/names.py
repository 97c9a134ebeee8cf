"""File names for ids: no two ids share one, on any file system."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import quote

from lmms_smoothguard.evaluation.tables import PICTURES, SOUNDS

_LONGEST = 120
_OURS = (".png", ".wav")


def file_names(ids: Sequence[str]) -> dict[str, str]:
    """A name without its ending for every id: percent-encoded, so a `+` in it is never the id's own.

    What is too long, or differs from another in case alone, ends with `+` and a digest.
    """
    return _unique({name: _escaped(name) for name in ids})


def media_names(ids: Sequence[str]) -> dict[str, str]:
    """The same for pictures and sounds, whose endings follow: an id that is a file's name is there without that file's. Of ids
    that differ in nothing else those keep it whose ending is another."""
    bare = {name: _without(name, (*PICTURES, *SOUNDS)) for name in ids}
    counts = Counter(stem.casefold() for stem in bare.values())
    chosen = {name: stem if counts[stem.casefold()] == 1 else _without(name, _OURS) for name, stem in bare.items()}
    return _unique({name: _escaped(stem) for name, stem in chosen.items()})


def _without(name: str, endings: Sequence[str]) -> str:
    ending = PurePosixPath(name).suffix
    return name.removesuffix(ending) if ending.lower() in endings else name


def _unique(plain: dict[str, str]) -> dict[str, str]:
    counts = Counter(escaped.casefold() for escaped in plain.values())
    return {
        name: escaped if counts[escaped.casefold()] == 1 and len(escaped) <= _LONGEST else _digested(name, escaped)
        for name, escaped in plain.items()
    }


def _escaped(name: str) -> str:
    escaped = quote(name, safe=" ")
    # Not hidden, and not one of what Windows takes off a name's end.
    for place in (0, -1):
        if escaped[place] in ". ":
            escaped = escaped[:place] + f"%{ord(escaped[place]):02X}" + (escaped[1:] if place == 0 else "")
    return escaped


def _digested(name: str, escaped: str) -> str:
    return f"{escaped[:_LONGEST]}+{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def image_name(name: str, slot: int) -> str:
    """The file of a question's n-th image."""
    return _numbered(name, slot, "png")


def sound_name(name: str, slot: int) -> str:
    """The file of a question's n-th sound."""
    return _numbered(name, slot, "wav")


def _numbered(name: str, slot: int, ending: str) -> str:
    return f"{name}.{ending}" if slot == 0 else f"{name}+{slot}.{ending}"
