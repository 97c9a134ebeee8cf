"""The ball that an attack stays in: its radius around each picture or sound, projection, rounding to what files hold."""

from __future__ import annotations

import torch

from lmms_smoothguard.attacks.media import Slots, medium_of, per_row
from lmms_smoothguard.attacks.pictures import changes, distances, norms
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import AttackError


class Ball:
    """Every picture or sound of a request has its own."""

    def __init__(self, settings: AttackSettings) -> None:
        self.settings = settings

    def radius(self, clean: torch.Tensor) -> float | torch.Tensor:
        """Of the ball around a slot's rows: `settings.eps`, or with `settings.snr` one of each row's own, (batch, 1, ...)."""
        if self.settings.snr is None:
            return self.settings.eps
        lengths = clean.flatten(1).double().norm(dim=1) * 10 ** (-self.settings.snr / 20)
        return per_row(lengths, clean).to(clean.dtype)

    def has_room(self, clean: torch.Tensor) -> bool:
        """Whether any row may be changed: with eps 0 none is, and no noise is fainter than silence."""
        return bool(torch.as_tensor(self.radius(clean)).any())

    def first_step(self, clean: torch.Tensor) -> float | torch.Tensor:
        """`settings.step_size`, or max(radius / 8, half a step of the medium)."""
        if self.settings.step_size or self.settings.snr is None:
            return self.settings.step_size or max(self.settings.eps / 8, medium_of((clean,)).shortest)
        return torch.as_tensor(self.radius(clean) / 8).clamp(min=medium_of((clean,)).shortest)

    def project(self, new: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Into the ball and into the medium's range."""
        delta, medium = new - clean, medium_of((clean,))
        if self.settings.norm == "linf":
            delta = delta.clamp(-self.settings.eps, self.settings.eps)
        else:
            delta = delta * (self.radius(clean) / norms(delta).clamp(min=1e-12)).clamp(max=1.0)
        return (clean + delta).clamp(medium.low, medium.high)

    def to_whole_steps(self, new: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Multiples of the medium's step inside the budget; `clean` is made of such multiples itself.

        L-inf: the nearest. L2: rounding can leave the ball, so a change is rounded up only above a threshold, per row the
        lowest one from 1/2 on with which the whole stays inside.
        """
        medium = medium_of((clean,))
        base = (clean * medium.steps).round()
        change = new * medium.steps - base
        if self.settings.norm == "linf":
            most = int(self.settings.eps * medium.steps + 1e-6)
            delta = change.round().clamp(-most, most)
        else:
            budget = self.radius(clean) * medium.steps
            low, high = (torch.full_like(norms(change), value) for value in (0.5, 1.0))
            high = torch.where(norms(_rounded(change, low)) <= budget, low, high)
            for _ in range(20):
                middle = (low + high) / 2
                inside = norms(_rounded(change, middle)) <= budget
                low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
            delta = _rounded(change, high)
        return (base + delta).clamp(medium.least, medium.most) / medium.steps

    def distances_within(self, adversarial: Slots, clean: Slots) -> list[dict[str, float]]:
        """`distances`. Raises AttackError where one is beyond the budget, which no attack may leave."""
        for delta, old in zip(changes(adversarial, clean), clean, strict=True):
            sizes = delta.abs().amax(1) if self.settings.norm == "linf" else delta.norm(dim=1)
            radius = torch.as_tensor(self.radius(old), device=sizes.device).flatten().expand_as(sizes)
            worst = int((sizes - radius).argmax())
            size, most = float(sizes[worst]), float(radius[worst])
            if size > most * (1 + 1e-6) + 1e-6:  # sums of many squares differ in their last bits
                raise AttackError(
                    f"attack {self.settings.name!r} left its budget: {self.settings.norm} {size:.4g}, expected at most {most:.4g}"
                )
        return distances(adversarial, clean)


def _rounded(change: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Whole numbers: the fraction of a magnitude is rounded up from `threshold` on; 1 = towards zero."""
    return change.sign() * (change.abs() + (1 - threshold)).floor()
