"""`smoothguard train booster`: training with progress, held-out figures, the model card."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lmms_smoothguard import progress
from lmms_smoothguard.boosting.booster import MADE, WEIGHTS, read_booster
from lmms_smoothguard.boosting.purifier import PurifierConfig
from lmms_smoothguard.dual import DualEncoder, is_dual
from lmms_smoothguard.encoders import check_tower
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.means import Mean
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.sweeps.session import plain_name
from lmms_smoothguard.training.booster import STAGES, BoosterRecipe, BoosterTrainer
from lmms_smoothguard.training.pictures import Source, folder_sources, held_out_scenes, scene_source

_SCENES, _FAINT_SHARE = 9000, 1 / 3


def recipe_of(
    *,
    seed: int,
    sigma_max: float,
    steps: int,
    mapper_steps: int,
    batch: int,
    widths: str,
    unshuffle: int,
    scale: float,
    start: str | None = None,
    feature_weight: float = BoosterRecipe.feature_weight,
    mapper_hidden: int = BoosterRecipe.mapper_hidden,
) -> BoosterRecipe:
    """From the command line's options. Raises ConfigError for what cannot be meant."""
    try:
        levels = tuple(int(width) for width in widths.split(","))
    except ValueError as error:
        raise ConfigError(f"widths is {widths!r}; expected whole numbers such as 16,32,64") from error
    if not levels or any(width < 8 or width % 8 for width in levels):
        raise ConfigError(f"widths is {widths!r}; expected multiples of 8, such as 16,32,64")
    if not 0 < sigma_max <= 5:
        raise ConfigError(f"sigma_max is {sigma_max!r}; expected more than 0 and at most 5, in [0, 1] pixel units")
    return BoosterRecipe(
        seed=seed,
        steps=(max(1, round(steps * scale)), round(mapper_steps * scale)),
        batch=batch,
        sigmas=(0.0, sigma_max),
        purifier=PurifierConfig(unshuffle=unshuffle, widths=levels),
        start=start,
        feature_weight=feature_weight,
        mapper_hidden=mapper_hidden,
    )


def train(
    model: str,
    data: str,
    out: Path,
    recipe: BoosterRecipe,
    *,
    vision_tower: str | None = None,
    vision_tower_resolution: str = "model",
    device: str | None = None,
    scale: float = 1.0,
    checkpoint_every: int = 100,
) -> dict[str, Mean]:
    """Trains, or goes on training, into `out`; the finished booster, its card and its figures go to `out/booster`.

    Raises SmoothGuardError for a model or data that cannot be had, or a checkpoint of another training.
    """
    console = progress.console()
    subject = _subject(model, device, vision_tower, vision_tower_resolution)
    pictures, held_out = _sources(data, recipe.seed, scale)
    trainer = BoosterTrainer(recipe, subject.model, subject.processor, pictures, out)
    if trainer.resume():
        console.print(
            f"going on from {out}: {STAGES[trainer.stage]}, step {trainer.step} of {recipe.steps[trainer.stage]}"
        )
    with progress.training_bars(
        console, list(zip(STAGES, recipe.steps, strict=True)), trainer.stage, trainer.step
    ) as bars:
        for stage, step, losses in trainer.run(checkpoint_every):
            bars.show(stage, step + 1, "  ".join(f"{name} {value:.4f}" for name, value in losses.items()))
    target = out / MADE
    trainer.booster.save(target)
    figures = trainer.held_out_figures(read_booster(target), held_out)
    command = _command(model, data, (vision_tower, vision_tower_resolution), recipe, scale)
    write_card(target, recipe, trainer, figures, command, len(pictures))
    console.print("\n".join(f"{name}: {_shown(value)}" for name, value in figures.items()))
    console.print(f"done: {target}")
    return figures


def _sources(data: str, seed: int, scale: float) -> tuple[Source, Source]:
    """Pictures to train on, and held-out ones. Raises ConfigError for data that cannot be used."""
    if data != "scenes":
        return folder_sources(Path(data).expanduser(), labelled=False)
    scenes = max(100, round(_SCENES * scale))
    return scene_source(scenes, round(_FAINT_SHARE * scenes), seed, labelled=False), held_out_scenes(labelled=False)


def _subject(model: str, device: str | None, vision_tower: str | None, resolution: str) -> Any:
    """A multimodal model or a dual encoder, with its processor. Raises ConfigError for what cannot be loaded."""
    if not is_dual(model):
        return Subject(model, device, vision_tower=vision_tower, vision_tower_resolution=resolution)
    check_tower(vision_tower, resolution)
    if vision_tower is not None:
        raise ConfigError(f"vision_tower is {vision_tower!r}, and {model} is a dual encoder; expected it alone")
    return DualEncoder(model, device, "auto")


