"""Result files: one JSON record a run (what was run on what, and its figures) beside one parquet table of its samples.

Write one with `write_run`, read it with `read_run`:

    record = Record(
        name="plain", about="undefended", command="lmms-eval ...",
        model=ModelRecord(name="llava-hf/llava-1.5-7b-hf", fingerprint=model_fingerprint(model)),
        tasks={
            "pope_pgd": TaskRecord(
                data=DataRecord(source="lmms-lab-encoder/POPE", revision="...", split="adversarial", count=3000),
                attack=AttackRecord(settings=attack.to_dict(), access="gradients", adaptive=False),
                figures={"asr": attack_success_rate(clean_right, right).figure()},
            )
        },
        defense=None, seeds={"attack": 0}, versions=versions(), environment=machine(),
    )
    write_run(Path("benchmarks/results"), record, samples)  # plain.json and samples/plain.parquet

`samples` are `SampleRecord`s whose `run` is the record's name and whose `task` is one of its tasks. Both are checked when
written and when read. The file is strict JSON: what is undefined is null.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, Literal, NamedTuple

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.samples import (
    SCHEMA_VERSION,
    SampleRecord,
    check_samples,
    read_samples,
    write_samples,
)

_CONFIG: dict[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """name: the id on a hub, or the last part of a directory's path; fingerprint: of the weights, as attacks make it
    (`fingerprint.model_fingerprint`), None where it was not taken."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG
    name: str
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """source: a hub's data set, a file within the package, or the name of a folder of pictures; revision: its commit;
    sha256: of a single file; split; count: the samples that were asked."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG
    source: str
    count: int
    revision: str | None = None
    sha256: str | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class AttackRecord:
    """settings: `AttackSettings.to_dict()`, flat. What the attacker knew of the model: `access`, its "gradients",
    "scores" (losses or probabilities of an answer), "answers" alone, or nothing ("transfer" from another model). And of the
    defence: `adaptive`, whether the attack was crafted through it (EOT); an attacker never knows an evaluation seed."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG
    settings: dict[str, Any]
    access: Literal["gradients", "scores", "answers", "transfer"]
    adaptive: bool


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """One task of a run: its data, its attack (None: clean), its figures by name."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG
    data: DataRecord
    attack: AttackRecord | None = None
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SamplesFile:
    """file: the table's path from the record's directory; sha256: of that file; count: its rows."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG
    file: str
    sha256: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run: one model, one defence (None: undefended), one or more tasks.

    name: the file's name without `.json`; about: a line for a reader; command: what runs it again, without a machine's
    paths. defense: `Choice.to_dict()`. seeds: by what they seed ("attack", "defense", "torch", ...), None for fresh entropy.
    versions: of packages; environment: processor, cores, Python. samples: filled in by `write_run`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = _CONFIG
    name: str
    about: str
    command: str
    model: ModelRecord
    tasks: dict[str, TaskRecord]
    defense: dict[str, Any] | None
    seeds: dict[str, int | None]
    versions: dict[str, str | None]
    environment: dict[str, str | int | float | None]
    samples: SamplesFile | None = None
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The record as the file has it, its schema version first."""
        plain = {"schema_version": self.schema_version, **asdict(self)}
        for task, stored in self.tasks.items():
            plain["tasks"][task]["figures"] = {name: figure.to_dict() for name, figure in stored.figures.items()}
        return plain


class Run(NamedTuple):
    """A record and its samples."""

    record: Record
    samples: list[SampleRecord]

    def of(self, task: str) -> list[SampleRecord]:
        """The samples of one task. Raises SmoothGuardError for a task that the run has not."""
        if task not in self.record.tasks:
            raise SmoothGuardError(f"{self.record.name} has no task {task!r}; it has {', '.join(self.record.tasks)}")
        return [sample for sample in self.samples if sample.task == task]


def write_run(directory: Path, record: Record, samples: Sequence[SampleRecord]) -> Path:
    """Writes `directory/<name>.json` and `directory/samples/<name>.parquet`, and returns the record's path.

    Raises SmoothGuardError for a record or samples that could not be read back, or do not belong together.
    """
    target = directory / f"{record.name}.json"
    _check(record, samples, str(target))
    file = f"samples/{record.name}.parquet"
    _text(
        replace(record, samples=SamplesFile(file=file, sha256="", count=0)), str(target)
    )  # refused before any is written
    digest = write_samples(directory / file, samples)
    text = _text(replace(record, samples=SamplesFile(file=file, sha256=digest, count=len(samples))), str(target))
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    return target


def read_record(path: Path) -> Record:
    """A record without its samples.

    Raises SmoothGuardError for a file that is missing or no strict JSON, an unknown schema version, a field that is missing,
    unknown or of another type.
    """
    if not path.is_file():
        raise SmoothGuardError(f"no record at {path}; expected a result file of this package")
    record = _parse(path.read_text(encoding="utf-8"), str(path))
    if record.name != path.stem:
        raise SmoothGuardError(f"{path} is the record of {record.name!r}; expected it in {record.name}.json")
    return record


def read_run(path: Path) -> Run:
    """A record and its samples, which must be those it was written with; raises as `read_record` and `read_samples` do."""
    record = read_record(path)
    if record.samples is None:
        raise SmoothGuardError(f"{path} names no samples table; expected one, so make the result again")
    samples = read_samples(path.parent / record.samples.file, record.samples.sha256)
    if len(samples) != record.samples.count:
        raise SmoothGuardError(
            f"{path} counts {record.samples.count} samples, but its table has {len(samples)}; make the result again"
        )
    _check(record, samples, str(path))
    return Run(record, samples)


def _check(record: Record, samples: Sequence[SampleRecord], where: str) -> None:
    """Whether record and samples belong together, and no path of a machine is in either."""
    named = {"name": record.name, "model.name": record.model.name}
    named |= {f"tasks.{task}.data.source": stored.data.source for task, stored in record.tasks.items()}
    if record.samples is not None:
        named["samples.file"] = record.samples.file
    for place, text in named.items():
        if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith("~"):
            raise SmoothGuardError(f"{where}: {place} is {text!r}; expected a name, not a path of one machine")
    if set(record.name) & set("/\\"):
        raise SmoothGuardError(f"{where}: name is {record.name!r}; expected a name that a file can have")
    check_samples(samples, where)
    if strangers := sorted({sample.run for sample in samples} - {record.name}):
        raise SmoothGuardError(f"{where} has samples of run {strangers[0]!r}; expected {record.name!r}")
    counts = Counter(sample.task for sample in samples)
    if unknown := sorted(set(counts) - set(record.tasks)):
        raise SmoothGuardError(f"{where} has samples of task {unknown[0]!r}; expected {', '.join(record.tasks)}")
    for task, stored in record.tasks.items():
        if counts[task] != stored.data.count:
            raise SmoothGuardError(
                f"{where}: tasks.{task}.data.count is {stored.data.count}, but there are {counts[task]} samples of it"
            )


def _text(record: Record, where: str) -> str:
    try:
        text = json.dumps(record.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise SmoothGuardError(f"{where} is no strict JSON: {error}; expected null for what is undefined") from error
    _parse(text, where)
    return text


def _parse(text: str, where: str) -> Record:
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
    adapter, refused = _adapter()
    try:
        record: Record = adapter.validate_json(text)
    except refused as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        found = "" if first["type"] == "missing" else f" (found {first['input']!r:.80})"
        raise SmoothGuardError(f"{where}: {place}: {first['msg']}{found}") from error
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is none of JSON's values; expected null")


@functools.cache
def _adapter() -> tuple[Any, Any]:
    """What reads and checks a record, and the error it raises."""
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError as error:
        raise SmoothGuardError(
            "records need pydantic, which is not installed; pip install 'lmms-smoothguard[report]'"
        ) from error
    return TypeAdapter(Record), ValidationError
