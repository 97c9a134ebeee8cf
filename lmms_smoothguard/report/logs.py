"""What lmms-eval's own logs say of a run: its settings, its data, its samples, as a record of one schema."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.answers import same_answer
from lmms_smoothguard.evaluation.machine import machine, versions
from lmms_smoothguard.evaluation.records import AttackRecord, DataRecord, ModelRecord, Record, Run, TaskRecord
from lmms_smoothguard.evaluation.runs import Sample, newest_results, read_log, sample_records, samples_beside
from lmms_smoothguard.evaluation.samples import SampleRecord, sha256_of
from lmms_smoothguard.evaluation.summaries import figures_of
from lmms_smoothguard.evaluation.titles import attack_access
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path
from lmms_smoothguard.harness.options import Options, take_options
from lmms_smoothguard.harness.summary import TOWER
from lmms_smoothguard.report.documents import is_embedded, scenes_of
from lmms_smoothguard.tiny import PLACES

_PER_SAMPLE = "(per sample)"


def run_of_logs(
    directory: Path,
    tasks: Sequence[str],
    *,
    name: str,
    about: str,
    command: str | None = None,
    cache: Path | None = None,
    environment: Mapping[str, Any] | None = None,
    package_versions: Mapping[str, str | None] | None = None,
) -> Run:
    """The record and samples of the newest run under `directory`, a `--output_path` with `--log_samples`: of that one alone.

    command: what runs it again, None = from the log; cache: its attack cache, which knows the model's fingerprint, None = as
    the run's arguments have it. environment, package_versions: of the machine that ran it;
    None for this one. Raises SmoothGuardError where that run has no log of a task, or the data have changed since.
    """
    newest = newest_results(directory)
    results: dict[str, Any] = json.loads(newest.read_text())
    options = logged_options(results)
    logged = {task: read_log(samples_beside(newest, task)) for task in tasks}
    rows = {task: _rows(name, task, samples) for task, samples in logged.items()}
    stored = {task: _task(task, results, logged[task], rows, options) for task in tasks}
    record = Record(
        name=name,
        about=about,
        command=_command(results, tasks) if command is None else command,
        model=_model(results, logged, AttackCache(cache or options.attack_cache)),
        tasks=stored,
        defense=None if options.defense is None else options.defense.to_dict(),
        seeds=_seeds(results, options, stored),
        versions=dict(versions() if package_versions is None else package_versions),
        environment=dict(machine() if environment is None else environment),
    )
    return Run(record, [row for task in tasks for row in rows[task]])


def logged_results(directory: Path) -> dict[str, Any]:
    """lmms-eval's own results file of the newest run. Raises SmoothGuardError without one."""
    results: dict[str, Any] = json.loads(newest_results(directory).read_text())
    return results


def logged_options(results: Mapping[str, Any]) -> Options:
    """Defence and attack, as the run's `--model_args` had them."""
    return take_options(_arguments(results))


def is_right(sample: Sample, answer: str) -> bool:
    """Whether `answer` is right: as the task scored it where it is the sample's final or clean answer, else where it is the right
    answer's text."""
    told = {sample.info.get("clean_answer"): "clean_right", sample.answer: "right"}
    scored = sample.scores.get(told.get(answer, ""))
    return scored if isinstance(scored, bool) else same_answer(answer, sample.target)


