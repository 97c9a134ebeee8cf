"""Result files of sweeps: the schema of `evaluation.records`, with many defences of one model on the same tasks in one file.

A sweep's file has what its runs share (model, tasks, versions, machine, command) once, and a point a defence with its
figures; `SweepRecord.run` is a point as a `Record` of its own. The samples of main points, with every copy's answer, are
in one parquet table beside it: all other points can be voted again from those.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.records import ModelRecord, Record, SamplesFile, TaskRecord
from lmms_smoothguard.evaluation.samples import SCHEMA_VERSION, SampleRecord, read_samples, write_samples
from lmms_smoothguard.files import replace_file

KIND = "sweep"
_CONFIG: dict[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class PointRecord:
    """One defence (None: undefended) and its figures by task and name.

    majority_first: whether an answer that more than half of the copies share won without asking the aggregator; main:
    whether its samples are in the table.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG
    name: str
    defense: dict[str, Any] | None
    figures: dict[str, dict[str, Figure]]
    majority_first: bool = True
    main: bool = True


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """One sweep. tasks: data and attack of each, without figures; seeds: as in `Record`, the defence's as a list."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG
    name: str
    about: str
    command: str
    model: ModelRecord
    tasks: dict[str, TaskRecord]
    points: list[PointRecord]
    seeds: dict[str, list[int]]
    versions: dict[str, str | None]
    environment: dict[str, str | int | float | None]
    samples: SamplesFile | None = None
    kind: str = KIND
    schema_version: int = SCHEMA_VERSION

    def run(self, point: PointRecord) -> Record:
        """A point as a record by itself."""
        tasks = {name: replace(self.tasks[name], figures=figures) for name, figures in point.figures.items()}
        return Record(
            name=f"{self.name}: {point.name}",
            about=point.name,
            command=self.command,
            model=self.model,
            tasks=tasks,
            defense=point.defense,
            seeds={who: seeds[0] for who, seeds in self.seeds.items() if len(seeds) == 1},
            versions=self.versions,
            environment=self.environment,
        )

    def to_dict(self) -> dict[str, Any]:
        """As the file has it."""
        plain = {"schema_version": self.schema_version, "kind": self.kind, **asdict(self)}
        for task in plain["tasks"].values():
            del task["figures"]
        for stored, point in zip(plain["points"], self.points, strict=True):
            stored["figures"] = {
                task: {name: figure.to_dict() for name, figure in figures.items()}
                for task, figures in point.figures.items()
            }
        return plain

    def figure(self, point: PointRecord, task: str, name: str) -> Figure | None:
        """A figure, None where the point has none of that name."""
        return point.figures.get(task, {}).get(name)


def write_sweep(directory: Path, record: SweepRecord, samples: Sequence[SampleRecord]) -> Path:
    """Writes `directory/<name>.json` and `directory/samples/<name>.parquet`, the record last, each in one go.

    Raises SmoothGuardError for what could not be read back, and where nothing can be written.
    """
    target, file = directory / f"{record.name}.json", f"samples/{record.name}.parquet"
    _text(
        replace(record, samples=SamplesFile(file=file, sha256="", count=0)), str(target)
    )  # refused before any is written
    try:
        digest = write_samples(directory / file, samples)
        text = _text(replace(record, samples=SamplesFile(file=file, sha256=digest, count=len(samples))), str(target))
        replace_file(target, text.encode())
    except OSError as error:
        raise SmoothGuardError(
            f"{target} cannot be written: {error.strerror}; expected a directory to write to"
        ) from error
    return target


def read_sweep(path: Path) -> SweepRecord:
    """A sweep's record. Raises SmoothGuardError for a file that is missing, another kind's, or not as this package writes it."""
    try:
        text = path.read_text(encoding="utf-8")
        kind = json.loads(text).get("kind")
    except FileNotFoundError as error:
        raise SmoothGuardError(f"no sweep at {path}; expected the result file of one") from error
    except (ValueError, AttributeError) as error:
        raise SmoothGuardError(f"{path} is no sweep's result file: {error}") from error
    if kind != KIND:
        raise SmoothGuardError(f"{path} is of kind {kind!r}; expected {KIND!r}")
    return _parse(text, str(path))


def read_sweep_samples(path: Path, record: SweepRecord) -> list[SampleRecord]:
    """The samples that belong to the record at `path`. Raises SmoothGuardError where they are not those it was written with."""
    if record.samples is None:
        raise SmoothGuardError(f"{path} names no samples; expected a sweep that was written to the end")
    return read_samples(path.parent / record.samples.file, record.samples.sha256)


def points_of(record: SweepRecord, **fields: Any) -> Iterator[PointRecord]:
    """The defended points whose defence has these fields."""
    for point in record.points:
        if point.defense is not None and all(point.defense.get(name) == value for name, value in fields.items()):
            yield point


def _text(record: SweepRecord, where: str) -> str:
    try:
        text = json.dumps(record.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise SmoothGuardError(f"{where} is no strict JSON: {error}; expected null for what is undefined") from error
    _parse(text, where)
    return text


def _parse(text: str, where: str) -> SweepRecord:
    version = json.loads(text).get("schema_version")
    if version != SCHEMA_VERSION:
        raise SmoothGuardError(
            f"{where} has schema_version {version!r}; this package reads {SCHEMA_VERSION}. Make the result again with it"
        )
    adapter, refused = _adapter()
    try:
        record: SweepRecord = adapter.validate_json(text)
    except refused as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise SmoothGuardError(f"{where}: {place}: {first['msg']}") from error
    return record


@functools.cache
def _adapter() -> tuple[Any, Any]:
    """What reads and checks a record, and the error it raises."""
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError as error:
        raise SmoothGuardError(
            "records need pydantic, which is not installed; pip install 'lmms-smoothguard[report]'"
        ) from error
    return TypeAdapter(SweepRecord), ValidationError
