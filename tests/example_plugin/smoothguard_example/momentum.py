from dataclasses import dataclass

from lmms_smoothguard.attacks.base import IteratedAttack


@dataclass(frozen=True, kw_only=True)
class Options:
    decay: float = 1.0  # of the running mean: attack_decay=0.9


class Momentum(IteratedAttack):
    """MI-FGSM (Dong et al. 2018): the sign of a running mean of normalised gradients."""

    options, velocity = Options, None

    def step(self, number, current, gradients):
        unit = [g / g.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12) for g in gradients]
        old = self.velocity or [0.0] * len(unit)
        self.velocity = [self.settings.options.decay * v + u for v, u in zip(old, unit, strict=True)]
        return tuple(x + self.settings.step * v.sign() for x, v in zip(current, self.velocity, strict=True))
