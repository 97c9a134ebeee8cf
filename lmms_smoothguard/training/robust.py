"""Adversarial fine-tuning of a CLIP-type vision tower: FARE and TeCoA.

FARE (Schlarmann et al. 2024, section 3): min over the tower f of the mean over pictures x of
max_{|d|_inf <= eps} sum over tokens |f(x + d) - f_orig(x)|^2. No labels.

TeCoA (Mao et al. 2023, section 3.2): min over f of the mean of max_{|d|_inf <= eps} CE(s cos(f(x + d), text of each class), class
of x): the dual encoder's own zero-shot classification, its text tower and projections frozen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lmms_smoothguard.checkpoints import load_checkpoint, optimizer_tensors, part, restore_optimizer, save_checkpoint
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.precision import autocast
from lmms_smoothguard.training.pictures import Source, to_pixels
from lmms_smoothguard.training.robust_models import Subject

METHODS = ("fare", "tecoa")
Loss = Callable[[torch.Tensor], torch.Tensor]
"""Pixels (n, 3, h, w) in [0, 1] -> each picture's loss (n,); larger is better for the attacker, worse for the tower."""


@dataclasses.dataclass(frozen=True)
class RobustRecipe:
    """Everything that decides the weights, given model, data, the versions of torch and of the machine's arithmetic.

    eps: radius of the L-inf ball in [0, 1] pixel units; inner_steps: of the attack within each step, of length
    2.5 eps / inner_steps from a random start; tokens: see `robust_models.Reader`, FARE alone; noised_share: of pictures with
    Gaussian noise of a sigma between `sigma`, in pixel units, clipped, which then counts as the clean picture.
    """

    method: str
    eps: float = 4 / 255
    steps: int = 1000
    inner_steps: int = 10
    batch: int = 32
    lr: float = 1e-5
    weight_decay: float = 1e-4
    tokens: str = "read"
    noised_share: float = 0.0
    sigma: tuple[float, float] = (0.1, 0.3)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; expected one of {', '.join(METHODS)}")
        if not (math.isfinite(self.eps) and 0 < self.eps <= 1):
            raise ConfigError(
                f"eps is {self.eps!r}; expected a radius in [0, 1] pixel units above 0, such as 4/255: without one nothing is adversarial"
            )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr is {self.lr!r}; expected a number above 0")
        if not 0 <= self.noised_share <= 1:
            raise ConfigError(f"noised_share is {self.noised_share!r}; expected a share from 0 to 1")
        for name in ("steps", "inner_steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected a whole number from 1 on")


def worst_case(loss: Loss, clean: torch.Tensor, eps: float, steps: int, rng: np.random.Generator) -> torch.Tensor:
    """PGD (Madry et al. 2018): pictures in the L-inf ball around `clean` and in [0, 1] that raise `loss`.

    Starts at random, where FARE's loss has a gradient: at the clean picture of an untrained copy it is zero.
    """
    start = torch.from_numpy(rng.uniform(-eps, eps, tuple(clean.shape)).astype(np.float32)).to(clean.device)
    attacked = (clean + start).clamp(0, 1)
    for _ in range(steps):
        attacked.requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(attacked).sum(), attacked)
        with torch.no_grad():
            moved = attacked + 2.5 * eps / steps * gradient.sign()
            attacked = torch.minimum(torch.maximum(moved, clean - eps), clean + eps).clamp(0, 1)
    return attacked.detach()


