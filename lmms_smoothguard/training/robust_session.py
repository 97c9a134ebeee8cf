"""A run of FARE or TeCoA: data, training with progress, the tower as a checkpoint of its own, figures, model card."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from lmms_smoothguard import progress
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.reproducible import reproducible_sums
from lmms_smoothguard.training import pictures, robust_models
from lmms_smoothguard.training.robust import RobustRecipe, RobustTrainer
from lmms_smoothguard.training.robust_card import Figures, write_card

EMBEDDED = ("tiny-llava", "tiny-clip")
_EMBEDDED_LR = {"fare": 4e-4, "tecoa": 3e-4}
_PUBLISHED_LR = 1e-5
_SCENES_NOISED = 0.25


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; see `RobustRecipe`."""

    method: str
    model: str
    data: str
    out: Path
    eps: str
    steps: int
    inner_steps: int
    batch: int
    lr: float | None
    seed: int
    scenes: int
    checkpoint_every: int
    questions: int
    tokens: str = "read"
    faint_share: float = 0.0
    noised_share: float | None = None
    device: str | None = None

    @property
    def command(self) -> str:
        """The command that repeats it."""
        parts = [
            f"smoothguard train {self.method} --model {Path(self.model).name} --data {Path(self.data).name} --eps {self.eps}"
        ]
        parts += [f"--steps {self.steps} --inner-steps {self.inner_steps} --batch {self.batch} --seed {self.seed}"]
        parts += [f"--lr {self.lr:g}"] if self.lr is not None else []
        parts += [f"--noised-share {self.noised_share:g}"] if self.noised_share is not None else []
        if self.data == "scenes":
            parts.append(f"--scenes {self.scenes}")
            parts += [f"--faint-share {self.faint_share:g}"] if self.method == "fare" else []
        return " ".join(parts + ([f"--tokens {self.tokens}"] if self.method == "fare" else []))

    def recipe(self) -> RobustRecipe:
        """Raises ConfigError for settings that cannot be meant."""
        lr = self.lr
        if lr is None:
            lr = _EMBEDDED_LR[self.method] if self.model in EMBEDDED else _PUBLISHED_LR
        noised = self.noised_share
        if noised is None:
            noised = _SCENES_NOISED if self.data == "scenes" else 0.0
        return RobustRecipe(
            method=self.method,
            eps=radius(self.eps),
            steps=self.steps,
            inner_steps=self.inner_steps,
            batch=self.batch,
            lr=lr,
            tokens=self.tokens,
            noised_share=noised,
            seed=self.seed,
        )


def radius(text: str) -> float:
    """`4/255` or `0.0157` as a number. Raises ConfigError for anything else."""
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"eps is {text!r}; expected a number or a fraction, such as 4/255") from error


def sources(asked: Asked) -> tuple[pictures.Source, pictures.Source]:
    """Pictures to train on, and pictures held out. Raises ConfigError for data that cannot be used."""
    labelled = asked.method == "tecoa"
    if asked.data != "scenes":
        return pictures.folder_sources(Path(asked.data), labelled=labelled)
    faint = round(asked.scenes * asked.faint_share)
    train = pictures.scene_source(asked.scenes, faint, asked.seed, labelled=labelled)
    return train, pictures.held_out_scenes(labelled=labelled)


def train(asked: Asked) -> list[Figures]:
    """Trains, or goes on training, into `out`; the tower in fp16, its card and its figures go to `out/model`.

    Raises SmoothGuardError for settings, models and data that cannot be used, and for a checkpoint of another recipe.
    """
    from lmms_smoothguard.training.robust_figures import held_out_figures

    reproducible_sums()
    console = progress.console()
    recipe = asked.recipe()
    subject = robust_models.load(asked.model, asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source, held_out = sources(asked)
    trainer = RobustTrainer(recipe, subject, source, asked.out)
    if trainer.resume():
        console.print(f"going on from {asked.out}: step {trainer.step} of {recipe.steps}")
    with progress.training_bars(console, [(asked.method, recipe.steps)], 0, trainer.step) as bars:
        for step, loss in trainer.run(asked.checkpoint_every):
            bars.show(0, step, f"loss under attack {loss:.4g}")
    target = asked.out / "model"
    tower = export(subject, target)
    console.print("held-out figures")
    figures = held_out_figures(trainer, tower, held_out, asked.questions, console.print)
    write_card(target, asked.command, trainer, figures)
    console.print(f"done: {target}")
    return figures


def export(subject: robust_models.Subject, target: Path) -> Any:
    """Writes the tower (fp16 safetensors) and its image processor, as `CLIPVisionModel.from_pretrained` reads them.

    Returns the tower as written, rounded to fp16, in fp32: what figures are measured on.
    """
    target.mkdir(parents=True, exist_ok=True)
    rounded = copy.deepcopy(subject.tower).cpu().half()
    rounded.save_pretrained(target)
    os.chmod(target / "model.safetensors", 0o644)
    subject.image_processor.save_pretrained(target)
    device = next(subject.tower.parameters()).device
    return rounded.float().to(device).eval().requires_grad_(False)
