"""Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, algorithm 1), L-inf and L2: a step size that no one has to choose."""

from __future__ import annotations

import dataclasses

import torch

from lmms_smoothguard.attacks.base import Attack, value_and_gradients
from lmms_smoothguard.attacks.media import Slots, per_row
from lmms_smoothguard.attacks.pictures import Objective, Progress, norms
from lmms_smoothguard.errors import ConfigError

_FIRST, _SHRINK, _LEAST = 22, 3, 6
"""Section 3.2: the first period between checkpoints, by how much each is shorter than the last, and the shortest: in
hundredths of the steps, whole numbers so that no rounding moves a checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class APGDOptions:
    """rho: the step size is halved where fewer than this share of a period's steps went up; alpha: the weight of a step
    against the momentum of the one before (1 = no momentum)."""

    rho: float = 0.75
    alpha: float = 0.75

    def __post_init__(self) -> None:
        for field in ("rho", "alpha"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"attack {field} is {value!r}; expected a number from 0 to 1")


def checkpoints(steps: int) -> list[int]:
    """w_1, w_2, ... of section 3.2: after how many steps each row's progress is judged."""
    found, share, period = [], 0, _FIRST
    while (share := share + period) <= 100:
        found.append(-(-share * steps // 100))
        period = max(period - _SHRINK, _LEAST)
    return sorted(set(found))


@dataclasses.dataclass
class _Point:
    """Slots with their objective (batch,) and its gradients."""

    slots: Slots
    value: torch.Tensor
    gradients: Slots

    def where(self, chosen: torch.Tensor, other: _Point) -> _Point:
        """This one in the `chosen` rows (batch,), the other in the rest."""
        return _Point(
            _where(chosen, self.slots, other.slots),
            torch.where(chosen, self.value, other.value),
            _where(chosen, self.gradients, other.gradients),
        )


class _Judge:
    """Each row's step size, and what it is halved by: conditions 1 and 2 of section 3.1."""

    def __init__(self, start: torch.Tensor, step: float) -> None:
        """start: the objective (batch,) of the start."""
        self.step = torch.full_like(start, step)
        self._rises = torch.zeros_like(start)
        self._steps = 0
        self._halved = torch.zeros_like(start, dtype=torch.bool)
        self._best = start

    def watch(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Counts who went up in a step."""
        self._rises += after > before
        self._steps += 1

    def halve(self, best: torch.Tensor, rho: float) -> torch.Tensor:
        """At a checkpoint: the rows (batch,) whose step was halved. `best`: the largest objective so far."""
        seldom = self._rises < rho * self._steps
        stuck = ~self._halved & (best <= self._best)
        self._halved, self._best = seldom | stuck, best
        self.step = torch.where(self._halved, self.step / 2, self.step)
        self._rises, self._steps = torch.zeros_like(self._rises), 0
        return self._halved


class APGD(Attack):
    """Steps along the gradient's sign (L-inf) or direction (L2) with momentum. At checkpoints a row that got nowhere halves
    its step and goes back to its best iterate, and the best is what the attack ends with.

    `step_size` is the first step, by default 2 eps as published. `steps` gradients are taken, and one value more.

    Under EOT (and this is not in the paper) the largest of many noisy values is a lucky draw rather than a good iterate: steps
    are halved as ever, but no row goes back, and the attack ends where it is.
    """

    options = APGDOptions
    sounds = True

    def search(self, objective: Objective, clean: Slots, start: Slots, progress: Progress) -> Slots:
        """Every row has its own step size, checks and best iterate."""
        steps, judged, options = self.settings.steps, checkpoints(self.settings.steps), self.settings.options
        now = best = _Point(start, *value_and_gradients(objective, start, first=True))
        before, judge = start, _Judge(now.value, self._first_share)
        for number in range(1, steps):
            progress(number, now.value)
            slots = self._stepped(now, before, clean, judge.step, options.alpha if number > 1 else 1.0)
            before, last = now.slots, now
            now = _Point(slots, *value_and_gradients(objective, slots))
            judge.watch(last.value, now.value)
            best = now.where(now.value > best.value, best)
            if number in judged:
                halved = judge.halve(best.value, options.rho)
                now = now if self.settings.eot else best.where(halved, now)
        progress(steps, now.value)
        end = self._stepped(now, before, clean, judge.step, options.alpha if steps > 1 else 1.0)
        if self.settings.eot:
            return end
        with torch.no_grad():
            return _where(objective(end) > best.value, end, best.slots)

    @property
    def _first_share(self) -> float:
        """The first step, in the units of `_unit`."""
        return self.settings.step_size or 2 * (1.0 if self.settings.snr is not None else self.settings.eps)

    def _unit(self, origin: torch.Tensor) -> float | torch.Tensor:
        """What step sizes are multiples of: with `snr`, and no step asked for, the radius of each row's own ball."""
        return 1.0 if self.settings.snr is None or self.settings.step_size else self.radius(origin)

    def _stepped(self, now: _Point, before: Slots, clean: Slots, step: torch.Tensor, alpha: float) -> Slots:
        """Algorithm 1, lines 7 and 8."""
        found = []
        for here, earlier, gradient, origin in zip(now.slots, before, now.gradients, clean, strict=True):
            towards = gradient.sign() if self.settings.norm == "linf" else gradient / norms(gradient).clamp(min=1e-12)
            length = per_row(step, here).to(here) * self._unit(origin)
            ahead = self.project(here + length * towards, origin)
            found.append(self.project(here + alpha * (ahead - here) + (1 - alpha) * (here - earlier), origin))
        return tuple(found)


def _where(chosen: torch.Tensor, yes: Slots, no: Slots) -> Slots:
    return tuple(torch.where(per_row(chosen, a).to(a.device), a, b) for a, b in zip(yes, no, strict=True))
