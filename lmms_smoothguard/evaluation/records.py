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

from collections import Counter
from collections.abc import Sequence
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
from lmms_smoothguard.evaluation.schema import STRICT, parsed, written
from lmms_smoothguard.files import replace_file


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """name: the id on a hub, or the last part of a directory's path; fingerprint: of the weights, as attacks make it
    (`fingerprint.model_fingerprint`), None where it was not taken; vision_tower: `encoders.TowerProvenance.to_dict()` where the
    model sees with another tower than its own, else None."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: str
    fingerprint: str | None = None
    vision_tower: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """source: a hub's data set, a file within the package, the name of a folder of pictures; revision: its commit, or
    where none is pinned a digest of what was asked; sha256: of a single file; split; count: the samples that were asked."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
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

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    settings: dict[str, Any]
    access: Literal["gradients", "scores", "answers", "transfer"]
    adaptive: bool


@dataclass(frozen=True, kw_only=True)
class TaskRecord:
    """One task of a run: its data, its attack (None: clean), its figures by name."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    data: DataRecord
    attack: AttackRecord | None = None
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SamplesFile:
    """file: the table's path from the record's directory; sha256: of that file; count: its rows."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
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

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
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
    _check(record, samples, str(directory / f"{record.name}.json"))
    return write_with_samples(directory, record, samples)


def write_with_samples(directory: Path, record: Any, samples: Sequence[SampleRecord]) -> Path:
    """Writes `<name>.json` of a `Record`, or another dataclass with `name`, `samples` and `to_dict`, and its samples' table; the
    record last, each in one go. Raises SmoothGuardError for what could not be read back, and where nothing can be written."""
    kind, target, file = type(record), directory / f"{record.name}.json", f"samples/{record.name}.parquet"
    trial = replace(record, samples=SamplesFile(file=file, sha256="", count=0))
    written(kind, trial.to_dict(), str(target))  # refused before any is written
    try:
        digest = write_samples(directory / file, samples)
        whole = replace(record, samples=SamplesFile(file=file, sha256=digest, count=len(samples)))
        replace_file(target, written(kind, whole.to_dict(), str(target)).encode())
    except OSError as error:
        raise SmoothGuardError(
            f"{target} cannot be written: {error.strerror}; expected a directory to write to"
        ) from error
    return target


def read_record(path: Path) -> Record:
    """A record without its samples.

    Raises SmoothGuardError for a file that is missing or no strict JSON, an unknown schema version, a field that is missing,
    unknown or of another type.
    """
    if not path.is_file():
        raise SmoothGuardError(f"no record at {path}; expected a result file of this package")
    record = parsed(Record, path.read_text(encoding="utf-8"), str(path))
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
