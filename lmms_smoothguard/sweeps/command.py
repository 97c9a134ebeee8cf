"""`smoothguard sweep`: the options of the command line."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmms_smoothguard import shared_options as shared
from lmms_smoothguard.errors import ConfigError, SmoothGuardError

if TYPE_CHECKING:
    from lmms_smoothguard.evaluation.questions import Questions
    from lmms_smoothguard.processes import Processes
    from lmms_smoothguard.sweeps.grid import Grid

_GRID = "The grid"
_PRESET = "Fixed sweeps"


def sweep(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="A hub id, a directory with safetensors weights, tiny-llava or tiny-audio.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Argument(
            help="A folder of pictures or sounds, a parquet / json / csv file, a data set, or an lmms-eval task."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory of the result file and the figures.")] = Path("runs/sweep"),
    sigma: Annotated[
        str, typer.Option(rich_help_panel=_GRID, help="0 is the undefended model.")
    ] = "0,0.05,0.1,0.2,0.3,0.5",
    noise_space: Annotated[
        str, typer.Option(rich_help_panel=_GRID, help="Of pictures pixel, normalized; of sounds amplitude, snr (dB).")
    ] = "pixel",
    num_samples: Annotated[str, typer.Option(rich_help_panel=_GRID, help="N, such as 1,5,10 or 1..10.")] = "1,2,3,5,10",
    attack: Annotated[
        str, typer.Option(rich_help_panel=_GRID, help="none, attacks, and attacks through the defence: pgd+eot8.")
    ] = "none,pgd",
    eps: Annotated[
        str,
        typer.Option(
            rich_help_panel=_GRID, help="Budgets of the attacks; of sounds such as 0.001, or 40dB below each."
        ),
    ] = "4/255",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", rich_help_panel=_GRID, help="Of the attacks: --set steps=40; may be repeated."),
    ] = None,
    aggregator: Annotated[
        str, typer.Option(rich_help_panel=_GRID, help="Such as vote,kmeans; kmeans/always as published.")
    ] = "kmeans",
    embedder: Annotated[str, typer.Option(rich_help_panel=_GRID)] = "lexical",
    clean_copy: Annotated[str, typer.Option(rich_help_panel=_GRID, help="with, without or both.")] = "with",
    seeds: Annotated[str, typer.Option(rich_help_panel=_GRID, help="Of the defence's noise; pooled.")] = "0",
    split: shared.Split = None,
    limit: shared.Limit = None,
    question: shared.Question = None,
    columns: shared.Columns = None,
    max_new_tokens: shared.MaxNewTokens = None,
    batch_size: Annotated[
        int, typer.Option(min=1, rich_help_panel=shared.MACHINE, help="Rows while crafting, EOT's draws counted.")
    ] = 32,
    device: shared.Device = None,
    dtype: shared.Dtype = "auto",
    cache: Annotated[
        Path | None, typer.Option(rich_help_panel=shared.MACHINE, help="Of adversarial images and answers.")
    ] = None,
    vision_tower: shared.VisionTower = None,
    vision_tower_resolution: shared.VisionTowerResolution = "model",
    preset: Annotated[
        str | None,
        typer.Option(rich_help_panel=_PRESET, help="readme or audio: what the README shows, on the embedded models."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(rich_help_panel=_PRESET, help="Run this part again; may be repeated.")
    ] = None,
) -> None:
    """Noise x copies x attacks x aggregation on one model: whatever was answered or crafted before is not done again.

    Writes sweep.json, its samples and figures; killed and started again, it goes on where it was. On several processes:
    torchrun --nproc_per_node 2 -m lmms_smoothguard sweep ...
    """
    from lmms_smoothguard.attacks.cache import default_cache_dir
    from lmms_smoothguard.evaluation.tables import refuse_inside
    from lmms_smoothguard.sweeps import grid as grids
    from lmms_smoothguard.sweeps.media import check_media

    if preset is not None:
        from lmms_smoothguard.sweeps.presets import run_preset

        if model or data:
            raise ConfigError(
                f"preset is {preset!r}, which has a model and data of its own; expected neither beside it"
            )
        if given := sorted(_given(context) - {"preset", "only", "limit", "out", "cache"}):
            raise ConfigError(
                f"{given[0]} is given, and preset {preset!r} has its own; expected nothing beside it but --only, --limit, --out "
                "and --cache"
            )
        _check_writable(out)
        for path in run_preset(preset, cache or default_cache_dir(), out, only or (), limit):
            typer.echo(path)
        return
    if only or not model or not data:
        raise ConfigError(
            "expected a model and data, such as `smoothguard sweep tiny-llava shapes_pope`, or --preset readme"
        )
    refuse_inside(data, {"out": out, "cache": cache or default_cache_dir()})
    _check_writable(out)
    attacks = grids.pairs("--set", settings or ())
    if reserved := {"name", "eps", "eot"} & set(attacks):
        raise ConfigError(f"--set has {min(reserved)}; expected it in --attack (pgd+eot8) or --eps")
    grid = grids.Grid(
        sigmas=grids.listed("sigma", sigma, grids.number),
        noise_spaces=grids.listed("noise-space", noise_space, str),
        num_samples=grids.whole_numbers("num-samples", num_samples),
        clean_copy=grids.clean_copy(clean_copy),
        aggregators=grids.listed("aggregator", aggregator, str),
        embedders=grids.listed("embedder", embedder, str),
        seeds=grids.whole_numbers("seeds", seeds),
        conditions=grids.conditions(grids.listed("attack", attack, str), grids.listed("eps", eps, str), attacks),
    )
    asked = {"sigma": sigma, "noise-space": noise_space, "num-samples": num_samples, "attack": attack, "eps": eps,
             "set": settings, "aggregator": aggregator, "embedder": _shown_embedders(grid), "clean-copy": clean_copy,
             "seeds": seeds, "split": split, "limit": limit, "question": question, "column": columns,
             "max-new-tokens": max_new_tokens, "dtype": dtype}  # fmt: skip
    own_tower = vision_tower is None and vision_tower_resolution == "model"
    tower = {} if own_tower else {"vision_tower": vision_tower, "vision_tower_resolution": vision_tower_resolution}
    from lmms_smoothguard.harness.questions import find_questions

    named = {key: None if value == "none" else value for key, value in grids.pairs("--column", columns or ()).items()}
    from lmms_smoothguard.processes import Processes

    processes = Processes()
    with processes.main_first():
        questions = find_questions(data, split=split, limit=limit, question=question, columns=named)
    check_media(grid, questions)
    _run(processes, model, questions, grid, out, cache or default_cache_dir(), asked,
         {"max_new_tokens": max_new_tokens, "batch_size": batch_size}, device, dtype, tower)  # fmt: skip


def _run(
    processes: Processes,
    model: str,
    questions: Questions,
    grid: Grid,
    out: Path,
    cache: Path,
    asked: Mapping[str, Any],
    options: Mapping[str, Any],
    device: str | None,
    dtype: str,
    tower: Mapping[str, Any],
) -> None:
    from lmms_smoothguard.evaluation.records import write_with_samples
    from lmms_smoothguard.subject import Subject
    from lmms_smoothguard.sweeps import session
    from lmms_smoothguard.sweeps.drawing import draw_all
    from lmms_smoothguard.sweeps.tables import describe

    subject = Subject(model, processes.device(device), dtype, **tower)
    if subject.tower is not None:
        shown = subject.tower.source, tower["vision_tower_resolution"]
        asked = dict(asked) | dict(zip(("vision-tower", "vision-tower-resolution"), shown, strict=True))
    session.refuse_another(out / "sweep.json", subject, questions)
    swept = session.sweep(
        subject,
        questions,
        grid,
        cache,
        name="sweep",
        about=f"{session.plain_name(model)} on {session.plain_name(questions.source)}",
        command=_command(session.plain_name(model), session.plain_name(questions.source), asked),
        processes=processes,
        **options,
    )
    processes.wait()
    processes.end()
    if swept is None:
        return  # the main process writes
    record, samples = swept
    path = write_with_samples(out, record, samples)
    typer.echo(describe(record))
    for file in [path, *draw_all([record], samples, out)]:
        typer.echo(file)


def _given(context: typer.Context) -> set[str]:
    """The options that the user wrote."""
    return {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}


def _command(model: str, data: str, asked: Mapping[str, Any]) -> str:
    """What runs it again, with names in place of a machine's paths."""
    words = ["smoothguard", "sweep", model, data]
    for name, value in asked.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += [f"--{name}", str(one)]
    return shlex.join(words)


def _shown_embedders(grid: Grid) -> str:
    from lmms_smoothguard.sweeps.grid import shown

    return ",".join(map(shown, grid.embedders))


def _check_writable(out: Path) -> None:
    """Now, and not after hours of answers."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise SmoothGuardError(
            f"out is {out}, which cannot be written to ({error.strerror}); expected another directory"
        ) from error
