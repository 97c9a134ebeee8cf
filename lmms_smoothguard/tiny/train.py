"""Trains the embedded model from a seed, in four stages, resumable after a kill.

1. `sight`: the vision tower alone, a colour and a shape label for every patch.
2. `speech`: all of it, on ordinary scenes, half of them noised.
3. `contrast`: ordinary noised scenes mixed with faint ones that are never noised (the model card says why).
4. `steadiness`: the same mix with more noise, so that what is seen through noise is seen for certain.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from lmms_smoothguard.checkpoints import load_checkpoint, optimizer_tensors, part, restore_optimizer, save_checkpoint
from lmms_smoothguard.tiny.lessons import IGNORED, Teacher
from lmms_smoothguard.tiny.model import build_model, build_processor
from lmms_smoothguard.tiny.scenes import COLORS, GRID, OBJECTS, SHAPES, SceneSet, color_of, make_scenes, shape_of

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

log = logging.getLogger(__name__)

_SHARD = 1000
_FIRST_TRAINING_SHARD = 1_000  # seeds below are kept for test and validation scenes


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training; noise is Gaussian in [0, 1] pixel units and spares faint scenes."""

    name: str
    steps: int
    batch: int
    lr: float
    faint_share: float = 0.0
    noised_share: float = 0.5
    sigma: tuple[float, float] = (0.12, 0.25)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, given the versions of torch and of the machine's arithmetic."""

    seed: int = 0
    ordinary_scenes: int = 28_000
    faint_scenes: int = 18_000
    weight_decay: float = 0.05
    stages: tuple[Stage, ...] = (
        Stage("sight", steps=300, batch=96, lr=1.5e-3),
        Stage("speech", steps=2200, batch=32, lr=1.2e-3),
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


class Trainer:
    """Owns the model under training, its optimiser and its place in the recipe."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.processor = build_processor()
        self.model: LlavaForConditionalGeneration = build_model(self.processor, recipe.seed)
        self.model.set_attn_implementation("eager")  # on a CPU SDPA's bf16 backward is 2.4 times slower
        self.teacher = Teacher(self.processor)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.head = _PatchHead(self.model.config.vision_config.hidden_size)
        self.stage_index, self.step = 0, 0
        self.optimizer = self._optimizer()

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.stage_index]

    def _trained(self) -> torch.nn.ModuleDict:
        body = self.model.model.vision_tower if self.stage.name == "sight" else self.model
        return torch.nn.ModuleDict({"body": body, "head": self.head})

    def _optimizer(self) -> torch.optim.AdamW:
        parameters = list(self._trained().parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.stage.lr, betas=(0.9, 0.98))

    # -- one step ------------------------------------------------------------------------------------------------

    def _learning_rate(self) -> float:
        done = self.step / self.stage.steps
        warm = min(1.0, (self.step + 1) / 100)
        fall = 1 - 0.6 * done if self.stage.name == "sight" else 0.02 + 0.49 * (1 + math.cos(math.pi * done))
        return self.stage.lr * warm * fall

    def _pixels(self, scenes: SceneSet, indices: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
        images = scenes.images[indices].astype(np.float32) / 255
        patches = scenes.patches[indices].reshape(-1, GRID, GRID).astype(np.int64)
        mirrored = rng.random(len(indices)) < 0.5
        images[mirrored], patches[mirrored] = images[mirrored, :, ::-1], patches[mirrored, :, ::-1]
        sigma = rng.uniform(*self.stage.sigma, len(indices)).astype(np.float32)
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
        """One optimiser step; the losses and the share of answer tokens that were right."""
        rng = np.random.default_rng([self.recipe.seed, self.stage_index, self.step])
        indices = self._draw(rng)
        pixels, patches = self._pixels(scenes, indices, rng)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        inner = self.model.model
        with torch.autocast("cpu", torch.bfloat16):
            features = inner.vision_tower(pixels).last_hidden_state[:, 1:]
        patch_loss = self.head.loss(features, patches)
        figures = {"patch_loss": patch_loss.item()}
        if self.stage.name == "sight":
            loss = patch_loss
        else:
            batch = self.teacher.batch(scenes, indices.tolist(), rng)
            with torch.autocast("cpu", torch.bfloat16):
                embeds = inner.get_input_embeddings()(batch.input_ids)
                images = inner.multi_modal_projector(features).to(embeds.dtype)
                is_image = (batch.input_ids == self.processor.image_token_id)[..., None].expand_as(embeds)
                embeds = embeds.masked_scatter(is_image, images)
                hidden = inner.language_model(
                    inputs_embeds=embeds,
                    attention_mask=batch.attention_mask.to(torch.bfloat16),
                    position_ids=batch.position_ids,
                    use_cache=False,
                ).last_hidden_state
                asked = batch.targets != IGNORED
                logits = self.model.lm_head(hidden[asked]).float()
            targets, weights = batch.targets[asked], batch.weights[asked]
            answer_loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
            loss = answer_loss + 0.5 * patch_loss * (1 - self.step / self.stage.steps)
            figures |= {
                "answer_loss": answer_loss.item(),
                "answers_right": (logits.argmax(-1) == targets)[weights == 3].float().mean().item(),
            }
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.step += 1
        return figures

    # -- the whole run, and its checkpoints --------------------------------------------------------------------------

    def run(self, scenes: SceneSet, checkpoint_every: int = 200) -> Iterator[tuple[Stage, int, dict[str, float]]]:
        """Yields (stage, steps done in it, figures) after every step, from wherever the last checkpoint stands."""
        while True:
            while self.step < self.stage.steps:
                yield self.stage, self.step, self.take_step(scenes)
                if self.step % checkpoint_every == 0 and self.step < self.stage.steps:
                    self.save()
            if self.stage_index + 1 == len(self.recipe.stages):
                break
            self.stage_index, self.step = self.stage_index + 1, 0
            self.optimizer = self._optimizer()
            self.save()
        self.save()

    def save(self) -> None:
        """Writes a checkpoint."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"head.{k}": v for k, v in self.head.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        save_checkpoint(self.out, tensors, dataclasses.asdict(self.recipe), [self.stage_index, self.step])

    def resume(self) -> bool:
        """Goes on from a checkpoint of the same recipe; False where there is none.

        Raises ConfigError when the checkpoint belongs to another recipe.
        """
        found = load_checkpoint(self.out, dataclasses.asdict(self.recipe))
        if found is None:
            return False
        tensors, (self.stage_index, self.step) = found
        self.model.load_state_dict(part(tensors, "model."))
        self.head.load_state_dict(part(tensors, "head."))
        self.optimizer = self._optimizer()
        restore_optimizer(self.optimizer, part(tensors, "optimizer."))
        return True

    def export(self, target: Path) -> None:
        """Writes model (fp32 safetensors) and processor as any transformers checkpoint."""
        target.mkdir(parents=True, exist_ok=True)
        training = self.model.training
        self.model.eval().save_pretrained(target)
        self.model.train(training)
        self.processor.save_pretrained(target)
