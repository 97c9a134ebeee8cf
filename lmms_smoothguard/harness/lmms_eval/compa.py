"""CompA (Ghosh et al. 2024, arXiv 2310.08753) from the user's own copy: which of two or three captions fits a clip. None of it is shipped.

`SMOOTHGUARD_COMPA` names a directory that holds a CSV with "order" or "attribute" in its name (or its folder's), and beside it the
clips: where the CSV stands, in audio/, or in a folder called <anything>_files, as published. A row has up to three captions, each with
a clip of its own. One of the clips is drawn, and so is the order in which the captions are listed: SMOOTHGUARD_COMPA_SEED draws others.
A row's draw depends on nothing but the seed and its place in the file.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmms_smoothguard.errors import SmoothGuardError, explain
from lmms_smoothguard.sounds import sound_of

log = logging.getLogger(__name__)

KINDS = ("order", "attribute")
SOURCE, SEED = "SMOOTHGUARD_COMPA", "SMOOTHGUARD_COMPA_SEED"
_PARTS = ("pair", "reversed_pair", "triplet")
_MISSING = ("", "-", "nan")
_MOST_NAMED = 10


class _Row(NamedTuple):
    """A row's place in the file, counted from 1, and its captions, each with its clip's name."""

    number: int
    pairs: tuple[tuple[str, str], ...]


def documents(kind: str, source: str | None = None, seed: str | int | None = None) -> Any:
    """A `datasets.Dataset` of question_id, choices (captions as listed), answer (the right one's number, from 1), clip (its name) and
    audio_path, one for each row with at least two captions; how many others there are is logged.

    kind: one of KINDS; source, seed: in place of the environment's. Raises SmoothGuardError, with names, for a directory, a CSV, columns
    or clips that are missing, clips that cannot be read, a seed that is no number, and a file without a row of two captions.
    """
    from datasets import Dataset, Features, Sequence, Value

    drawn_by = _seed(os.environ.get(SEED, 0) if seed is None else seed)
    file = _table(kind, source or os.environ.get(SOURCE))
    rows = _rows(file)
    kept = [row for row in rows if len(row.pairs) > 1]
    if not kept:
        raise SmoothGuardError(
            f"none of the {len(rows)} rows of {file} has two captions with a clip each; expected CompA's benchmark"
        )
    if others := [str(row.number) for row in rows if len(row.pairs) < 2]:
        log.warning(
            "%s: %d of %d rows have fewer than two captions with a clip each, and are left out: %s",
            file.name, len(others), len(rows), _some(others),
        )  # fmt: skip
    clips = _clips(kind, file, kept)
    documents = [_document(row, clips, np.random.default_rng([drawn_by, row.number])) for row in kept]
    _refuse_unreadable(dict.fromkeys(document["audio_path"] for document in documents))
    features = {name: Value("string") for name in documents[0]} | {"choices": Sequence(Value("string"))}
    return Dataset.from_list(documents, Features(features))


def _document(row: _Row, clips: Mapping[str, Path], rng: np.random.Generator) -> dict[str, Any]:
    right, order = int(rng.integers(len(row.pairs))), rng.permutation(len(row.pairs)).tolist()
    _, clip = row.pairs[right]
    return {
        "question_id": str(row.number),
        "choices": [row.pairs[place][0] for place in order],
        "answer": str(order.index(right) + 1),
        "clip": clip,
        "audio_path": str(clips[clip]),
    }


def _seed(value: str | int) -> int:
    try:
        seed = int(value)
    except ValueError:
        seed = -1
    if seed < 0:
        raise SmoothGuardError(f"{SEED} is {value!r}; expected a whole number of at least 0")
    return seed


def _table(kind: str, source: str | None) -> Path:
    if not source:
        raise SmoothGuardError(
            f"{SOURCE} is not set; expected a directory with CompA's CSV and clips, which its authors hand out "
            "(https://github.com/Sreyan88/CompA)"
        )
    root = Path(source).expanduser()
    if not root.is_dir():
        raise SmoothGuardError(
            f"{SOURCE} is {source!r}, and there is no such directory; expected one with CompA's CSV and clips"
        )
    tables = sorted(file for file in [*root.glob("*.csv"), *root.glob("*/*.csv")] if not file.name.startswith("."))
    named = [file for file in tables if kind in str(file.relative_to(root)).casefold()]
    if len(named) == 1:
        return named[0]
    if not named:
        there = _some([str(file.relative_to(root)) for file in tables]) or "none"
        raise SmoothGuardError(
            f"{SOURCE} is {source!r}, which has no CSV with {kind!r} in its name; expected one such as "
            f"CompA_{kind}_benchmark.csv. It has {there}"
        )
    raise SmoothGuardError(
        f"{SOURCE} is {source!r}, where more than one CSV is called {kind!r}: {_some([str(file.relative_to(root)) for file in named])}; "
        "expected one. Name a directory that holds one of them"
    )


def _rows(file: Path) -> list[_Row]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            header, *lines = list(csv.reader(opened, strict=True)) or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SmoothGuardError(f"{file} cannot be read ({explain(error)}); expected a CSV in UTF-8") from error
    header = [name.strip() for name in header]
    wanted = [f"{part}_{what}" for part in _PARTS[:2] for what in ("caption", "file")]
    wanted += [name for part in _PARTS[2:] for name in (f"{part}_caption", f"{part}_file") if _either(header, part)]
    if lacking := [name for name in wanted if name not in header]:
        raise SmoothGuardError(
            f"{file} has no column {', '.join(lacking)}; found {', '.join(header) or 'none'}. Expected CompA's own header: "
            f"{', '.join(f'{part}_caption, {part}_file' for part in _PARTS)} (the last two may be absent)"
        )
    if odd := [str(n) for n, line in enumerate(lines, start=1) if line and len(line) != len(header)]:
        raise SmoothGuardError(
            f"{file} has rows of other lengths than its header's {len(header)}: {_some(odd)}; expected as many cells. Quote captions "
            "with commas"
        )
    return [_Row(number, tuple(_pairs(header, line))) for number, line in enumerate(lines, start=1) if any(line)]


def _either(header: Sequence[str], part: str) -> bool:
    return f"{part}_caption" in header or f"{part}_file" in header


def _pairs(header: Sequence[str], line: Sequence[str]) -> list[tuple[str, str]]:
    """A file's column may be there twice, as published: the first then names what the clip was made from, the last the clip."""
    found = []
    for part in _PARTS:
        captions, files = (
            [cell.strip() for name, cell in zip(header, line, strict=True) if name in (column, f"{column}.1")]
            for column in (f"{part}_caption", f"{part}_file")
        )
        if captions and captions[0].casefold() not in _MISSING and files[-1].casefold() not in _MISSING:
            found.append((captions[0], files[-1]))
    return found


def _clips(kind: str, file: Path, rows: Sequence[_Row]) -> dict[str, Path]:
    """The path of every clip, by its name."""
    folders = sorted(file.parent.glob("*_files"))
    own = [folder for folder in folders if kind in folder.name.casefold()]
    beside = [file.parent, file.parent / "audio", *(own or folders)]
    names = list(dict.fromkeys(name for row in rows for _, name in row.pairs))
    found = {name: [folder / name for folder in beside if (folder / name).is_file()] for name in names}
    if missing := [name for name, paths in found.items() if not paths]:
        raise SmoothGuardError(
            f"missing clips: {_some(missing)}; expected every one that {file.name} names, in "
            f"{' or '.join(str(folder) for folder in beside)}"
        )
    return {name: paths[0] for name, paths in found.items()}


def _refuse_unreadable(paths: Iterable[str]) -> None:
    bad = []
    for path in paths:
        try:
            sound_of(path)
        except (OSError, SmoothGuardError) as error:
            bad.append(f"{path} ({explain(error)})")
    if bad:
        raise SmoothGuardError(
            f"unreadable clips: {_some(bad)}; expected whole WAV, FLAC, OGG or MP3 files. Fetch them again."
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
