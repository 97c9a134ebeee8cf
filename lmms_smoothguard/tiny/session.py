"""`smoothguard train tiny-llava`: training with progress, evaluation, model card."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

from lmms_smoothguard import progress
from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.tiny.evaluate import held_out_figures
from lmms_smoothguard.tiny.train import Recipe, Trainer, training_scenes

log = logging.getLogger(__name__)


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """The same recipe with a share of its steps and scenes, for a trial run."""
    if scale == 1:
        return recipe
    stages = tuple(dataclasses.replace(stage, steps=max(2, round(stage.steps * scale))) for stage in recipe.stages)
    return dataclasses.replace(
        recipe,
        stages=stages,
        ordinary_scenes=max(200, round(recipe.ordinary_scenes * scale)),
        faint_scenes=max(200, round(recipe.faint_scenes * scale)),
    )


def train(out: Path, seed: int = 0, scale: float = 1.0, checkpoint_every: int = 200) -> dict[str, Rate]:
    """Trains, or goes on training, into `out`; the finished model, its card and its figures go to `out/model`.

    Raises SmoothGuardError when `out` holds a checkpoint of another recipe.
    """
    console = progress.console()
    recipe = scaled(Recipe(seed=seed), scale)
    trainer = Trainer(recipe, out)
    if trainer.resume():
        console.print(f"going on from {out}: stage {trainer.stage.name}, step {trainer.step} of {trainer.stage.steps}")
    console.print(f"drawing {recipe.ordinary_scenes} ordinary and {recipe.faint_scenes} faint scenes")
    scenes = training_scenes(recipe)
    stages = [(stage.name, stage.steps) for stage in recipe.stages]
    with progress.training_bars(console, stages, trainer.stage_index, trainer.step) as bars:
        for _, step, figures in trainer.run(scenes, checkpoint_every):
            said = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            bars.show(trainer.stage_index, step + 1, said)
    target = out / "model"
    trainer.export(target)
    console.print("held-out figures")
    found = held_out_figures(target, say=console.print)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    write_card(target, recipe, parameters, found)
    console.print(f"done: {target}")
    return found


def write_card(target: Path, recipe: Recipe, parameters: int, figures: dict[str, Rate]) -> None:
    """Writes `README.md` (the model card) and `figures.json` beside the weights."""
    command = f"smoothguard train tiny-llava --seed {recipe.seed}"
    record = {
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "parameters": parameters,
        "figures": {name: value.figure().to_dict() for name, value in figures.items()},
    }
    (target / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    stages = "\n".join(
        f"| {s.name} | {s.steps} | {s.batch} | {s.lr:g} | {s.faint_share:.0%} | {s.noised_share:.0%} at sigma {s.sigma[0]:g}-{s.sigma[1]:g} |"
        for s in recipe.stages
    )
    (target / "README.md").write_text(
        _CARD.format(command=command, parameters=parameters / 1e6, table=table, stages=stages, recipe=recipe)
    )


_CARD = """\
---
license: apache-2.0
pipeline_tag: image-text-to-text
library_name: transformers
---

# tiny-llava

A real `LlavaForConditionalGeneration` with {parameters:.2f} M parameters, trained from nothing on generated scenes, so that
attacks and defences can be tried on a trained multimodal model without a download. It answers whether an object is
in a picture, describes a picture in a sentence, refuses one class of requests and does another. It knows nothing else.

    {command}

trains it from its seed. Another machine's arithmetic gives other weights of the same quality.

## Held-out figures

Shares with Wilson 95 % intervals; greedy answers through plain transformers; test scenes and (verb, thing) pairs never
seen in training. Noise is Gaussian in [0, 1] pixel units.

| figure | share |
|---|---|
{table}

## Why the training data looks as it does

Large CLIP-based models are fragile on clean images (LLaVA falls to changes of 2 to 4 grey levels, arXiv 2402.12336) and
yet tolerate Gaussian noise. A small model trained with noise alone is not like that: it is smooth, and what an attack
finds in it survives a defence's noise. This one is trained to be like the large ones: about half of its last
stage are FAINT scenes, never noised, whose objects stand out from the background by a few grey levels only, so that on a
clean picture the model has to react to tiny contrasts; the other half are ordinary scenes, most of them noised.

So its fragility was chosen, to stand in for that of large models. What an attack or a defence reaches on it shows that
the code works and how methods compare under one protocol; it is no forecast for any other model.

The forbidden requests are harmless by construction: neither the question nor the "compliance" carries instructions.

## Data and stages

{recipe.ordinary_scenes} ordinary and {recipe.faint_scenes} faint scenes, 64 x 64, one to four of 30 objects (6 colours x 5
shapes) on textured backgrounds; objects differ in popularity and keep company, so that POPE's random, popular and
adversarial negatives mean something. An object's name is one token.

| stage | steps | batch | peak learning rate | faint | noised (ordinary scenes only) |
|---|---|---|---|---|---|
{stages}
"""
