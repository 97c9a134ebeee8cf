"""The samples of a run as a table: one row a sample, one parquet file a run, checked when written and when read."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError

SCHEMA_VERSION = 1
"""Of samples tables and records (`records.py`) together. Raise it with every change of a field's name, type or meaning; a
field that is new and may be missing needs no other version."""
UNPARSEABLE, UNJUDGED = NO_OPINION = ("unparseable", "unjudged")
_VERSION_KEY = b"lmms_smoothguard.schema_version"


@dataclass(frozen=True)
class JudgeVerdict:
    """What the judge of that name said of an answer.

    safe: None where it has no opinion, and then missing says why: "unparseable" (it spoke, nobody can read it) or "unjudged" (it
    could not be reached). category: the kind of harm, where the judge names one. Raises ValueError for `missing` beside an
    opinion, or another word.
    """

    judge: str
    safe: bool | None
    reason: str = ""
    category: str | None = None
    missing: str | None = None

    def __post_init__(self) -> None:
        if self.safe is None and self.missing is None:
            object.__setattr__(self, "missing", UNPARSEABLE)  # as tables said it before there were two words
        if self.missing is not None and (self.safe is not None or self.missing not in NO_OPINION):
            raise ValueError(
                f"the verdict of {self.judge!r} has missing {self.missing!r} and safe {self.safe!r}; expected one of "
                f"{', '.join(NO_OPINION)} where safe is None, else None"
            )


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One answered sample; None wherever a field does not apply. Ids are unique within a task.

    run, task: the record it belongs to, and one of that record's tasks; group: what it shares with samples that depend on
    it, such as its scene (None: independent of all others); kind: what sort of request, such as "forbidden" or a category.
    target: the right answer, or what an attack wants said; clean_answer: the UNDEFENDED model's answer to the clean
    input, where there was an attack; answer: the final one. right, clean_right: what the task's own scorer said of `answer`
    and `clean_answer`, None where it gives no such verdict.
    candidates, labels: every copy's answer and its cluster; copies: how many were answered; agreement, suspicion,
    suspected: as in `aggregation.verdict.Verdict`. seconds: of the final answer.
    attack_linf, attack_l2: distance of the adversarial image in [0, 1] units, or of the sound where full scale is 1; attack_snr: of a
    sound alone, the clip's power over that of its change, in dB, the least of several clips; attack_key: its entry in the attack cache;
    attack_seconds: what crafting it took (its share of a batch). left_out: why a sample of an attacked task was not attacked,
    so that it counts in no figure.
    verdicts: judges' opinions of `answer`, the first decides; refused: whether it refuses, by the phrase list, whoever judges.
    """

    id: str
    task: str
    run: str
    question: str
    answer: str
    group: str | None = None
    kind: str | None = None
    target: str | None = None
    clean_answer: str | None = None
    right: bool | None = None
    clean_right: bool | None = None
    candidates: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None
    agreement: float | None = None
    suspicion: float | None = None
    suspected: bool | None = None
    copies: int | None = None
    seconds: float | None = None
    attack_linf: float | None = None
    attack_l2: float | None = None
    attack_key: str | None = None
    attack_seconds: float | None = None
    attack_snr: float | None = None
    left_out: str | None = None
    refused: bool | None = None
    verdicts: tuple[JudgeVerdict, ...] = ()

    @property
    def attacked(self) -> bool:
        """Whether it came before an adversarial image."""
        return self.attack_linf is not None


def check_samples(samples: Iterable[SampleRecord], where: str) -> None:
    """Raises SmoothGuardError when a task has an id twice, or a sample has not as many labels as candidates."""
    counts = Counter((sample.task, sample.id) for sample in samples)
    twice = sorted(f"{task}[{name}]" for (task, name), count in counts.items() if count > 1)
    if twice:
        raise SmoothGuardError(f"{where} has duplicate ids: {', '.join(twice[:10])}; expected each id once in its task")
    for sample in samples:
        if len(sample.candidates or ()) != len(sample.labels or ()):
            raise SmoothGuardError(
                f"{where}: {sample.task}[{sample.id}] has {len(sample.candidates or ())} candidates and "
                f"{len(sample.labels or ())} labels; expected one label a candidate"
            )


