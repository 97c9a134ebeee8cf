"""`smoothguard train tiny-audio`: training with progress, evaluation, figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from lmms_smoothguard import progress
from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.tiny.sounds.card import card
from lmms_smoothguard.tiny.sounds.evaluate import held_out_figures
from lmms_smoothguard.tiny.sounds.train import AudioTrainer, Recipe


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """The same recipe with a share of its steps, for a trial run."""
    if scale == 1:
        return recipe
    stages = tuple(dataclasses.replace(stage, steps=max(2, round(stage.steps * scale))) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages)


def train(out: Path, seed: int = 0, scale: float = 1.0, checkpoint_every: int = 200) -> dict[str, Rate]:
    """Trains, or goes on training, into `out`; the finished model and its held-out figures go to `out/model`.

    Raises SmoothGuardError when `out` holds a checkpoint of another recipe, and without eSpeak NG.
    """
    console = progress.console()
    recipe = scaled(Recipe(seed=seed), scale)
    trainer = AudioTrainer(recipe, out)
    if trainer.resume():
        console.print(f"going on from {out}: stage {trainer.stage.name}, step {trainer.step} of {trainer.stage.steps}")
    stages = [(stage.name, stage.steps) for stage in recipe.stages]
    with progress.training_bars(console, stages, trainer.stage_index, trainer.step) as bars:
        for _, step, figures in trainer.run(None, checkpoint_every):
            bars.show(
                trainer.stage_index, step + 1, "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
            )
    target = out / "model"
    trainer.export(target)
    console.print("held-out figures")
    found = held_out_figures(target, say=console.print)
    command = f"smoothguard train tiny-audio --seed {recipe.seed}"
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    record = {
        "command": command,
        "recipe": dataclasses.asdict(recipe),
        "parameters": parameters,
        "figures": {name: value.figure().to_dict() for name, value in found.items()},
    }
    (target / "figures.json").write_text(json.dumps(record, indent=1) + "\n")
    (target / "README.md").write_text(card(recipe, command, parameters, found))
    console.print(f"done: {target}")
    return found
