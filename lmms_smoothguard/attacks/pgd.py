"""Projected gradient descent (Madry et al. 2018), L-inf and L2, with momentum (Dong et al. 2018) where asked."""

from __future__ import annotations

import dataclasses

import torch

from lmms_smoothguard.attacks.base import IteratedAttack
from lmms_smoothguard.attacks.media import Slots
from lmms_smoothguard.attacks.pictures import Objective, Progress, norms
from lmms_smoothguard.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGDOptions:
    """momentum: the share of the running mean of gradients (each divided by its mean absolute value) that is kept."""

    momentum: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.momentum, bool) or not isinstance(self.momentum, int | float) or not 0 <= self.momentum <= 1:
            raise ConfigError(f"attack momentum is {self.momentum!r}; expected a number from 0 to 1")


class PGD(IteratedAttack):
    """Steps of constant length along the gradient's sign (L-inf) or direction (L2), halved for the last quarter."""

    options = PGDOptions
    sounds = True

    def search(self, objective: Objective, clean: Slots, start: Slots, progress: Progress) -> Slots:
        """As every iterated attack, with a velocity of its own."""
        self._velocity: Slots | None = None
        self._lengths = tuple(map(self.first_step, clean))
        return super().search(objective, clean, start, progress)

    def step(self, number: int, current: Slots, gradients: Slots) -> Slots:
        """The next iterate."""
        share = 0.5 if number >= 0.75 * self.settings.steps else 1.0
        directions = self._with_momentum(gradients) if self.settings.options.momentum else gradients
        moves = zip(current, directions, self._lengths, strict=True)
        if self.settings.norm == "linf":
            return tuple(slot + length * share * towards.sign() for slot, towards, length in moves)
        return tuple(
            slot + length * share * towards / norms(towards).clamp(min=1e-12) for slot, towards, length in moves
        )

    def _with_momentum(self, gradients: Slots) -> Slots:
        unit = tuple(
            slot / slot.abs().mean(dim=tuple(range(1, slot.ndim)), keepdim=True).clamp(min=1e-12) for slot in gradients
        )
        old = self._velocity or tuple(map(torch.zeros_like, unit))
        self._velocity = tuple(
            self.settings.options.momentum * before + now for before, now in zip(old, unit, strict=True)
        )
        return self._velocity
