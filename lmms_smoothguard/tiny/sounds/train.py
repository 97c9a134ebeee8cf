"""Trains the embedded audio model from a seed, in four stages, resumable after a kill.

1. `hearing`: the audio tower alone, a label for every token.
2. `speech`: all of it, on ordinary clips, half of them noised.
3. `contrast`: ordinary noised clips mixed with faint ones that are never noised (the model card says why).
4. `steadiness`: the same mix with more noise.

Clips are drawn as they are needed, no clip twice.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lmms_smoothguard.inputs.log_mel import LogMel
from lmms_smoothguard.precision import autocast
from lmms_smoothguard.tiny.sounds.clips import OBJECTS, Clip, draw_clip
from lmms_smoothguard.tiny.sounds.lessons import Teacher
from lmms_smoothguard.tiny.sounds.model import build_model, build_processor
from lmms_smoothguard.tiny.staged import Stage, Staged

TRAINING_SEED = 1_000
"""Test and validation clips have seeds below."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, given the versions of torch, eSpeak NG and of the machine's arithmetic."""

    seed: int = 0
    weight_decay: float = 0.05
    stages: tuple[Stage, ...] = (
        Stage("hearing", steps=350, batch=64, lr=1.5e-3, sigma=(0.01, 0.04)),
        Stage("speech", steps=1100, batch=32, lr=1.2e-3, sigma=(0.01, 0.04)),
        Stage("contrast", steps=1300, batch=32, lr=1.2e-3, faint_share=0.45, noised_share=0.6, sigma=(0.01, 0.06)),
        Stage("steadiness", steps=1000, batch=32, lr=8e-4, faint_share=0.42, noised_share=0.85, sigma=(0.02, 0.06)),
    )


class TokenHead(torch.nn.Module):
    """The sound that a token belongs to, from its feature; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, len(OBJECTS) + 1)

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`features` (batch, 40, width), `labels` (batch, 40) of 0 or 1 + object."""
        return F.cross_entropy(self.linear(features.float()).flatten(0, 1), labels.flatten())


class AudioTrainer(Staged):
    """Trains the embedded Qwen2-Audio."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, out: Path) -> None:
        processor = build_processor()
        model = build_model(processor, recipe.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            head = TokenHead(model.config.audio_config.d_model)
        self.teacher, self.tokens, self.log_mel = Teacher(processor), head, LogMel(processor.feature_extractor)
        super().__init__(recipe, out, model, processor, head)

    @property
    def encoder(self) -> torch.nn.Module:
        inner: Any = getattr(self.model, "model", self.model)
        return inner.audio_tower  # type: ignore[no-any-return]

    def _draw(self, rng: np.random.Generator) -> tuple[list[Clip], torch.Tensor]:
        """A batch's clips, and their sounds as they are heard: (batch, samples), noised or not, within [-1, 1]."""
        low, high = self.stage.sigma
        clips, sounds = [], []
        for faint in rng.random(self.stage.batch) < self.stage.faint_share:
            clip = draw_clip(rng, faint=bool(faint))
            sound = clip.sound.astype(np.float32) / 32768
            if not faint and rng.random() < self.stage.noised_share:
                sound = (sound + rng.uniform(low, high) * rng.standard_normal(len(sound), np.float32)).clip(-1, 1)
            clips.append(clip)
            sounds.append(sound)
        return clips, torch.from_numpy(np.stack(sounds))

    def take_step(self, data: None = None) -> dict[str, float]:
        rng = np.random.default_rng([TRAINING_SEED + self.recipe.seed, self.stage_index, self.step])
        clips, sounds = self._draw(rng)
        labels = torch.from_numpy(np.stack([clip.labels for clip in clips]).astype(np.int64))
        features = self.log_mel(sounds)
        with autocast(torch.device("cpu")):
            heard = self.encoder(features).last_hidden_state
        loss = token_loss = self.tokens.loss(heard, labels)
        figures = {"token_loss": token_loss.item()}
        if not self.senses_alone:
            inner: Any = getattr(self.model, "model", self.model)
            answer_loss, told = self._answer_loss(
                self.teacher.batch(clips, rng),
                heard,
                self.teacher.token_id,
                inner.multi_modal_projector,
                getattr(inner.language_model, "model", inner.language_model),
            )
            loss = answer_loss + 0.5 * token_loss * (1 - self.step / self.stage.steps)
            figures |= told
        self._descend(loss)
        return figures
