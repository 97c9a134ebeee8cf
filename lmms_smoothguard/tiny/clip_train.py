"""`smoothguard train tiny-clip`: contrastive training of everything but the vision tower; bit by bit the same on one machine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.tiny.clip_card import write_card
from lmms_smoothguard.tiny.clip_evaluate import held_out_figures
from lmms_smoothguard.tiny.clip_model import WORDINGS, build_model, build_processor, statement
from lmms_smoothguard.tiny.scenes import OBJECTS, SceneSet

if TYPE_CHECKING:
    import torch

_FIRST_SHARD = 51_000  # seeds of scenes that neither a test set nor the tower's own training uses
_VIEWS = 2
_LARGEST_SCALE = math.log(100)


@dataclasses.dataclass(frozen=True)
class ClipRecipe:
    """Everything that decides the weights, given the versions of torch and of the machine's arithmetic."""

    seed: int = 0
    scenes: int = 30_000
    sigma: tuple[float, float] = (0.05, 0.3)
    steps: int = 1500
    batch: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.05
    partial_weight: float = 1.0


def scaled(recipe: ClipRecipe, scale: float) -> ClipRecipe:
    """The same recipe with a share of its steps and scenes, for a trial run."""
    if scale == 1:
        return recipe
    return dataclasses.replace(
        recipe, steps=max(2, round(recipe.steps * scale)), scenes=max(400, round(recipe.scenes * scale))
    )


class Features(NamedTuple):
    """What the locked tower says of each scene: `tokens` (n, views, width), its class token; `present` (n, 30), bool."""

    tokens: torch.Tensor
    present: np.ndarray


def tower_features(model: Any, scenes: SceneSet, recipe: ClipRecipe, batch: int = 250) -> Features:
    """The class token of every scene, clean and once noised; half of the noisy ones are clipped to [0, 1], half are not."""
    import torch

    found = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(scenes.images), batch):
            rng = np.random.default_rng([recipe.seed, 1, start])
            clean = scenes.images[start : start + batch].astype(np.float32) / 255
            sigma = rng.uniform(*recipe.sigma, (len(clean), 1, 1, 1)).astype(np.float32)
            noised = clean + sigma * rng.standard_normal(clean.shape, np.float32)
            noised[::2] = noised[::2].clip(0, 1)
            pixels = torch.from_numpy(np.concatenate([clean, noised])).permute(0, 3, 1, 2) * 2 - 1
            hidden = model.vision_model(pixel_values=pixels).last_hidden_state[:, 0].float()
            found.append(hidden.unflatten(0, (_VIEWS, len(clean))).transpose(0, 1))
    present = np.zeros((len(scenes.images), len(OBJECTS)), bool)
    for index in range(len(present)):
        present[index, list(scenes.present(index))] = True
    return Features(torch.cat(found).clone(), present)


def soft_targets(positive: torch.Tensor) -> torch.Tensor:
    """Rows of a bool matrix as distributions: all positives of a row share its weight."""
    weights = positive.float()
    return weights / weights.sum(1, keepdim=True)


def contrastive_loss(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy where a row (picture) or column (text) may have several positives; both (n, m).

    Two pictures of one caption are each other's positives: as negatives they would ask for what cannot be had.
    """
    from torch.nn.functional import cross_entropy

    there = cross_entropy(logits, soft_targets(positive))
    back = cross_entropy(logits.T, soft_targets(positive.T))
    return (there + back) / 2


class Trainer:
    """Owns the model under training, its optimiser and its place in the recipe."""

    def __init__(self, recipe: ClipRecipe) -> None:
        import torch

        self.recipe, self.step = recipe, 0
        self.processor = build_processor()
        self.model = build_model(self.processor, recipe.seed).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))

    def _images(self, tokens: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import normalize

        pooled = self.model.vision_model.post_layernorm(tokens)
        return normalize(self.model.visual_projection(pooled), dim=-1)

    def _texts(self, texts: list[str]) -> torch.Tensor:
        from torch.nn.functional import normalize

        tokens = self.processor(text=texts, padding=True, return_tensors="pt")
        out = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return normalize(out.pooler_output, dim=-1)

    def loss(self, features: Features) -> torch.Tensor:
        """One batch's loss: whole captions against pictures, and statements about one or two objects against pictures."""
        import torch

        rng = np.random.default_rng([self.recipe.seed, 2, self.step])
        rows = rng.integers(0, len(features.present), self.recipe.batch)
        views = rng.integers(0, _VIEWS, self.recipe.batch)
        images = self._images(features.tokens[rows, views])
        held = features.present[rows]
        whole = np.unique(held, axis=0)
        part = np.eye(len(OBJECTS), dtype=bool)
        pairs = [self._pair(row, rng) for row in held[: self.recipe.batch // 4] if row.sum() > 2]
        partial = np.unique(np.concatenate([part[held.any(0)], *([pairs] if pairs else [])]), axis=0)
        texts = [
            statement(np.flatnonzero(said).tolist(), int(rng.integers(len(WORDINGS) + 1)))
            for said in (*whole, *partial)
        ]
        scale = self.model.logit_scale.exp()
        logits = scale * images @ self._texts(texts).T
        exact = torch.from_numpy((held[:, None] == whole[None]).all(-1))
        implied = torch.from_numpy((held[:, None] >= partial[None]).all(-1))
        whole_logits, partial_logits = logits.split([len(whole), len(partial)], dim=1)
        return contrastive_loss(whole_logits, exact) + self.recipe.partial_weight * contrastive_loss(
            partial_logits, implied
        )

    @staticmethod
    def _pair(held: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        pair = np.zeros(len(held), bool)
        pair[rng.choice(np.flatnonzero(held), 2, replace=False)] = True
        return pair

    def take_step(self, features: Features) -> float:
        """One optimiser step; its loss."""
        import torch

        warm, done = min(1.0, (self.step + 1) / 50), self.step / self.recipe.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        loss = self.loss(features)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=_LARGEST_SCALE)
        self.step += 1
        return loss.item()


def train(
    out: Path, recipe: ClipRecipe, say: Callable[[str], None] = lambda text: None, evaluate: bool = True
) -> dict[str, Rate]:
    """Trains from the recipe's seed into `out`: weights (safetensors), processor, model card and held-out figures."""
    import torch

    from lmms_smoothguard.tiny.train import draw_shards, shard_tasks

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums split by threads differ in their last bits
    try:
        trainer = Trainer(recipe)
        say(f"drawing {recipe.scenes} scenes")
        scenes = draw_shards(shard_tasks(recipe.scenes, 0, _FIRST_SHARD + 100_000 * recipe.seed))
        say("reading them through the locked tower, clean and noised")
        features = tower_features(trainer.model, scenes, recipe)
        for step in range(recipe.steps):
            loss = trainer.take_step(features)
            if step % 100 == 0 or step + 1 == recipe.steps:
                say(f"step {step + 1} of {recipe.steps}, loss {loss:.4f}")
        out.mkdir(parents=True, exist_ok=True)
        trainer.model.eval().save_pretrained(out)
        trainer.processor.save_pretrained(out)
        figures = held_out_figures(out, say) if evaluate else {}
    finally:
        torch.set_num_threads(threads)
    if evaluate:
        write_card(out, recipe, trainer.model, figures)
    return figures
