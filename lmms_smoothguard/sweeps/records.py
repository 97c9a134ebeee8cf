"""Result files of sweeps: the schema of `evaluation.records`, with many defences of one model on the same tasks in one file.

A sweep's file has what its runs share (model, tasks, versions, machine, command) once, and a point a defence with its
figures; `SweepRecord.run` is a point as a `Record` of its own. The samples of main points, with every copy's answer, are
in one parquet table beside it: all other points can be voted again from those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.records import ModelRecord, Record, SamplesFile, TaskRecord
from lmms_smoothguard.evaluation.samples import SCHEMA_VERSION, SampleRecord, read_samples
from lmms_smoothguard.evaluation.schema import STRICT, parsed

KIND = "sweep"


@dataclass(frozen=True, kw_only=True)
class PointRecord:
    """One defence (None: undefended) and its figures by task and name.

    noise: its size and its units, see `sweeps.noises`; None in files from before there were sounds. majority_first: whether an answer that more than half of the copies share won without asking the aggregator; main:
    whether its samples are in the table.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: str
    defense: dict[str, Any] | None
    figures: dict[str, dict[str, Figure]]
    majority_first: bool = True
    main: bool = True
    noise: tuple[str, float] | None = None

    @property
    def space(self) -> str:
        """The units of its noise; empty where there is none."""
        if self.defense is None:
            return ""
        return str(self.defense["noise_space"]) if self.noise is None else self.noise[0]

    @property
    def size(self) -> float:
        """Of its noise; 0 where there is none."""
        if self.defense is None:
            return 0.0
        return float(self.defense["sigma"]) if self.noise is None else self.noise[1]


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """One sweep. tasks: data and attack of each, without figures; seeds: as in `Record`, the defence's as a list."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
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
    return parsed(SweepRecord, text, str(path))


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
