"""The clips that a universal change of sounds is learnt on: those that the corpus names, or others that its pairs share out."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lmms_smoothguard.attacks.corpus import Pair, corpus_of
from lmms_smoothguard.attacks.files import find_file
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import AttackError, ConfigError
from lmms_smoothguard.evaluation.columns import NAMES, items_of
from lmms_smoothguard.evaluation.tables import FORMATS, SOUNDS, open_table
from lmms_smoothguard.sounds import sound_of


def load_clips(source: str, count: int) -> tuple[bytes, ...]:
    """The first `count` different clips of a source, or as many as it has, as 16-bit PCM WAV.

    source: a sound file, a folder of them, a table with a column of sounds (.parquet, .csv, .json, .jsonl; both kinds of files are
    looked for as `find_file` does), or a data set "id[:split]". Raises AttackError for what cannot be read, or has no clip.
    """
    place = Path(source).expanduser()
    if place.suffix.lower() in (*FORMATS, *SOUNDS) and not place.is_dir():
        place = find_file(source, "clips")
    known = place.exists()
    return _load(source, place if known else None, count, place.stat().st_mtime_ns if known else 0)


@functools.lru_cache(maxsize=4)
def _load(source: str, place: Path | None, count: int, _changed: int) -> tuple[bytes, ...]:
    found: dict[bytes, None] = {}
    try:
        for number, (cell, base) in enumerate(_cells(source, place), 1):
            if len(found) == count:
                break
            try:
                found.setdefault(sound_of(cell, base).wav)
            except (ConfigError, OSError) as error:
                raise AttackError(
                    f"clip {number} of attack clips {source!r} cannot be read ({error}); expected whole clips"
                ) from error
    except ConfigError as error:
        raise AttackError(
            f"attack clips is {source!r}: {error}. Expected a sound file, a folder of them, a table with a column of sounds such as "
            "audio, or a data set's id[:split]"
        ) from error
    if not found:
        raise AttackError(f"attack clips {source!r} has no clip; expected at least one")
    return tuple(found)


def _cells(source: str, place: Path | None) -> Iterator[tuple[Any, Path | None]]:
    """What holds a clip each, and where its paths start from."""
    if place is not None and place.suffix.lower() in SOUNDS and place.is_file():
        yield str(place), None
        return
    name, _, split = (source, "", "") if place is not None else source.partition(":")
    table = open_table(name if place is None else str(place), split or None)
    column = next((column for column in NAMES["sounds"] if column in table.rows.column_names), None)
    if column is None:
        raise ConfigError(f"it has the columns {', '.join(table.rows.column_names)}, none of them of sounds")
    for row in table.rows.select_columns([column]):
        for cell in items_of(row, column, may_lack=True):
            yield cell, table.base


def pairs_with_clips(settings: AttackSettings) -> tuple[Pair, ...]:
    """The corpus of an attack's settings with a clip for each pair: its own, or one of `clips`, all of these equally often and in an
    order that the seed draws.

    Raises ConfigError for settings of pictures, AttackError where there is no clip, or two sources of them.
    """
    own = settings.options
    check_medium_of(settings)
    pairs = corpus_of(settings)
    if pairs[0].audio is not None:
        if own.clips is not None:
            raise AttackError(
                f"attack clips is {own.clips!r}, and the corpus {own.corpus!r} names clips of its own; expected one of them"
            )
        return pairs
    if own.clips is None:
        raise AttackError(
            f"the corpus {own.corpus!r} names no clips, and a change of sounds is learnt on some; expected attack_clips=<a sound file, a "
            "folder of them, or a table with a column of sounds> of the attacker's own, or a column audio in the corpus"
        )
    clips, rng = load_clips(own.clips, len(pairs)), np.random.default_rng(settings.seed)
    order = np.concatenate([rng.permutation(len(clips)) for _ in range(-(-len(pairs) // len(clips)))])
    return tuple(pair._replace(audio=clips[place]) for pair, place in zip(pairs, order, strict=False))


def check_medium_of(settings: AttackSettings) -> None:
    """Raises ConfigError for options of pictures."""
    own = settings.options
    if own.base is not None or own.size is not None:
        raise ConfigError(
            f"attack base is {own.base!r} and size {own.size!r}, of a picture; expected neither for sounds, whose change is added to "
            "any clip"
        )
