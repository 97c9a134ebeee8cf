"""Corpora that universal attacks are optimised on: instructions and the answers to be given to them.

None is shipped but the embedded model's own, whose forbidden requests are harmless by construction.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmms_smoothguard.attacks.files import find_file
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import AttackError, ConfigError, explain
from lmms_smoothguard.sounds import sound_of

COLUMNS = ("instruction", "response")
AUDIO = "audio"


class Pair(NamedTuple):
    """instruction: what is asked, may be empty; response: the answer to be forced; audio: the clip that it is asked about, as 16-bit
    PCM WAV, None where the corpus names none."""

    instruction: str
    response: str
    audio: bytes | None = None

    @property
    def content(self) -> list[str]:
        """Ready for JSON, the clip by its digest."""
        return [*self[:2], *(() if self.audio is None else (hashlib.sha256(self.audio).hexdigest(),))]


def corpus_of(settings: AttackSettings) -> tuple[Pair, ...]:
    """The corpus that settings of a universal attack name. Raises ConfigError where they name none."""
    if settings.options.corpus is None:
        raise ConfigError(
            "attack=universal has no corpus; expected attack_corpus=<file or data set of instruction and response>"
        )
    return load_corpus(settings.options.corpus)


def load_corpus(source: str) -> tuple[Pair, ...]:
    """Pairs from a file (.parquet, .csv, .json, .jsonl; see `find_file`) or a Hugging Face data set "id[:split]".

    Columns: instruction and response, or response alone (Qi et al. 2023, section 3), then every instruction is empty; for attacks on
    sounds also audio, each pair's own clip, as `sounds.sound_of` reads it (paths from the file's directory). Raises AttackError for
    what cannot be read, another set of columns, an empty response, clips for some pairs alone, an empty corpus and duplicates.
    """
    suffix = Path(source).suffix.lower()
    if suffix in _READERS:
        file = find_file(source, "corpus")
        return _load_file(source, file, file.stat().st_mtime_ns)
    if Path(source).expanduser().is_file():
        raise AttackError(
            f"attack corpus is {source!r}, a file of an unknown kind {suffix!r}; expected {', '.join(_READERS)}"
        )
    return _load_hub(source)


@functools.lru_cache(maxsize=4)
def _load_file(source: str, file: Path, _changed: int) -> tuple[Pair, ...]:
    try:
        rows = _READERS[file.suffix.lower()](file)
    except ImportError as error:
        raise AttackError(
            f"attack corpus {source!r} needs pyarrow; pip install 'lmms-smoothguard[report]', or give a .csv or .jsonl"
        ) from error
    except (ValueError, OSError, csv.Error) as error:
        raise AttackError(
            f"attack corpus {source!r} cannot be read as {file.suffix} ({type(error).__name__}: {error}); expected a table with "
            f"the columns {' and '.join(COLUMNS)}"
        ) from error
    return _checked(source, rows, file.parent)


@functools.lru_cache(maxsize=4)
def _load_hub(source: str) -> tuple[Pair, ...]:
    name, _, split = source.partition(":")
    try:
        import datasets

        found = datasets.load_dataset(name, split=split or "train")
        if isinstance(found.features.get(AUDIO), datasets.Audio):
            found = found.cast_column(AUDIO, datasets.Audio(decode=False))  # decoding needs torchcodec
    except Exception as error:
        raise AttackError(
            f"attack corpus is {source!r}, neither a file ({', '.join(_READERS)}) nor a Hugging Face data set that can be "
            f"loaded ({explain(error)}); expected a path, or id[:split]"
        ) from error
    return _checked(source, list(found), None)


def _parquet(file: Path) -> list[Any]:
    import pyarrow.parquet

    return list(pyarrow.parquet.read_table(file).to_pylist())


def _csv(file: Path) -> list[Any]:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        return list(csv.DictReader(lines, strict=True))


def _json(file: Path) -> list[Any]:
    rows = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise ValueError(f"a {type(rows).__name__} instead of a list of rows")
    return rows


def _jsonl(file: Path) -> list[Any]:
    lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would part texts at U+2028, too
    return [json.loads(line) for line in lines if line.strip()]


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".parquet": _parquet,
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
}


def _checked(source: str, rows: Iterable[Any], base: Path | None) -> tuple[Pair, ...]:
    pairs = [_pair(source, number, row, base) for number, row in enumerate(rows, 1)]
    if not pairs:
        raise AttackError(f"attack corpus {source!r} is empty; expected at least one pair of instruction and response")
    twice = [(pair, count) for pair, count in Counter(pairs).items() if count > 1]
    if twice:
        pair, count = twice[0]
        raise AttackError(
            f"attack corpus {source!r} has {len(twice)} rows more than once, such as {pair[:2]} {count} times; expected each "
            "once. Take the others out."
        )
    silent = [number for number, pair in enumerate(pairs, 1) if pair.audio is None]
    if 0 < len(silent) < len(pairs):
        raise AttackError(
            f"attack corpus {source!r} has no {AUDIO} in row {silent[0]}, and in others it has; expected a clip in every row, or in none"
        )
    return tuple(pairs)


def _pair(source: str, number: int, row: Any, base: Path | None) -> Pair:
    columns = list(row) if isinstance(row, Mapping) else []
    if "response" not in columns or ("instruction" not in columns and set(columns) - {AUDIO} != {"response"}):
        raise AttackError(
            f"attack corpus {source!r} has the columns {', '.join(map(str, columns)) or 'none'} in row {number}; expected "
            f"{' and '.join(COLUMNS)}, or response alone"
        )
    instruction, response = row.get("instruction"), row["response"]
    instruction = "" if instruction is None else instruction
    if not isinstance(instruction, str) or not isinstance(response, str) or not response.strip():
        raise AttackError(
            f"attack corpus {source!r} has the instruction {instruction!r} and the response {response!r} in row {number}; "
            "expected texts, and a response that is not empty"
        )
    return Pair(instruction.strip(), response.strip(), _clip(source, number, row.get(AUDIO), base))


def _clip(source: str, number: int, cell: Any, base: Path | None) -> bytes | None:
    if not cell or (
        isinstance(cell, Mapping) and not any(cell.get(part) is not None for part in ("array", "bytes", "path"))
    ):
        return None
    try:
        return sound_of(cell, base).wav
    except (ConfigError, OSError) as error:
        raise AttackError(
            f"attack corpus {source!r} has an {AUDIO} in row {number} that cannot be read ({error}); expected a whole clip: a path from the "
            "corpus' directory, a file's bytes, or an array with its sampling_rate"
        ) from error
