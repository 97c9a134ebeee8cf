"""Corpora that universal attacks are optimised on: instructions and the answers to be given to them.

None is shipped but the embedded model's own, whose forbidden requests are harmless by construction.
"""

from __future__ import annotations

import csv
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmms_smoothguard.attacks.files import find_file
from lmms_smoothguard.errors import AttackError, explain

COLUMNS = ("instruction", "response")


class Pair(NamedTuple):
    """instruction: what is asked, may be empty; response: the answer to be forced."""

    instruction: str
    response: str


def load_corpus(source: str) -> tuple[Pair, ...]:
    """Pairs from a file (.parquet, .csv, .json, .jsonl; see `find_file`) or a Hugging Face data set "id[:split]".

    Columns: instruction and response, or response alone (Qi et al. 2023, section 3), then every instruction is empty. Raises
    AttackError for what cannot be read, another set of columns, an empty response, an empty corpus and duplicates.
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
    return _checked(source, rows)


@functools.lru_cache(maxsize=4)
def _load_hub(source: str) -> tuple[Pair, ...]:
    name, _, split = source.partition(":")
    try:
        import datasets

        found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        raise AttackError(
            f"attack corpus is {source!r}, neither a file ({', '.join(_READERS)}) nor a Hugging Face data set that can be "
            f"loaded ({explain(error)}); expected a path, or id[:split]"
        ) from error
    return _checked(source, list(found))


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


def _checked(source: str, rows: Iterable[Any]) -> tuple[Pair, ...]:
    pairs = [_pair(source, number, row) for number, row in enumerate(rows, 1)]
    if not pairs:
        raise AttackError(f"attack corpus {source!r} is empty; expected at least one pair of instruction and response")
    twice = [(pair, count) for pair, count in Counter(pairs).items() if count > 1]
    if twice:
        pair, count = twice[0]
        raise AttackError(
            f"attack corpus {source!r} has {len(twice)} rows more than once, such as {tuple(pair)} {count} times; expected each "
            "once. Take the others out."
        )
    return tuple(pairs)


def _pair(source: str, number: int, row: Any) -> Pair:
    columns = list(row) if isinstance(row, Mapping) else []
    if "response" not in columns or ("instruction" not in columns and columns != ["response"]):
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
    return Pair(instruction.strip(), response.strip())