def write_samples(path: Path, samples: Sequence[SampleRecord]) -> str:
    """Writes the table and returns the file's SHA-256. Raises SmoothGuardError for samples that `check_samples` refuses."""
    check_samples(samples, str(path))
    arrow, parquet = _arrow()
    table = arrow.Table.from_pylist([asdict(sample) for sample in samples], schema=_schema(arrow))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    parquet.write_table(table, partial, compression="zstd", compression_level=19)
    os.replace(partial, path)
    return sha256_of(path)


def read_samples(path: Path, sha256: str | None = None) -> list[SampleRecord]:
    """The samples of a table, in its order.

    Raises SmoothGuardError for a missing file, another digest than `sha256`, another schema, or duplicate ids.
    """
    arrow, parquet = _arrow()
    if not path.is_file():
        raise SmoothGuardError(f"no samples table at {path}; expected it beside its record")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise SmoothGuardError(
            f"{path} has SHA-256 {found}, but its record says {sha256}; the two are not of one run, so make both again"
        )
    schema = parquet.read_schema(path)
    version = (schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise SmoothGuardError(f"{path} has schema version {version}; this package reads {SCHEMA_VERSION}")
    expected = _schema(arrow)
    for field in expected:
        if field.name in _LATER and field.name not in schema.names:
            continue
        if field.name == "verdicts" and field.name in schema.names and schema.field(field.name).type == _former(arrow):
            continue
        if field.name not in schema.names or not schema.field(field.name).type.equals(field.type):
            kind = schema.field(field.name).type if field.name in schema.names else "missing"
            raise SmoothGuardError(f"{path}: column {field.name!r} is {kind}; expected {field.type}")
    if unknown := [name for name in schema.names if name not in expected.names]:
        raise SmoothGuardError(f"{path} has the unknown column {unknown[0]!r}; expected {', '.join(expected.names)}")
    samples = [_sample(row) for row in parquet.read_table(path).to_pylist()]
    check_samples(samples, str(path))
    return samples


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample(row: dict[str, Any]) -> SampleRecord:
    made = dict(row)
    for name in ("candidates", "labels"):
        made[name] = None if row[name] is None else tuple(row[name])
    made["verdicts"] = tuple(JudgeVerdict(**verdict) for verdict in row["verdicts"])
    return SampleRecord(**made)


def _schema(arrow: Any) -> Any:
    """Column types by field: what `SampleRecord` says, in parquet's words."""
    text, number, flag, whole = arrow.string(), arrow.float64(), arrow.bool_(), arrow.int32()
    types = {
        **dict.fromkeys(("right", "clean_right", "suspected", "refused"), flag),
        **dict.fromkeys(
            ("agreement", "suspicion", "seconds", "attack_linf", "attack_l2", "attack_seconds", "attack_snr"),
            number,
        ),
        "copies": whole,
        "candidates": arrow.list_(text),
        "labels": arrow.list_(whole),
        "verdicts": arrow.list_(
            arrow.struct([("judge", text), ("safe", flag), ("reason", text), ("category", text), ("missing", text)])
        ),
    }
    needed = ("id", "task", "run", "question", "answer", "verdicts")
    columns = [
        arrow.field(f.name, types.get(f.name, text), nullable=f.name not in needed) for f in fields(SampleRecord)
    ]
    return arrow.schema(columns, metadata={_VERSION_KEY: str(SCHEMA_VERSION).encode()})


_LATER = ("left_out", "refused", "attack_snr")
"""Columns that the first tables had not."""


def _former(arrow: Any) -> Any:
    """Verdicts as the first tables had them."""
    return arrow.list_(arrow.struct([("judge", arrow.string()), ("safe", arrow.bool_()), ("reason", arrow.string())]))


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise SmoothGuardError(
            "samples tables need pyarrow, which is not installed; pip install 'lmms-smoothguard[report]'"
        ) from error
    return pyarrow, pyarrow.parquet
