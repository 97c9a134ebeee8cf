"""The base of every attack: starts, projection, restarts, 8-bit rounding. A subclass says only how it searches."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from lmms_smoothguard.attacks.objective import AnswerLoss, Threat
from lmms_smoothguard.attacks.pictures import Objective, Pictures, Progress, norms, repeated
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import AttackError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """No settings beyond the common ones."""


class Attack(ABC):
    """An attack on a batch of requests at once.

    Budget: every image of a request has its own ball of radius `settings.eps`.

    options: a frozen dataclass of the attack's own settings, each with a default; `settings.options` is one of it.
    defaults: where the attack's defaults differ from those of `AttackSettings`.
    needs_gradients: False for one that only asks the model for answers or scores.
    """

    options: ClassVar[type[Any]] = NoOptions
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    needs_gradients: ClassVar[bool] = True

    def __init__(self, settings: AttackSettings) -> None:
        self.settings = settings

    @classmethod  # noqa: B027 - most attacks have nothing to refuse
    def check(cls, settings: AttackSettings) -> None:
        """Raises ConfigError for settings that do not go together; called as soon as they are made."""

    @classmethod
    def rows(cls, settings: AttackSettings) -> int:
        """How many rows the model is given at once for one request, EOT's draws aside: what memory has to hold."""
        return settings.restarts

    @classmethod
    def content(cls, settings: AttackSettings) -> Mapping[str, Any]:
        """Options that only point at something (a file's path), by name, and what they point at: arrays or JSON.

        The cache keys the content instead of the path.
        """
        return {}

    def objective(self, threat: Threat) -> Objective:
        """What this attack makes large: by default how far the model is from its answer, or how near to a target."""
        return AnswerLoss.against(threat, self.settings)

    @abstractmethod
    def search(self, objective: Objective, clean: Pictures, start: Pictures, progress: Progress) -> Pictures:
        """The best pictures found from `start`, inside `project`'s ball around `clean`; rows know nothing of each other."""

    def run(self, objective: Objective, clean: Pictures, progress: Progress | None = None) -> Pictures:
        """Adversarial pictures: multiples of 1/255 inside the budget. With eps 0 they are the clean ones.

        All restarts of all rows are one batch; of a row's restarts that with the largest objective, rounded, is kept.
        """
        if self.settings.eps == 0:
            return tuple(slot.clone() for slot in clean)
        tries, rows = self.settings.restarts, len(clean[0])
        origin = repeated(clean, tries)
        starts = [self.start(clean, number) for number in range(tries)]

        def report(number: int, value: torch.Tensor) -> None:
            if progress is not None:
                progress(number, value.view(tries, rows).amax(0))

        found = self.search(objective, origin, tuple(map(torch.cat, zip(*starts, strict=True))), report)
        rounded = tuple(self.to_8_bit(new, old) for new, old in zip(found, origin, strict=True))
        if tries == 1:
            return rounded
        with torch.no_grad():
            best = objective(rounded).view(tries, rows).argmax(0)
        chosen = best * rows + torch.arange(rows, device=best.device)
        return tuple(slot[chosen.to(slot.device)] for slot in rounded)

    # -- the ball ----------------------------------------------------------------------------------------------------

    def start(self, clean: Pictures, number: int) -> Pictures:
        """Where restart `number` begins."""
        if not self.settings.random_start:
            return clean
        return tuple(
            self.project(slot + torch.stack([self._random_offset(image, number) for image in slot]), slot)
            for slot in clean
        )

    def generator(self, image: torch.Tensor, number: int = 0) -> torch.Generator:
        """Chance for restart `number` of one clean image: a function of the seed and the image alone."""
        key = str(self.settings.seed) + (f"|{number}" if number else "")
        digest = hashlib.blake2b(image.cpu().numpy().tobytes(), key=key.encode(), digest_size=8)
        return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)

    def _random_offset(self, image: torch.Tensor, number: int) -> torch.Tensor:
        """Uniform in the cube, or on a sphere of random radius."""
        generator = self.generator(image, number)
        if self.settings.norm == "linf":
            offset = (torch.rand(image.shape, generator=generator) * 2 - 1) * self.settings.eps
        else:
            direction = torch.randn(image.shape, generator=generator)
            offset = direction / direction.norm() * self.settings.eps * torch.rand(1, generator=generator)
        return offset.to(image)

    def project(self, new: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Into the ball and into [0, 1]."""
        delta = new - clean
        if self.settings.norm == "linf":
            delta = delta.clamp(-self.settings.eps, self.settings.eps)
        else:
            delta = delta * (self.settings.eps / norms(delta).clamp(min=1e-12)).clamp(max=1.0)
        return (clean + delta).clamp(0, 1)

    def to_8_bit(self, new: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
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
            low, high = (torch.full_like(norms(change), value) for value in (0.5, 1.0))
            high = torch.where(norms(_rounded(change, low)) <= self.settings.eps * 255, low, high)
            for _ in range(20):
                middle = (low + high) / 2
                inside = norms(_rounded(change, middle)) <= self.settings.eps * 255
                low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
            delta = _rounded(change, high)
        return (base + delta).clamp(0, 255) / 255


class IteratedAttack(Attack):
    """An attack that steps along gradients, `settings.steps` times, and ends where it is."""

    @abstractmethod
    def step(self, number: int, current: Pictures, gradients: Pictures) -> Pictures:
        """The next iterate, not yet projected; `number` counts from 0. Gradients point towards a larger objective."""

    def search(self, objective: Objective, clean: Pictures, start: Pictures, progress: Progress) -> Pictures:
        """Steps and projections in turn."""
        current = start
        for number in range(self.settings.steps):
            value, gradients = value_and_gradients(objective, current, first=number == 0)
            stepped = self.step(number, current, gradients)
            current = tuple(self.project(new, old) for new, old in zip(stepped, clean, strict=True))
            progress(number + 1, value)
        return current


def value_and_gradients(
    objective: Objective, pictures: Pictures, *, first: bool = False
) -> tuple[torch.Tensor, Pictures]:
    """The objective (batch,) and its gradient in every picture.

    Raises AttackError where there is none, or one that is not finite; at the `first` step also where it is zero everywhere,
    as it is when a kernel drops it.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = tuple(slot.detach().clone().requires_grad_() for slot in pictures)
        value = objective(leaves)
        try:
            gradients = torch.autograd.grad(value.sum(), leaves)
        except RuntimeError as error:
            if "grad" not in str(error):
                raise
            raise AttackError(f"{_NO_GRADIENT} ({error}); {_MEND}") from error
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise AttackError(
            "the gradient at the pixels is not finite; expected a model whose loss can be differentiated in its own "
            "precision: load it in bfloat16 or float32 (float16 overflows), or use attack=square, which needs no gradient"
        )
    if first and not any(bool(gradient.any()) for gradient in gradients):
        raise AttackError(f"{_NO_GRADIENT}: it is zero everywhere; {_MEND}")
    return value.detach(), gradients


_NO_GRADIENT = "no gradient reaches the pixels"
_MEND = (
    "kernels of quantised weights often pass none. Expected a model in bfloat16 or float32, or attack=square, which needs "
    "no gradient"
)


def _rounded(change: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Whole numbers: the fraction of a magnitude is rounded up from `threshold` on; 1 = towards zero."""
    return change.sign() * (change.abs() + (1 - threshold)).floor()
