"""Trains the embedded model from a seed, in four stages, resumable after a kill.

1. `sight`: the vision tower alone, a colour and a shape label for every patch.
2. `speech`: all of it, on ordinary scenes, half of them noised.
3. `contrast`: ordinary noised scenes mixed with faint ones that are never noised (the model card says why).
4. `steadiness`: the same mix with more noise, so that what is seen through noise is seen for certain.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from lmms_smoothguard.precision import autocast
from lmms_smoothguard.tiny.lessons import Teacher
from lmms_smoothguard.tiny.model import build_model, build_processor
from lmms_smoothguard.tiny.scenes import COLORS, GRID, OBJECTS, SHAPES, SceneSet, color_of, make_scenes, shape_of
from lmms_smoothguard.tiny.staged import Stage, Staged

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

_SHARD = 1000
_FIRST_TRAINING_SHARD = 1_000  # seeds below are kept for test and validation scenes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, given the versions of torch and of the machine's arithmetic."""

    seed: int = 0
    ordinary_scenes: int = 28_000
    faint_scenes: int = 18_000
    weight_decay: float = 0.05
    stages: tuple[Stage, ...] = (
        Stage("sight", steps=300, batch=96, lr=1.5e-3, sigma=(0.12, 0.25)),
        Stage("speech", steps=2200, batch=32, lr=1.2e-3, sigma=(0.12, 0.25)),
        Stage("contrast", steps=2400, batch=32, lr=1.2e-3, faint_share=0.45, noised_share=0.6, sigma=(0.12, 0.3)),
        Stage("steadiness", steps=2000, batch=32, lr=8e-4, faint_share=0.42, noised_share=0.85, sigma=(0.15, 0.3)),
    )


class _PatchHead(torch.nn.Module):
    """Colour and shape of a patch from its feature; used in training only."""

    colors: torch.Tensor
    shapes: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, len(COLORS) + 1 + len(SHAPES) + 1)
        self.register_buffer("colors", torch.tensor([0] + [color_of(o) + 1 for o in range(len(OBJECTS))]), False)
        self.register_buffer("shapes", torch.tensor([0] + [shape_of(o) + 1 for o in range(len(OBJECTS))]), False)

    def loss(self, features: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """`features` (batch, 64, width), `patches` (batch, 64) of 0 or 1 + object."""
        color, shape = self.linear(features.float()).split([len(COLORS) + 1, len(SHAPES) + 1], dim=-1)
        return F.cross_entropy(color.flatten(0, 1), self.colors[patches].flatten()) + F.cross_entropy(
            shape.flatten(0, 1), self.shapes[patches].flatten()
        )


def _shard(task: tuple[int, int, bool]) -> SceneSet:
    count, seed, faint = task
    return make_scenes(count, seed, faint=faint)


def draw_shards(tasks: list[tuple[int, int, bool]]) -> SceneSet:
    """Scenes of (count, seed, faint) each, one after the other; drawn on all cores, the same on any number of them."""
    import multiprocessing

    if len(tasks) == 1:
        return _shard(tasks[0])
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        shards = pool.map(_shard, tasks, chunksize=1)
    return SceneSet(*(np.concatenate(parts) for parts in zip(*shards, strict=True)))


def shard_tasks(ordinary: int, faint: int, base: int) -> list[tuple[int, int, bool]]:
    """What `draw_shards` draws for `ordinary` scenes and then `faint` ones, with seeds from `base` on."""
    return [
        (min(_SHARD, total - start), base + start // _SHARD, is_faint)
        for total, is_faint in ((ordinary, False), (faint, True))
        for start in range(0, total, _SHARD)
    ]


def training_scenes(recipe: Recipe) -> SceneSet:
    """Ordinary scenes first, then faint ones."""
    base = _FIRST_TRAINING_SHARD + 100_000 * recipe.seed
    return draw_shards(shard_tasks(recipe.ordinary_scenes, recipe.faint_scenes, base))


class Trainer(Staged):
    """Trains the embedded LLaVA on `training_scenes`."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, out: Path) -> None:
        processor = build_processor()
        model: LlavaForConditionalGeneration = build_model(processor, recipe.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            head = _PatchHead(model.config.vision_config.hidden_size)
        self.teacher, self.patches = Teacher(processor), head
        super().__init__(recipe, out, model, processor, head)

    @property
    def encoder(self) -> torch.nn.Module:
        return self.model.model.vision_tower  # type: ignore[no-any-return]

    def _pixels(self, scenes: SceneSet, indices: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        images = scenes.images[indices].astype(np.float32) / 255
        patches = scenes.patches[indices].reshape(-1, GRID, GRID).astype(np.int64)
        mirrored = rng.random(len(indices)) < 0.5
        images[mirrored], patches[mirrored] = images[mirrored, :, ::-1], patches[mirrored, :, ::-1]
        low, high = self.stage.sigma
        sigma = rng.uniform(low, high, len(indices)).astype(np.float32)
        sigma *= (rng.random(len(indices)) < self.stage.noised_share) & (indices < self.recipe.ordinary_scenes)
        noise = rng.standard_normal(images.shape, np.float32) * sigma[:, None, None, None]
        pixels = torch.from_numpy((images + noise).clip(0, 1)).permute(0, 3, 1, 2) * 2 - 1
        return pixels.contiguous(), torch.from_numpy(patches).flatten(1)

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        ordinary = rng.integers(0, self.recipe.ordinary_scenes, self.stage.batch)
        if not self.stage.faint_share:
            return ordinary
        total = self.recipe.ordinary_scenes + self.recipe.faint_scenes
        faint = rng.integers(self.recipe.ordinary_scenes, total, self.stage.batch)
        return np.where(rng.random(self.stage.batch) < self.stage.faint_share, faint, ordinary)

    def take_step(self, scenes: SceneSet) -> dict[str, float]:
        rng = np.random.default_rng([self.recipe.seed, self.stage_index, self.step])
        indices = self._draw(rng)
        pixels, patches = self._pixels(scenes, indices, rng)
        inner = self.model.model
        with autocast(torch.device("cpu")):
            features = inner.vision_tower(pixels).last_hidden_state[:, 1:]
        loss = patch_loss = self.patches.loss(features, patches)
        figures = {"patch_loss": patch_loss.item()}
        if not self.senses_alone:
            batch = self.teacher.batch(scenes, indices.tolist(), rng)
            answer_loss, told = self._answer_loss(
                batch, features, self.processor.image_token_id, inner.multi_modal_projector, inner.language_model
            )
            loss = answer_loss + 0.5 * patch_loss * (1 - self.step / self.stage.steps)
            figures |= told
        self._descend(loss)
        return figures
