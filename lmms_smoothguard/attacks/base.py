"""The base of every attack: random start, projection, the loop, 8-bit rounding. A subclass says only how it steps."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from lmms_smoothguard.attacks.settings import AttackSettings

Pictures = tuple[torch.Tensor, ...]
"""One tensor (batch, channels, height, width) in [0, 1] for each image slot of the prompt."""
Objective = Callable[[Pictures], torch.Tensor]
"""Pictures -> (batch,) what the attacker wants LARGE, differentiable."""
Progress = Callable[[int, torch.Tensor], None]
"""Called after every step with its number (from 1) and the objective (batch,) before that step."""


class Attack(ABC):
    """An iterated gradient attack on a batch of requests at once.

    Budget: every image of a request has its own ball of radius `settings.eps`.
    """

    def __init__(self, settings: AttackSettings) -> None:
        self.settings = settings

    @abstractmethod
    def step(self, number: int, current: Pictures, gradients: Pictures) -> Pictures:
        """The next iterate, not yet projected; `number` counts from 0. Gradients point towards a larger objective."""

    def run(self, objective: Objective, clean: Pictures, progress: Progress | None = None) -> Pictures:
        """Adversarial pictures: multiples of 1/255 inside the budget. With eps 0 they are the clean ones."""
        if self.settings.eps == 0:
            return tuple(slot.clone() for slot in clean)
        current = self._start(clean)
        for number in range(self.settings.steps):
            with torch.inference_mode(False), torch.enable_grad():
                leaves = tuple(slot.detach().clone().requires_grad_() for slot in current)
                value = objective(leaves)
                gradients = torch.autograd.grad(value.sum(), leaves)
            stepped = self.step(number, tuple(leaf.detach() for leaf in leaves), gradients)
            current = tuple(self._project(new, old) for new, old in zip(stepped, clean, strict=True))
            if progress is not None:
                progress(number + 1, value.detach())
        return tuple(self._to_8_bit(new, old) for new, old in zip(current, clean, strict=True))

    # -- the ball ----------------------------------------------------------------------------------------------------

    def _start(self, clean: Pictures) -> Pictures:
        if not self.settings.random_start:
            return clean
        return tuple(
            self._project(slot + torch.stack([self._random_offset(image) for image in slot]), slot) for slot in clean
        )

    def _random_offset(self, image: torch.Tensor) -> torch.Tensor:
        """Uniform in the cube, or on a sphere of random radius; a function of the seed and the image alone."""
        digest = hashlib.blake2b(image.cpu().numpy().tobytes(), key=str(self.settings.seed).encode(), digest_size=8)
        generator = torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)
        if self.settings.norm == "linf":
            offset = (torch.rand(image.shape, generator=generator) * 2 - 1) * self.settings.eps
        else:
            direction = torch.randn(image.shape, generator=generator)
            offset = direction / direction.norm() * self.settings.eps * torch.rand(1, generator=generator)
        return offset.to(image)

    def _project(self, new: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Into the ball and into [0, 1]."""
        delta = new - clean
        if self.settings.norm == "linf":
            delta = delta.clamp(-self.settings.eps, self.settings.eps)
        else:
            norms = _norms(delta)
            delta = delta * (self.settings.eps / norms.clamp(min=1e-12)).clamp(max=1.0)
        return (clean + delta).clamp(0, 1)

    def _to_8_bit(self, new: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Multiples of 1/255 inside the budget; `clean` is made of such multiples itself.

        L-inf: the nearest. L2: rounding can leave the ball, so a change is rounded up only above a threshold, per image
        the lowest one from 1/2 on with which the whole stays inside.
        """
        base = (clean * 255).round()
        change = new * 255 - base
        if self.settings.norm == "linf":
            most = int(self.settings.eps * 255 + 1e-6)
            delta = change.round().clamp(-most, most)
        else:
            low, high = (torch.full_like(_norms(change), value) for value in (0.5, 1.0))
            high = torch.where(_norms(_rounded(change, low)) <= self.settings.eps * 255, low, high)
            for _ in range(20):
                middle = (low + high) / 2
                inside = _norms(_rounded(change, middle)) <= self.settings.eps * 255
                low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
            delta = _rounded(change, high)
        return (base + delta).clamp(0, 255) / 255


def _rounded(change: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Whole numbers: the fraction of a magnitude is rounded up from `threshold` on; 1 = towards zero."""
    return change.sign() * (change.abs() + (1 - threshold)).floor()


def _norms(delta: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 1, 1) L2 norms."""
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def distances(adversarial: Sequence[torch.Tensor], clean: Sequence[torch.Tensor]) -> list[dict[str, float]]:
    """For each request of the batch the largest L-inf and L2 distance among its images, in [0, 1] pixel units."""
    deltas = [
        ((new * 255).round() - (old * 255).round()).flatten(1) / 255
        for new, old in zip(adversarial, clean, strict=True)
    ]
    return [
        {
            "linf": max(float(delta[row].abs().max()) for delta in deltas),
            "l2": max(float(delta[row].norm()) for delta in deltas),
        }
        for row in range(len(deltas[0]))
    ]
