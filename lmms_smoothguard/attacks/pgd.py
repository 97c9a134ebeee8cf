"""Projected gradient descent (Madry et al. 2018), L-inf and L2."""

from __future__ import annotations

from lmms_smoothguard.attacks.base import Attack, Pictures


class PGD(Attack):
    """Steps of constant length along the gradient's sign (L-inf) or direction (L2), halved for the last quarter."""

    def step(self, number: int, current: Pictures, gradients: Pictures) -> Pictures:
        length = self.settings.step * (0.5 if number >= 0.75 * self.settings.steps else 1.0)
        if self.settings.norm == "linf":
            return tuple(slot + length * gradient.sign() for slot, gradient in zip(current, gradients, strict=True))
        return tuple(
            slot + length * gradient / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
            for slot, gradient in zip(current, gradients, strict=True)
        )
