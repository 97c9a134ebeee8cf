"""A training in stages that goes on after a kill where its last checkpoint stands."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lmms_smoothguard.checkpoints import load_checkpoint, optimizer_tensors, part, restore_optimizer, save_checkpoint
from lmms_smoothguard.precision import autocast
from lmms_smoothguard.tiny.packing import IGNORED, Batch


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of training. Faint examples are never noised; of the others `noised_share` have Gaussian noise, its `sigma` drawn from this
    range, in the units of what is seen or heard ([0, 1] intensities, or amplitude of [-1, 1])."""

    name: str
    steps: int
    batch: int
    lr: float
    sigma: tuple[float, float]
    faint_share: float = 0.0
    noised_share: float = 0.5


class Staged(ABC):
    """Owns the model under training, a head that is used in training alone, their optimiser and its place in the recipe.

    `recipe`: a dataclass with `seed`, `weight_decay` and `stages`; a step depends on the seed and its place alone.
    """

    def __init__(self, recipe: Any, out: Path, model: Any, processor: Any, head: torch.nn.Module) -> None:
        self.recipe, self.out = recipe, out
        self.model, self.processor, self.head = model, processor, head
        self.model.set_attn_implementation("eager")  # on a CPU SDPA's bf16 backward is 2.4 times slower
        self.stage_index, self.step = 0, 0
        self.optimizer = self._optimizer()

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.stage_index]  # type: ignore[no-any-return]

    @property
    def senses_alone(self) -> bool:
        """Whether this stage trains the encoder and the head alone: the first does."""
        return self.stage_index == 0

    @property
    @abstractmethod
    def encoder(self) -> torch.nn.Module:
        """The part of the model that sees or hears."""

    @abstractmethod
    def take_step(self, data: Any) -> dict[str, float]:
        """One optimiser step; the losses and the share of answer tokens that were right."""

    def _optimizer(self) -> torch.optim.AdamW:
        trained = torch.nn.ModuleDict({"body": self.encoder if self.senses_alone else self.model, "head": self.head})
        parameters = list(trained.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.stage.lr, betas=(0.9, 0.98))

    # -- one step ------------------------------------------------------------------------------------------------

    def _learning_rate(self) -> float:
        done = self.step / self.stage.steps
        warm = min(1.0, (self.step + 1) / 100)
        fall = 1 - 0.6 * done if self.senses_alone else 0.02 + 0.49 * (1 + math.cos(math.pi * done))
        return float(self.stage.lr * warm * fall)

    def _answer_loss(
        self, batch: Batch, features: torch.Tensor, place_holder: int, projector: Any, language_model: Any
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The weighted loss over the answers of packed rows, their features (batch, tokens, width) in place of the place holders."""
        with autocast(torch.device("cpu")):
            embeds = self.model.get_input_embeddings()(batch.input_ids)
            sensed = projector(features)
            is_sensed = (batch.input_ids == place_holder)[..., None].expand_as(embeds)
            hidden = language_model(
                inputs_embeds=embeds.masked_scatter(is_sensed, sensed.to(embeds.dtype)),
                attention_mask=batch.attention_mask.to(sensed.dtype),
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state
            asked = batch.targets != IGNORED
            logits = self.model.get_output_embeddings()(hidden[asked]).float()
        targets, weights = batch.targets[asked], batch.weights[asked]
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        certain = weights == weights.max()
        right = (logits.argmax(-1) == targets)[certain].float().mean().item()
        return loss, {"answer_loss": loss.item(), "answers_right": right}

    def _descend(self, loss: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.step += 1

    # -- the whole run, and its checkpoints --------------------------------------------------------------------------

    def run(self, data: Any, checkpoint_every: int = 200) -> Iterator[tuple[Any, int, dict[str, float]]]:
        """Yields (stage, steps done in it, figures) after every step, from wherever the last checkpoint stands."""
        while True:
            while self.step < self.stage.steps:
                yield self.stage, self.step, self.take_step(data)
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
