"""Means of features over noisy passes, whatever container a vision tower returns them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.smoothing.towers import Place

Visit = Callable[[Place, torch.Tensor], Any]
"""(place of a tensor in an output, the tensor) -> what stands there instead."""

_UNREAD = frozenset({"attentions"})


def walk(output: Any, visit: Visit, place: Place = ()) -> Any:
    """An output of a model with every floating-point tensor replaced; attentions, which no mean makes sense of, become None."""
    if isinstance(output, torch.Tensor):
        return visit(place, output) if output.is_floating_point() else output
    if isinstance(output, dict):  # transformers' ModelOutput too
        changed = {k: None if k in _UNREAD else walk(v, visit, (*place, k)) for k, v in output.items()}
        return type(output)(**changed) if type(output) is not dict else changed
    if isinstance(output, list | tuple):
        return type(output)([walk(v, visit, (*place, i)) for i, v in enumerate(output)])
    return output


class Mean:
    """The norm-preserving mean of one tensor's vectors over copies: mean(||f||) * m / ||m||, m the mean of f / ||f||.

    The certificate is of m alone; the norm is what the language model is used to. Sums are float32, so that it does not matter
    how copies are batched beyond last bits.
    """

    def __init__(self) -> None:
        self.directions: Any = 0.0
        self.norms: Any = 0.0
        self.copies = 0

    def add(self, features: torch.Tensor, lengths: torch.Tensor | None = None) -> None:
        """features (copies, ..., width); lengths (copies, ..., 1): what to take for their norms, by default their own.

        Raises UndefendableError for vectors of length zero, which have no direction.
        """
        unit, norms = normalized(features)
        self.directions = self.directions + unit.sum(0)
        self.norms = self.norms + (norms if lengths is None else lengths).sum(0)
        self.copies += len(features)

    def result(self, dtype: torch.dtype) -> torch.Tensor:
        """(..., width)."""
        direction, _ = normalized(self.directions)
        return (direction * (self.norms / self.copies)).to(dtype)


def normalized(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors along the last axis and their lengths (..., 1), float32.

    Raises UndefendableError for vectors that are zero or not finite.
    """
    found = features.float()
    norms = found.norm(dim=-1, keepdim=True)
    if not bool(((norms > 0) & torch.isfinite(norms)).all()):
        bad = int((~((norms > 0) & torch.isfinite(norms))).sum())
        raise UndefendableError(
            f"{bad} of {norms.numel()} feature vectors are zero or not finite, so they have no direction to be averaged; "
            "expected a vision tower whose features are none of both. Check its weights and precision (float16 overflows)"
        )
    return found / norms, norms
