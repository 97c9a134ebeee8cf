"""Trains a booster for a model that stays frozen: the purifier first, then the mapper behind it (self-supervised, no labels).

Purifier: ||P(x + e, s) - x||^2 + weight (1 - cos(f(P(x + e, s)), f(x))), s drawn over the noise range. Mapper: 1 - cos(M(f(P(x + e))), f(x)),
the error of the projector's output, and each channel's mean and variance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, mse_loss

from lmms_smoothguard.boosting.booster import Booster, read_purifier
from lmms_smoothguard.boosting.mapper import Mapper, MapperConfig
from lmms_smoothguard.boosting.purifier import Purifier, PurifierConfig
from lmms_smoothguard.checkpoints import load_checkpoint, optimizer_tensors, part, restore_optimizer, save_checkpoint
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.means import Mean, mean
from lmms_smoothguard.fingerprint import model_fingerprint, weights_print
from lmms_smoothguard.inputs.statistics import PixelStatistics, pixel_statistics
from lmms_smoothguard.precision import autocast
from lmms_smoothguard.smoothing.towers import Tower, find_tower
from lmms_smoothguard.training.pictures import Source, to_pixels

STAGES = ("purifier", "mapper")


@dataclasses.dataclass(frozen=True)
class BoosterRecipe:
    """Everything that decides the weights, given model, pictures, versions and the machine's arithmetic.

    steps: of the purifier, of the mapper (0 = none); sigmas: the range of noise levels, in [0, 1] pixel units; feature_weight: of
    the features against the pixels in the purifier's loss; projector_weight, channel_weight: in the mapper's; start: a booster whose
    purifier to begin with, for noise is much the same to every tower.
    """

    seed: int = 0
    steps: tuple[int, int] = (3000, 400)
    batch: int = 32
    lr: float = 1.5e-3
    weight_decay: float = 1e-3
    sigmas: tuple[float, float] = (0.0, 0.4)
    feature_weight: float = 1.0
    projector_weight: float = 0.5
    channel_weight: float = 0.1
    purifier: PurifierConfig = dataclasses.field(default_factory=PurifierConfig)
    start: str | None = None
    mapper_hidden: int = 384
    mapper_blocks: int = 2


class BoosterTrainer:
    """Owns the booster under training, its optimiser and its place in the recipe."""

    def __init__(self, recipe: BoosterRecipe, model: Any, processor: Any, pictures: Source, out: Path) -> None:
        """Raises ConfigError or UndefendableError for a model whose tower takes no plain pictures."""
        self.recipe, self.out, self._pictures = recipe, out, pictures
        self._processor = getattr(processor, "image_processor", processor)
        self._tower: Tower = find_tower(model)
        self._device = next(self._tower.module.parameters()).device
        self._statistics: PixelStatistics = pixel_statistics(model, self._processor)
        first = self._pixels(pictures, np.zeros(1, int))
        self._size = tuple(first.shape[-2:])
        model.requires_grad_(False).eval()
        self._model_print = model_fingerprint(model)
        clean = self.features(first)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.purifier = Purifier(recipe.purifier).to(self._device)
            if recipe.start is not None:
                self._begin_from(recipe.start)
            configs = [
                MapperConfig(width=f.shape[-1], hidden=recipe.mapper_hidden, blocks=recipe.mapper_blocks) for f in clean
            ]
            self.mappers = torch.nn.ModuleList(Mapper(config) for config in configs).to(self._device)
        self._projector = _projector(model, clean)
        self._mean = {name: value.clone() for name, value in self._trained().state_dict().items()}
        self.stage, self.step = 0, 0
        self._optimizer = self._new_optimizer()

    @property
    def booster(self) -> Booster:
        """What has been trained so far: the running mean of the weights."""
        purifier, mappers = Purifier(self.recipe.purifier), torch.nn.ModuleList(Mapper(m.config) for m in self.mappers)  # type: ignore[arg-type]
        parts = torch.nn.ModuleDict({"purifier": purifier, "mappers": mappers})
        parts.load_state_dict(self._mean)
        parts.requires_grad_(False).eval()
        size = (int(self._size[0]), int(self._size[1]))
        return Booster(
            purifier,
            mappers if self.recipe.steps[1] else None,
            self.recipe.sigmas,
            size,
            weights_print(self._tower.module),
        )

    @property
    def read(self) -> str:
        """What is read of the tower, in words."""
        return "its pooled output" if self._tower.dual else "the tokens that the language model reads, meaned over them"

    @property
    def sees_projector(self) -> bool:
        """Whether the mapper's loss looks behind the projector."""
        return self._projector is not None

    def _begin_from(self, source: str) -> None:
        """Raises ConfigError for a purifier of another shape."""
        found = read_purifier(source)
        if found.config != self.recipe.purifier:
            raise ConfigError(
                f"the purifier of {source} has widths {found.config.widths} and unshuffle {found.config.unshuffle}; expected "
                f"{self.recipe.purifier.widths} and {self.recipe.purifier.unshuffle}: give the same ones, or no start"
            )
        self.purifier.load_state_dict(found.state_dict())

    def _trained(self) -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({"purifier": self.purifier, "mappers": self.mappers})

    def _new_optimizer(self) -> torch.optim.Optimizer:
        module = self.purifier if self.stage == 0 else self.mappers
        return torch.optim.AdamW(
            module.parameters(), lr=self.recipe.lr, betas=(0.9, 0.98), weight_decay=self.recipe.weight_decay
        )

    # -- one step ------------------------------------------------------------------------------------------------------

    def _pixels(self, pictures: Source, chosen: np.ndarray) -> torch.Tensor:
        """(len(chosen), 3, height, width) in [0, 1], as the model sees them; of tiles the first, which is the whole picture.

        Raises ConfigError for other shapes.
        """
        made = to_pixels(self._processor, pictures.pictures(chosen.tolist()))
        if made.ndim == 5:
            made = made[:, 0]
        if made.ndim != 4:
            raise ConfigError(
                f"{type(self._processor).__name__} makes pixels of shape {tuple(made.shape)}; expected (pictures, 3, height, width): boosters "
                "are for towers that take plain pictures"
            )
        return made.to(self._device)

    def _mirrored(self, pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Half of them from left to right."""
        mirrored = torch.from_numpy(rng.random(len(pixels)) < 0.5).to(pixels.device)
        return torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)

    def features(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the model reads of its tower for pictures in [0, 1]: of each layer (batch, tokens, width)."""
        mean, std = (value.to(pixels.device).view(-1, 1, 1) for value in self._statistics[:2])
        layers = {"output_hidden_states": True} if self._tower.layers else {}
        kind = next(self._tower.module.parameters()).dtype
        output = self._tower.module(((pixels - mean) / std).to(kind), **layers)
        return tuple(found.float() for found in self._tower.selected(output))

    def _learning_rate(self) -> float:
        done = self.step / self.recipe.steps[self.stage]
        return self.recipe.lr * min(1.0, (self.step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))

    def take_step(self) -> dict[str, float]:
        """One optimiser step; the parts of the loss."""
        rng = np.random.default_rng([self.recipe.seed, self.stage, self.step])
        chosen = rng.integers(0, len(self._pictures), self.recipe.batch)
        clean = self._mirrored(self._pixels(self._pictures, chosen), rng)
        sigma = torch.from_numpy(rng.uniform(*self.recipe.sigmas, len(clean)).astype(np.float32)).to(self._device)
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32)).to(self._device)
        noisy = (clean + sigma.view(-1, 1, 1, 1) * noise).clamp(0, 1)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with autocast(self._device):
            with torch.no_grad():
                wanted = self.features(clean)
            losses = (
                self._purifier_losses(clean, noisy, sigma, wanted)
                if self.stage == 0
                else self._mapper_losses(noisy, sigma, wanted)
            )
        loss = sum(weight * value for weight, value in losses.values())
        if not bool(torch.isfinite(loss)):  # type: ignore[arg-type]
            raise ConfigError(
                f"the loss of step {self.step} is {float(loss)}; expected a lower learning rate than {self.recipe.lr:g}"
            )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(self._optimizer.param_groups[0]["params"], 0.3)
        self._optimizer.step()
        self.step += 1
        self._average()
        return {name: float(value.detach()) for name, (_, value) in losses.items()}

    def _purifier_losses(
        self, clean: torch.Tensor, noisy: torch.Tensor, sigma: torch.Tensor, wanted: tuple[torch.Tensor, ...]
    ) -> dict[str, tuple[float, torch.Tensor]]:
        purified = self.purifier(noisy, sigma).float()
        return {
            "pixels": (1.0, mse_loss(purified, clean)),
            "features": (self.recipe.feature_weight, _apart(self.features(purified), wanted)),
        }

    def _mapper_losses(
        self, noisy: torch.Tensor, sigma: torch.Tensor, wanted: tuple[torch.Tensor, ...]
    ) -> dict[str, tuple[float, torch.Tensor]]:
        with torch.no_grad():
            found = self.features(self.purifier(noisy, sigma).float())
        mapped = tuple(
            (mapper(one, sigma).float() if one.ndim == 3 else one)
            for mapper, one in zip(self.mappers, found, strict=True)
        )
        losses = {"features": (1.0, _apart(mapped, wanted))}
        if self._projector is not None:
            # As they are served: the mapped direction with the length that the feature had.
            served = [
                m * (f.norm(dim=-1, keepdim=True) / m.norm(dim=-1, keepdim=True))
                for m, f in zip(mapped, found, strict=True)
            ]
            aim = self._projector(torch.cat(wanted, -1)).float()
            error = mse_loss(self._projector(torch.cat(served, -1)).float(), aim) / aim.var()
            losses["projector"] = (self.recipe.projector_weight, error)
        channels = [
            mse_loss(m.mean((0, 1)), w.mean((0, 1))) / w.var() + mse_loss(m.var((0, 1)), w.var((0, 1))) / w.var() ** 2
            for m, w in zip(mapped, wanted, strict=True)
        ]
        losses["channels"] = (self.recipe.channel_weight, torch.stack(channels).mean())
        return losses

    def _average(self) -> None:
        """The running mean of the weights (EMA), which is what is kept in the end."""
        keep = min(0.995, self.step / (self.step + 10))
        prefix = ("purifier.", "mappers.")[self.stage]
        with torch.no_grad():
            for name, value in self._trained().state_dict().items():
                if name.startswith(prefix):
                    self._mean[name].lerp_(value, 1 - keep)

    # -- what has been learnt ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def held_out_figures(self, booster: Booster, held_out: Source) -> dict[str, Mean]:
        """By name, meaned over pictures that training never saw, one noisy copy of each at each noise level: S, the cosine between
        what the model reads of the clean picture and of the copy; and the purifier's signal-to-noise ratio in dB."""
        figures: dict[str, Mean] = {}
        low, high = self.recipe.sigmas
        for level in np.linspace(low, high, 4)[1:]:
            rows: dict[str, list[float]] = {}
            for start in range(0, len(held_out), self.recipe.batch):
                chosen = np.arange(start, min(start + self.recipe.batch, len(held_out)))
                scores = self._scores(booster, self._pixels(held_out, chosen), float(level), start)
                for name, values in scores.items():
                    rows.setdefault(name, []).extend(values.tolist())
            figures |= {f"{name}, sigma {level:.3g}": mean(values) for name, values in rows.items()}
        return figures

    def _scores(self, booster: Booster, clean: torch.Tensor, sigma: float, number: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.recipe.seed, 2, number])
        noise = torch.from_numpy(rng.standard_normal(clean.shape, np.float32)).to(self._device)
        noisy = (clean + sigma * noise).clamp(0, 1)
        purified = booster.purify(noisy, sigma)
        wanted, plain, behind = self.features(clean), self.features(noisy), self.features(purified)
        found = {"S, tower alone": _cosines(plain, wanted), "S, with purifier": _cosines(behind, wanted)}
        if booster.maps:
            mapped = tuple(booster.map(layer, one, sigma) for layer, one in enumerate(behind))
            found["S, with purifier and mapper"] = _cosines(mapped, wanted)
        found["PSNR, noisy"] = -10 * (noisy - clean).square().mean((1, 2, 3)).log10()
        found["PSNR, purified"] = -10 * (purified - clean).square().mean((1, 2, 3)).log10()
        return found

    # -- the whole run, and its checkpoints ----------------------------------------------------------------------------

    def run(self, checkpoint_every: int = 200) -> Iterator[tuple[int, int, dict[str, float]]]:
        """Yields (stage, steps done in it, parts of the loss) after every step, from wherever the last checkpoint stands."""
        while True:
            while self.step < self.recipe.steps[self.stage]:
                yield self.stage, self.step, self.take_step()
                if self.step % checkpoint_every == 0:
                    self.save()
            if self.stage + 1 == len(STAGES):
                break
            self._trained().load_state_dict(self._mean)  # the mapper learns behind the purifier that will be served
            self.stage, self.step = self.stage + 1, 0
            self._optimizer = self._new_optimizer()
            self.save()
        self.save()

    def _identity(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.recipe),
            "model": self._model_print,
            "pictures": self._pictures.identity,
        }

    def save(self) -> None:
        """Writes a checkpoint."""
        tensors = {f"now.{k}": v for k, v in self._trained().state_dict().items()}
        tensors |= {f"mean.{k}": v for k, v in self._mean.items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self._optimizer).items()}
        save_checkpoint(self.out, tensors, self._identity(), [self.stage, self.step])

    def resume(self) -> bool:
        """Goes on from a checkpoint of the same recipe, model and pictures; False where there is none.

        Raises ConfigError where it belongs to others.
        """
        found = load_checkpoint(self.out, self._identity())
        if found is None:
            return False
        tensors, (self.stage, self.step) = found
        self._trained().load_state_dict(part(tensors, "now."))
        self._mean = {name: value.to(self._device) for name, value in part(tensors, "mean.").items()}
        self._optimizer = self._new_optimizer()
        restore_optimizer(self._optimizer, part(tensors, "optimizer."))
        return True


def _apart(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """1 - cos, meaned over pictures, tokens and layers."""
    return 1 - _cosines(found, wanted).mean()


def _cosines(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(batch,): meaned over tokens and layers."""
    return torch.stack([cosine_similarity(f, w, dim=-1).mean(-1) for f, w in zip(found, wanted, strict=True)]).mean(0)


def _projector(model: Any, features: tuple[torch.Tensor, ...]) -> Any:
    """The model's projector, where it takes the features as they are; None where it takes something else."""
    found = next((module for name, module in model.named_modules() if name.endswith("multi_modal_projector")), None)
    try:
        with torch.no_grad():
            if found is not None and found(torch.cat(features, -1)).ndim == 3:
                return found
    except (RuntimeError, TypeError, ValueError):  # one that wants grids, sizes or another shape
        return None
    return None
