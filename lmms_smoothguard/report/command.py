"""`smoothguard record`, `compare` and `pool`: result files of lmms-eval's runs, one rate of two of them apart, or of several
seeds together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from lmms_smoothguard.errors import ConfigError, SmoothGuardError, did_you_mean

if TYPE_CHECKING:
    from lmms_smoothguard.evaluation.figures import Figure
    from lmms_smoothguard.evaluation.outcomes import OutcomeName
    from lmms_smoothguard.evaluation.records import Record, Run

_TASK = typer.Option(help="A task that all of them have; may be left out where they have one.")
_RATE = typer.Option(
    help="accuracy, asr, recovery, suspected or unsafe_rate; asr where the task is attacked, else accuracy."
)
_JSON = typer.Option("--json", help="The figure as result files have it.")


def record(
    directory: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="lmms-eval's --output_path, with --log_samples.")
    ],
    tasks: Annotated[str, typer.Option(help="Of the newest run there, such as pope,pope_pgd.")],
    name: Annotated[str, typer.Option(help="Of the result file, without .json.")],
    out: Annotated[Path, typer.Option(help="Directory of the result file; samples go to `samples` in it.")] = Path(
        "runs/records"
    ),
    about: Annotated[str, typer.Option(help="A line for a reader.")] = "",
    cache: Annotated[Path | None, typer.Option(help="The run's attack cache, where it was moved since.")] = None,
) -> None:
    """Write a run of lmms-eval on a smoothguard_* model as a result file: settings, data, figures with intervals, samples.

    Versions and processor are those of this machine, so record a run where it was made.
    """
    from lmms_smoothguard.evaluation.records import write_run
    from lmms_smoothguard.report.logs import run_of_logs

    asked = [task.strip() for task in tasks.split(",") if task.strip()]
    if not asked or len(set(asked)) < len(asked):
        raise ConfigError(f"--tasks is {tasks!r}; expected each task once, such as pope,pope_pgd")
    typer.echo(write_run(out, *run_of_logs(directory, asked, name=name, about=about, cache=cache)))


def compare(
    first: Annotated[Path, typer.Argument(help="A result file, with its samples beside it.")],
    second: Annotated[Path, typer.Argument(help="Another, over the same samples.")],
    task: Annotated[str | None, _TASK] = None,
    rate: Annotated[str | None, _RATE] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """The rate of the first run minus that of the second, paired by sample, with a 95 % interval over scenes."""
    from lmms_smoothguard.evaluation.records import read_run
    from lmms_smoothguard.evaluation.seeds import difference_of_runs

    runs = [read_run(path) for path in (first, second)]
    task = _task([run.record for run in runs], task)
    name = _rate(runs[0].record, task, rate)
    found = difference_of_runs(runs[0], runs[1], task, name, seed=seed)
    title = f"{name} of {task}, {runs[0].record.name} minus {runs[1].record.name}"
    _say(title, found, as_json, "+.1f", " to ", " points")


def pool(
    results: Annotated[list[Path], typer.Argument(help="Result files that differ in nothing but their seeds.")],
    task: Annotated[str | None, _TASK] = None,
    rate: Annotated[str | None, _RATE] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """The rate over several seeds, all answers to a question (or about a scene) counted as one cluster, and its spread."""
    from lmms_smoothguard.evaluation.records import read_run
    from lmms_smoothguard.evaluation.seeds import pooled_over_runs

    if twice := sorted({str(path) for path in results if results.count(path) > 1}):
        raise SmoothGuardError(f"{twice[0]} is named twice; expected every result file once")
    runs: list[Run] = [read_run(path) for path in results]
    task = _task([run.record for run in runs], task)
    name = _rate(runs[0].record, task, rate)
    _say(f"{name} of {task}, {len(runs)} runs", pooled_over_runs(runs, task, name), as_json, ".1f", "-", " %")


def _task(records: Sequence[Record], named: str | None) -> str:
    """The task that was named, else the only one that all have."""
    common = [task for task in records[0].tasks if all(task in record.tasks for record in records)]
    if named is None and len(common) == 1:
        return common[0]
    if named is None or named not in common:
        raise ConfigError(
            f"--task is {named!r}; expected a task that {', '.join(record.name for record in records)} have in common: "
            f"{', '.join(common) or 'there is none'}"
        )
    return named


def _rate(record: Record, task: str, named: str | None) -> OutcomeName:
    from lmms_smoothguard.evaluation.outcomes import OutcomeName

    known: tuple[OutcomeName, ...] = get_args(OutcomeName)
    wanted = named or ("asr" if record.tasks[task].attack is not None else "accuracy")
    for name in known:
        if name == wanted:
            return name
    raise ConfigError(f"--rate is {wanted!r}; {did_you_mean(wanted, known)}")


def _say(title: str, found: Figure, as_json: bool, form: str, between: str, unit: str) -> None:
    """`asr of t, a minus b: +12.3 points (+8.0 to +16.9), n = 420 in 140 groups (paired difference, ...)`."""
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1, allow_nan=False))
        return

    def percent(value: float | None) -> str:
        return "-" if value is None else format(100 * value, form)

    groups = "" if found.groups is None else f" in {found.groups} groups"
    typer.echo(
        f"{title}: {percent(found.value)}{unit} ({percent(found.low)}{between}{percent(found.high)}), n = {found.count}{groups}"
    )
    if found.seeds is not None:
        low, high, spread = map(percent, (found.seeds.min, found.seeds.max, found.seeds.sd))
        typer.echo(f"by seed: {low} to {high} %, standard deviation {spread} points")
    typer.echo(f"95 % interval: {found.method}")
