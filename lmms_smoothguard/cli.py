"""`smoothguard ...`: the command line."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from lmms_smoothguard.attacking.command import attack
from lmms_smoothguard.certifying.command import certify
from lmms_smoothguard.errors import SmoothGuardError, did_you_mean, explain
from lmms_smoothguard.export import export
from lmms_smoothguard.proxy.command import proxy
from lmms_smoothguard.report.command import compare, pool, record
from lmms_smoothguard.serving import serve
from lmms_smoothguard.sweeps.command import sweep
from lmms_smoothguard.tiny import PLACES
from lmms_smoothguard.training.booster_command import booster
from lmms_smoothguard.training.robust_command import fare, tecoa

app = typer.Typer(
    help="SmoothGuard and its kin for multimodal LLMs.", no_args_is_help=True, pretty_exceptions_enable=False
)
train_app = typer.Typer(help="Train what the package ships.", no_args_is_help=True)
app.add_typer(train_app, name="train")


@app.command()
def model(name: Annotated[str, typer.Argument(help=" or ".join(PLACES))]) -> None:
    """Print the directory of an embedded model, for `pretrained=` and `from_pretrained`."""
    if name not in PLACES:
        raise SmoothGuardError(f"unknown model {name!r}; {did_you_mean(name, PLACES)}")
    typer.echo(PLACES[name])


@app.command("tasks-path")
def tasks_path(lm_eval: Annotated[bool, typer.Option("--lm-eval", help="Those for lm-eval.")] = False) -> None:
    """Print the directory of our lmms-eval tasks, for `--include_path`."""
    from lmms_smoothguard.harness.lm_eval import registering
    from lmms_smoothguard.harness.lmms_eval import discovery

    typer.echo(registering.TASKS if lm_eval else discovery.tasks_path())


@train_app.command("tiny-llava")
def train_tiny_llava(
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and, in the end, `model/`.")] = Path(
        "runs/tiny-llava"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of scenes, weights and order.")] = 0,
    scale: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the steps and scenes; below 1 for a trial.")
    ] = 1.0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
) -> None:
    """Train the embedded LLaVA from a seed: about an hour on two cores. Started again, it goes on where it was."""
    from lmms_smoothguard.tiny.session import train

    train(out, seed, scale, checkpoint_every)


@train_app.command("tiny-audio")
def train_tiny_audio(
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and, in the end, `model/`.")] = Path(
        "runs/tiny-audio"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of clips, weights and order.")] = 0,
    scale: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of the steps; below 1 for a trial.")] = 1.0,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
) -> None:
    """Train a small Qwen2-Audio on generated sounds: about an hour on two cores. Started again, it goes on where it was."""
    from lmms_smoothguard.tiny.sounds.session import train

    train(out, seed, scale, checkpoint_every)


@train_app.command("tiny-guard")
def train_tiny_guard(
    out: Annotated[Path, typer.Option(help="Directory for the model.")] = Path("runs/tiny-guard"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and exchanges.")] = 0,
    scale: Annotated[float, typer.Option(min=0.001, max=1.0, help="Share of the steps; below 1 for a trial.")] = 1.0,
) -> None:
    """Train the embedded guard model from a seed: about a minute on one core."""
    from lmms_smoothguard.tiny.guard_train import GuardRecipe, train

    recipe = GuardRecipe(seed=seed)
    figures = train(out, dataclasses.replace(recipe, steps=max(1, round(recipe.steps * scale))), typer.echo)
    typer.echo("\n".join(f"{name}: {value}" for name, value in figures.items()))


@train_app.command("tiny-clip")
def train_tiny_clip(
    out: Annotated[Path, typer.Option(help="Directory for the model.")] = Path("runs/tiny-clip"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of scenes, weights and order.")] = 0,
    scale: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the steps and scenes; below 1 for a trial.")
    ] = 1.0,
) -> None:
    """Train the embedded dual encoder around the embedded LLaVA's vision tower, from a seed: about ten minutes on one core."""
    from lmms_smoothguard.tiny.clip_train import ClipRecipe, scaled, train

    train(out, scaled(ClipRecipe(seed=seed), scale), typer.echo)


train_app.command()(booster)
train_app.command()(fare)
train_app.command()(tecoa)
app.command(no_args_is_help=True)(attack)
app.command(no_args_is_help=True)(certify)
app.command(no_args_is_help=True)(export)
app.command(no_args_is_help=True)(proxy)
app.command(no_args_is_help=True, context_settings={"allow_extra_args": True})(serve)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Directory for the runs' logs and the table.", show_default="runs/demo/MODEL")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of every task.")] = 420,
    model: Annotated[str, typer.Option(help="tiny-llava, which sees, or tiny-audio, which hears.")] = "tiny-llava",
) -> None:
    """Attack and defend an embedded model through lmms-eval: plain and defended, clean and attacked, a table, a page."""
    from lmms_smoothguard.report.demo import run_demo

    typer.echo(f"The page with samples: {run_demo(out or Path('runs/demo') / model, limit, model)}")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="What `smoothguard demo --out` has filled.")],
) -> None:
    """Write the report page of earlier runs again, from their logs."""
    from lmms_smoothguard.report.demo import run_report

    typer.echo(f"The page with samples: {run_report(directory)}")


@app.command()
def results(
    out: Annotated[Path, typer.Option(help="Directory for the runs' logs.")] = Path("runs/results"),
    to: Annotated[Path, typer.Option(help="Directory of the result files.")] = Path("benchmarks/results"),
    only: Annotated[list[str] | None, typer.Option(help="Run this experiment alone, anew; may be repeated.")] = None,
    smoothing: Annotated[bool, typer.Option("--smoothing", help="Those of the feature-smoothing table alone.")] = False,
    sounds: Annotated[bool, typer.Option("--sounds", help="The certificates of answers about sounds alone.")] = False,
) -> None:
    """Make every result file that is missing: the published default, other budgets, ablations, adaptive attacks, certificates."""
    from lmms_smoothguard.report.demo import run_results

    run_results(out, to, only or (), smoothing=smoothing, sounds=sounds)


app.command()(sweep)
app.command()(record)
app.command()(compare)
app.command()(pool)


def main() -> None:
    """The console script: our own errors without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except SmoothGuardError as error:
        typer.secho(f"smoothguard: {explain(error)}", fg="red", err=True)
        sys.exit(2)
