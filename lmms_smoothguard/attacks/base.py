"""The base of every attack: starts, projection, restarts, rounding to what files hold. A subclass says only how it searches."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from lmms_smoothguard.attacks.ball import Ball
from lmms_smoothguard.attacks.media import PICTURES, Medium, Slots, medium_of
from lmms_smoothguard.attacks.objective import AnswerLoss, Threat
from lmms_smoothguard.attacks.pictures import Objective, Progress, repeated
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import AttackError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptions:
    """No settings beyond the common ones."""


class Attack(Ball, ABC):
    """An attack on a batch of requests at once.

    Budget: every picture or sound of a request has its own ball, see `radius`.

    options: a frozen dataclass of the attack's own settings, each with a default; `settings.options` is one of it.
    defaults: where the attack's defaults differ from those of `AttackSettings`.
    needs_gradients: False for one that only asks the model for answers or scores.
    sounds: True for one that takes sounds, (batch, samples), too; a subclass for pictures alone sets it back.
    """

    options: ClassVar[type[Any]] = NoOptions
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    needs_gradients: ClassVar[bool] = True
    sounds: ClassVar[bool] = False

    @classmethod
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
    def search(self, objective: Objective, clean: Slots, start: Slots, progress: Progress) -> Slots:
        """The best found from `start`, inside `project`'s ball around `clean`; rows know nothing of each other."""

    def run(self, objective: Objective, clean: Slots, progress: Progress | None = None) -> Slots:
        """Adversarial slots inside the budget, in whole steps of their medium (1/255, 1/32768). With no room they are the clean ones.

        All restarts of all rows are one batch; of a row's restarts that with the largest objective, rounded, is kept.
        """
        if not any(self.has_room(slot) for slot in clean):
            return tuple(slot.clone() for slot in clean)
        tries, rows = self.settings.restarts, len(clean[0])
        origin = repeated(clean, tries)
        starts = [self.start(clean, number) for number in range(tries)]

        def report(number: int, value: torch.Tensor) -> None:
            if progress is not None:
                progress(number, value.view(tries, rows).amax(0))

        found = self.search(objective, origin, tuple(map(torch.cat, zip(*starts, strict=True))), report)
        rounded = tuple(self.to_whole_steps(new, old) for new, old in zip(found, origin, strict=True))
        if tries == 1:
            return rounded
        with torch.no_grad():
            best = objective(rounded).view(tries, rows).argmax(0)
        chosen = best * rows + torch.arange(rows, device=best.device)
        return tuple(slot[chosen.to(slot.device)] for slot in rounded)

    # -- where it begins -------------------------------------------------------------------------------------------------------

    def start(self, clean: Slots, number: int) -> Slots:
        """Where restart `number` begins."""
        if not self.settings.random_start:
            return clean
        return tuple(self.project(slot + self._random_offsets(slot, number), slot) for slot in clean)

    def generator(self, clean: torch.Tensor, number: int = 0) -> torch.Generator:
        """Chance for restart `number` of one clean picture or sound: a function of the seed and of that alone."""
        key = str(self.settings.seed) + (f"|{number}" if number else "")
        digest = hashlib.blake2b(clean.cpu().numpy().tobytes(), key=key.encode(), digest_size=8)
        return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "big") >> 1)

    def _random_offsets(self, slot: torch.Tensor, number: int) -> torch.Tensor:
        """Uniform in the cube, or on a sphere of random radius, for each row."""
        radius = self.radius(slot)
        radii = [radius] * len(slot) if isinstance(radius, float | int) else radius.flatten().tolist()
        return torch.stack([self._random_offset(one, number, size) for one, size in zip(slot, radii, strict=True)])

    def _random_offset(self, clean: torch.Tensor, number: int, radius: float) -> torch.Tensor:
        generator = self.generator(clean, number)
        if self.settings.norm == "linf":
            offset = (torch.rand(clean.shape, generator=generator) * 2 - 1) * radius
        else:
            direction = torch.randn(clean.shape, generator=generator)
            offset = direction / direction.norm() * radius * torch.rand(1, generator=generator)
        return offset.to(clean)


class IteratedAttack(Attack):
    """An attack that steps along gradients, `settings.steps` times, and ends where it is."""

    @abstractmethod
    def step(self, number: int, current: Slots, gradients: Slots) -> Slots:
        """The next iterate, not yet projected; `number` counts from 0. Gradients point towards a larger objective."""

    def search(self, objective: Objective, clean: Slots, start: Slots, progress: Progress) -> Slots:
        """Steps and projections in turn."""
        current = start
        for number in range(self.settings.steps):
            value, gradients = value_and_gradients(objective, current, first=number == 0)
            stepped = self.step(number, current, gradients)
            current = tuple(self.project(new, old) for new, old in zip(stepped, clean, strict=True))
            progress(number + 1, value)
        return current


def value_and_gradients(objective: Objective, slots: Slots, *, first: bool = False) -> tuple[torch.Tensor, Slots]:
    """The objective (batch,) and its gradient in every slot.

    Raises AttackError where there is none, or one that is not finite; at the `first` step also where it is zero everywhere,
    as it is when a kernel drops it.
    """
    medium = medium_of(slots)
    nothing = f"no gradient reaches the {medium.values}"
    with torch.inference_mode(False), torch.enable_grad():
        leaves = tuple(slot.detach().clone().requires_grad_() for slot in slots)
        value = objective(leaves)
        try:
            gradients = torch.autograd.grad(value.sum(), leaves)
        except RuntimeError as error:
            if "grad" not in str(error):
                raise
            raise AttackError(f"{nothing} ({error}); {_mend(medium)}") from error
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise AttackError(
            f"the gradient at the {medium.values} is not finite; expected a model whose loss can be differentiated in its own "
            f"precision: load it in bfloat16 or float32 (float16 overflows){_without_gradients(medium)}"
        )
    if first and not any(bool(gradient.any()) for gradient in gradients):
        raise AttackError(f"{nothing}: it is zero everywhere; {_mend(medium)}")
    return value.detach(), gradients


def _mend(medium: Medium) -> str:
    return f"kernels of quantised weights often pass none. Expected a model in bfloat16 or float32{_without_gradients(medium)}"


def _without_gradients(medium: Medium) -> str:
    return ", or use attack=square, which needs no gradient" if medium is PICTURES else ""