def _arguments(results: Mapping[str, Any]) -> dict[str, Any]:
    text = results["config"]["model_args"]
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def _command(results: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """lmms-eval's command line as far as its results file tells it, without a machine's paths."""
    config = results["config"]
    arguments = ",".join(f"{key}={_without_path(value)}" for key, value in _arguments(results).items())
    limit = f" --limit {config['limit']:g}" if config.get("limit") else ""
    return (
        f"lmms-eval --model {config.get('model', 'smoothguard_...')} --model_args {arguments} --tasks {','.join(tasks)}"
        f"{limit} --log_samples --output_path runs"
    )


def _rows(name: str, task: str, samples: Sequence[Sample]) -> list[SampleRecord]:
    # Reading the scenes also holds the log against the data: other questions than asked are refused there.
    return sample_records(name, task, samples, scenes_of(task, samples) if is_embedded(task) else None)


def _task(
    task: str,
    results: Mapping[str, Any],
    samples: Sequence[Sample],
    rows: Mapping[str, Sequence[SampleRecord]],
    options: Options,
) -> TaskRecord:
    config = results.get("configs", {}).get(task, {})
    attack = _attack(task, samples)
    twin = _clean_twin(task, results, rows) if attack is not None else None
    target = None if attack is None else attack.settings.get("target")
    return TaskRecord(
        data=_data(task, config, rows[task]),
        attack=attack,
        figures=figures_of(
            rows[task], rows[twin] if twin is not None else (), target if target != _PER_SAMPLE else None
        ),
    )


def _data(task: str, config: Mapping[str, Any], rows: Sequence[SampleRecord]) -> DataRecord:
    """A file of ours by its place in the package and its digest, any other file by name and digest, a hub's by its id; and what
    was asked, where no commit is pinned and no file holds it: MM-SafetyBench is whatever copy the user has."""
    count = len(rows)
    split = config.get("test_split") or config.get("validation_split")
    arguments = config.get("dataset_kwargs") or {}
    files = arguments.get("data_files")
    if files is not None:
        path = PurePosixPath(files[split] if isinstance(files, Mapping) else files)
        ours = tasks_path().joinpath(*path.parts[-3:])
        if ours.is_file() and is_embedded(task):
            return DataRecord(
                source="/".join(("tasks", *path.parts[-3:])), sha256=sha256_of(ours), split=split, count=count
            )
        if any(tasks_path().glob(f"*/{path.name}")):  # a list of ours, from which code goes on to the user's copy
            return DataRecord(source=task, revision=_asked(rows), split=split, count=count)
        digest = sha256_of(Path(path)) if Path(path).is_file() else None
        return DataRecord(source=path.name, sha256=digest, split=split, count=count)
    source = ":".join(part for part in (config.get("dataset_path"), config.get("dataset_name")) if part)
    return DataRecord(
        source=source or task, revision=arguments.get("revision") or _asked(rows), split=split, count=count
    )


def _asked(rows: Sequence[SampleRecord]) -> str:
    """A digest of ids, questions and right answers, in the data's own order; pictures are not in a log."""
    told = json.dumps([[row.id, row.question, row.target] for row in rows])
    return f"asked {hashlib.sha256(told.encode()).hexdigest()[:32]}"


def _attack(task: str, samples: Sequence[Sample]) -> AttackRecord | None:
    """The settings as logged with every attacked sample, files by their names; one that differs between samples, such as a
    target, stands in their table."""
    there = [sample for sample in samples if sample.left_out is None]
    if not there and samples:
        raise SmoothGuardError(
            f"no sample of {task} was attacked ({samples[0].left_out}, the first); expected one at least"
        )
    every = [sample.info.get("attack") for sample in there]
    if not any(every) and len(there) == len(samples):
        return None
    if not all(every):
        raise SmoothGuardError(
            f"{every.count(None)} of {len(samples)} samples of {task} have neither an attack nor a reason why they were left "
            "out of it; expected one of the two"
        )
    settings = {
        field: _without_path(value) if all((other or {}).get(field) == value for other in every) else _PER_SAMPLE
        for field, value in dict(every[0] or {}).items()
    }
    return AttackRecord(settings=settings, access=attack_access(settings), adaptive=bool(settings.get("eot")))


def _without_path(value: Any) -> Any:
    """`x` of `/home/me/x` and `guard/x` of the judge `guard//home/me/x`; hubs' ids and whatever else as it is."""
    if not isinstance(value, str) or "://" in value:
        return value
    return re.sub(r"(?<![^/+])[/~][^+?]*/", "", value)


def _clean_twin(task: str, results: Mapping[str, Any], rows: Mapping[str, Sequence[SampleRecord]]) -> str | None:
    """The run's task that asks the same of the same data, without an attack."""
    configs = results.get("configs", {})

    def data(name: str) -> list[Any]:
        fields = ("dataset_path", "dataset_name", "dataset_kwargs", "test_split")
        return [configs.get(name, {}).get(field) for field in fields]

    def asked(name: str) -> set[tuple[str, str]]:
        return {(row.id, row.question) for row in rows[name] if row.left_out is None}

    clean = [name for name in rows if not any(row.attacked or row.left_out is not None for row in rows[name])]
    return next((name for name in clean if data(name) == data(task) and asked(name) >= asked(task)), None)


def _seeds(results: Mapping[str, Any], options: Options, tasks: Mapping[str, TaskRecord]) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for stored in tasks.values():
        if stored.attack is not None and "seed" in stored.attack.settings:
            found["attack"] = stored.attack.settings["seed"]
    if options.defense is not None and hasattr(options.defense.config, "seed"):
        found["defense"] = options.defense.config.seed
    for name, field in (("python", "random_seed"), ("numpy", "numpy_seed"), ("torch", "torch_seed")):
        if field in results["config"]:
            found[name] = results["config"][field]
    return found


def _model(results: Mapping[str, Any], logged: Mapping[str, Sequence[Sample]], cache: AttackCache) -> ModelRecord:
    """The model by name, its fingerprint from the attacks on it; the embedded one's is taken anew where nothing attacked it.
    One with another vision tower has its fingerprint in the results."""
    pretrained = _arguments(results)["pretrained"]
    tower = dict(results.get(TOWER) or {}) or None
    told = [[sample.info.get("attack_key") for sample in samples] for samples in logged.values()]
    keys = [next(filter(None, listed), None) for listed in told]
    entries = [cache.get(key) for key in keys if key]
    prints = {str(entry.record["model"]) for entry in entries if entry is not None and "model" in entry.record}
    if tower is not None:
        prints.add(str(tower.pop("model_fingerprint")))
    if len(prints) > 1:
        raise SmoothGuardError(
            f"the attacks were crafted on models {', '.join(sorted(prints))}; expected one model a run"
        )
    path = PurePosixPath(pretrained)
    embedded = next((name for name, place in PLACES.items() if path.parts[-3:] == place.parts[-3:]), None)
    if embedded and not prints and not any(keys):
        prints = {_embedded_fingerprint(embedded)}
    local = path.is_absolute() or pretrained.startswith((".", "~")) or Path(pretrained).is_dir()
    name = embedded or (path.name if local else pretrained)
    return ModelRecord(name=name, fingerprint=next(iter(prints), None), vision_tower=tower)


def _embedded_fingerprint(name: str) -> str:
    import torch

    from lmms_smoothguard.fingerprint import model_fingerprint
    from lmms_smoothguard.model_loading import load_model

    model, _ = load_model(str(PLACES[name]), torch.device("cpu"), "auto", trust_remote_code=False)
    return model_fingerprint(model)