class RobustTrainer:
    """Owns the tower under training, its optimiser and its place in the recipe."""

    def __init__(self, recipe: RobustRecipe, subject: Subject, source: Source, out: Path) -> None:
        """Raises ConfigError where method, model and data do not go together."""
        if len(source) < recipe.batch:
            raise ConfigError(
                f"{len(source)} pictures are fewer than one batch of {recipe.batch}; expected more pictures, or a smaller --batch"
            )
        self.recipe, self.subject, self.source, self.out = recipe, subject, source, out
        self.step = 0
        self.device = next(subject.tower.parameters()).device
        statistics = subject.image_processor
        self._mean = torch.tensor(statistics.image_mean, device=self.device)[:, None, None]
        self._std = torch.tensor(statistics.image_std, device=self.device)[:, None, None]
        self.reader = subject.reader(recipe.tokens)
        self._classes = class_embeddings(subject, source.classes) if recipe.method == "tecoa" else None
        trained = [p for p in subject.tower.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))

    # -- what is minimised ---------------------------------------------------------------------------------------

    def features(self, tower: Any, pixels: torch.Tensor) -> torch.Tensor:
        """What FARE's loss is over: (n, tokens, width)."""
        return self.reader(tower, (pixels - self._mean) / self._std)

    def logits(self, tower: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Zero-shot logits of a dual encoder with this tower: (n, classes)."""
        if self._classes is None:
            raise ConfigError("there are no class prompts; expected method tecoa")
        return zero_shot_logits(self.subject, tower, (pixels - self._mean) / self._std, self._classes)

    def loss_of(self, clean: torch.Tensor, labels: torch.Tensor | None) -> Loss:
        """The method's loss of pictures near `clean`."""
        if labels is not None:
            return lambda pixels: F.cross_entropy(self.logits(self.subject.tower, pixels), labels, reduction="none")
        with torch.no_grad(), self.autocast():
            kept = self.features(self.subject.original, clean)
        return lambda pixels: (self.features(self.subject.tower, pixels) - kept).square().sum((1, 2))

    def autocast(self) -> torch.autocast:
        """The arithmetic of the training: bfloat16 where that is safe."""
        return autocast(self.device)

    # -- one step ------------------------------------------------------------------------------------------------

    def batch(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This step's pictures (n, 3, h, w) in [0, 1] and labels; every picture once before any a second time."""
        size, total = self.recipe.batch, len(self.source)
        epoch, place = divmod(self.step, total // size)
        order = np.random.default_rng([self.recipe.seed, 1, epoch]).permutation(total)
        indices = order[place * size : (place + 1) * size].tolist()
        pixels = to_pixels(self.subject.image_processor, self.source.pictures(indices))
        rng = np.random.default_rng([self.recipe.seed, 2, self.step])
        sigma = rng.uniform(*self.recipe.sigma, size) * (rng.random(size) < self.recipe.noised_share)
        noise = torch.from_numpy(rng.standard_normal(tuple(pixels.shape), np.float32))
        pixels = (pixels + torch.from_numpy(sigma.astype(np.float32))[:, None, None, None] * noise).clamp(0, 1)
        labels = self.source.labels(indices).to(self.device) if self.recipe.method == "tecoa" else None
        return pixels.to(self.device), labels

    def _learning_rate(self) -> float:
        warm = min(1.0, (self.step + 1) / max(1.0, 0.07 * self.recipe.steps))
        return self.recipe.lr * warm * (1 + math.cos(math.pi * self.step / self.recipe.steps)) / 2

    def take_step(self) -> float:
        """One optimiser step; the mean loss of the attacked pictures before it."""
        rng = np.random.default_rng([self.recipe.seed, 3, self.step])
        clean, labels = self.batch()
        loss = self.loss_of(clean, labels)
        with self.autocast():
            attacked = worst_case(loss, clean, self.recipe.eps, self.recipe.inner_steps, rng)
            found = loss(attacked).mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.step += 1
        return found.item()

    # -- the whole run, and its checkpoints ------------------------------------------------------------------------

    def run(self, checkpoint_every: int = 100) -> Iterator[tuple[int, float]]:
        """Yields (steps done, loss) after every step, from wherever the last checkpoint stands."""
        while self.step < self.recipe.steps:
            yield self.step + 1, self.take_step()
            if self.step % checkpoint_every == 0 and self.step < self.recipe.steps:
                self.save()
        self.save()

    def _identity(self) -> dict[str, Any]:
        from lmms_smoothguard.fingerprint import model_fingerprint

        return {
            **dataclasses.asdict(self.recipe),
            "model": model_fingerprint(self.subject.model),
            "data": self.source.identity,
        }

    def save(self) -> None:
        """Writes a checkpoint."""
        tensors = {f"tower.{k}": v for k, v in self.subject.tower.state_dict().items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        save_checkpoint(self.out, tensors, self._identity(), self.step)

    def resume(self) -> bool:
        """Goes on from a checkpoint of the same recipe, model and data; False where there is none.

        Raises ConfigError when the checkpoint belongs to another.
        """
        found = load_checkpoint(self.out, self._identity())
        if found is None:
            return False
        tensors, self.step = found
        self.subject.tower.load_state_dict(part(tensors, "tower."))
        restore_optimizer(self.optimizer, part(tensors, "optimizer."))
        return True


def class_embeddings(subject: Subject, classes: tuple[str, ...]) -> torch.Tensor:
    """The dual encoder's embeddings of "a photo of a <class>": (classes, width), of length 1.

    Raises ConfigError where the model has no text tower, or the data no classes.
    """
    from lmms_smoothguard.tiny.clip_model import PROMPT
    from lmms_smoothguard.tiny.language import with_article

    if not subject.dual or subject.processor is None:
        raise ConfigError(
            f"model {subject.name!r} ({type(subject.model).__name__}) has no text tower; TeCoA expects a dual encoder, such as tiny-clip, "
            "whose class prompts say what is right. FARE needs none"
        )
    if not classes:
        raise ConfigError("the pictures have no classes; TeCoA expects data=scenes or a folder with a folder a class")
    texts = [PROMPT.format(with_article(name.replace("_", " "))) for name in classes]
    device = next(subject.model.parameters()).device
    tokens = subject.processor(text=texts, padding=True, return_tensors="pt").to(device)
    with torch.no_grad():
        found = subject.model.get_text_features(**tokens).pooler_output
    return F.normalize(found.float(), dim=-1)


def zero_shot_logits(subject: Subject, tower: Any, pixels: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cosines with the class embeddings times the model's logit scale: normalised pixels (n, 3, h, w) -> (n, classes)."""
    pooled = tower(pixel_values=pixels).pooler_output
    seen = F.normalize(subject.model.visual_projection(pooled).float(), dim=-1)
    return subject.model.logit_scale.exp() * seen @ classes.T
