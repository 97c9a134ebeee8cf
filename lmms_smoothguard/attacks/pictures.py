"""What attacks pass around: pictures or sounds, what an attacker wants of them, and how far apart two of them are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lmms_smoothguard.attacks.media import Slots, medium_of, per_row

Pictures = Slots
"""Where it is pictures alone that an attack knows."""
Objective = Callable[[Slots], torch.Tensor]
"""Slots of R times the batch, copy after copy, for any R -> (R * batch,) what the attacker wants LARGE, differentiable."""
Progress = Callable[[int, torch.Tensor], None]
"""Called after every step with its number (from 1) and the objective (batch,) before that step."""


def norms(delta: torch.Tensor) -> torch.Tensor:
    """L2 norms of the rows, (batch, 1, ...) with as many dimensions as `delta`."""
    return per_row(delta.flatten(1).norm(dim=1), delta)


def repeated(slots: Slots, times: int) -> Slots:
    """The batch `times` over, copy after copy."""
    return tuple(torch.cat([slot] * times) for slot in slots) if times > 1 else slots


def distances(adversarial: Sequence[torch.Tensor], clean: Sequence[torch.Tensor]) -> list[dict[str, float]]:
    """For each request of the batch the largest L-inf and L2 distance among its pictures ([0, 1] pixel units) or sounds
    (amplitude, full scale 1)."""
    deltas = changes(adversarial, clean)
    return [
        {
            "linf": max(float(delta[row].abs().max()) for delta in deltas),
            "l2": max(float(delta[row].norm()) for delta in deltas),
        }
        for row in range(len(deltas[0]))
    ]


def changes(adversarial: Sequence[torch.Tensor], clean: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(batch, values) of every slot: by how much it was changed, in whole steps of its medium."""
    steps = medium_of(tuple(clean)).steps
    return [
        ((new * steps).round() - (old * steps).round()).flatten(1) / steps
        for new, old in zip(adversarial, clean, strict=True)
    ]