def _command(model: str, data: str, tower: tuple[str | None, str], recipe: BoosterRecipe, scale: float) -> str:
    """What makes the same booster again: whatever is not as by default."""
    usual, words = (
        BoosterRecipe(),
        ["smoothguard train booster", f"--model {plain_name(model)}", f"--data {plain_name(data)}"],
    )
    source, resolution = tower
    words += [f"--vision-tower {plain_name(source)}"] if source else []
    words += [f"--vision-tower-resolution {resolution}"] if resolution != "model" else []
    if scale != 1:
        words.append(f"--scale {scale:g}")
    elif recipe.steps != usual.steps:
        words.append(f"--steps {recipe.steps[0]} --mapper-steps {recipe.steps[1]}")
    if recipe.purifier != usual.purifier:
        words.append(f"--widths {','.join(map(str, recipe.purifier.widths))} --unshuffle {recipe.purifier.unshuffle}")
    words += [f"--sigma-max {recipe.sigmas[1]:g}"] if recipe.sigmas != usual.sigmas else []
    if recipe.feature_weight != usual.feature_weight:
        words.append(f"--feature-weight {recipe.feature_weight:g}")
    if recipe.mapper_hidden != usual.mapper_hidden:
        words.append(f"--mapper-hidden {recipe.mapper_hidden}")
    words += [f"--start {plain_name(recipe.start)}"] if recipe.start else []
    words += [f"--batch {recipe.batch}"] if recipe.batch != usual.batch else []
    return " ".join([*words, f"--seed {recipe.seed}"])


def write_card(
    target: Path, recipe: BoosterRecipe, trainer: BoosterTrainer, figures: dict[str, Mean], command: str, pictures: int
) -> None:
    """Writes `README.md` (the model card) and `figures.json` beside the weights."""
    booster = trainer.booster
    error = f" plus {recipe.projector_weight:g} times the relative squared error behind the projector"
    sizes = [
        sum(p.numel() for p in part.parameters()) for part in (booster.purifier, booster.mappers) if part is not None
    ]
    record = {
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "parameters": dict(zip(STAGES, sizes, strict=False)),
        "figures": {name: value.figure().to_dict() for name, value in figures.items()},
    }
    (target / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    (target / "README.md").write_text(
        _CARD.format(
            command=command,
            purifier=sizes[0] / 1e6,
            mapper=f", a mapper of {sizes[1] / 1e6:.2f} M" if len(sizes) > 1 else "",
            megabytes=(target / WEIGHTS).stat().st_size / 1e6,
            size=booster.size,
            low=recipe.sigmas[0],
            high=recipe.sigmas[1],
            recipe=recipe,
            middle=0.75 * recipe.sigmas[1],
            read=trainer.read,
            projector=error if trainer.sees_projector else "",
            pictures=pictures,
            table="\n".join(f"| {name} | {_shown(value)} |" for name, value in figures.items()),
        )
    )


def _shown(value: Mean) -> str:
    interval = "" if value.low is None else f" ({value.low:.3f}-{value.high:.3f}, n = {value.count})"
    return f"{value.value:.3f}{interval}"


_CARD = """\
---
license: apache-2.0
library_name: lmms-smoothguard
---

# A booster for feature-space smoothing

A purifier of {purifier:.2f} M parameters{mapper}, {megabytes:.1f} MB in float16, trained for one vision tower, which stayed frozen; with another one
it is refused. Pictures of {size[0]} x {size[1]}, noise of sigma {low:g} to {high:g} in [0, 1] pixel units.

    {command}

makes it again; another machine's arithmetic gives other weights of the same quality.

    hf_integration.FeatureSmoothingConfig(sigma={middle:g}, booster="<this directory>")

uses it, in `hf_integration.smoothed` or, for a model that answers, as its `generation_config.smoothguard`.

## Held-out figures

Means with Student's 95 % intervals over pictures that training never saw, one noisy copy of each at each noise level. S: the cosine between
what is read of the tower for the clean picture and for the noisy copy: {read}.

| figure | mean |
|---|---|
{table}

## How it was made

{pictures} pictures; {recipe.steps[0]} steps for the purifier, {recipe.steps[1]} for the mapper, {recipe.batch} pictures each; AdamW, peak learning rate {recipe.lr:g},
cosine decay, running mean of the weights. The purifier's loss is the squared error of the pixels plus {recipe.feature_weight:g} times the
features' 1 - cos; the mapper's the features' 1 - cos{projector} plus
{recipe.channel_weight:g} times the error of each channel's mean and variance.

What a purifier takes for noise it takes away: very faint things may vanish. Look at the utility on such pictures before you use it.
"""
