"""What attacks pass around: pictures in [0, 1], what an attacker wants of them, and how far apart two of them are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Pictures = tuple[torch.Tensor, ...]
"""One tensor (batch, channels, height, width) in [0, 1] for each image slot of the prompt."""
Objective = Callable[[Pictures], torch.Tensor]
"""Pictures of R times the batch, copy after copy, for any R -> (R * batch,) what the attacker wants LARGE, differentiable."""
Progress = Callable[[int, torch.Tensor], None]
"""Called after every step with its number (from 1) and the objective (batch,) before that step."""


def norms(delta: torch.Tensor) -> torch.Tensor:
    """(batch, 1, 1, 1) L2 norms of (batch, channels, height, width)."""
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def repeated(pictures: Pictures, times: int) -> Pictures:
    """The batch `times` over, copy after copy."""
    return tuple(torch.cat([slot] * times) for slot in pictures) if times > 1 else pictures


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
