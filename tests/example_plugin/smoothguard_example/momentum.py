from lmms_smoothguard.attacks.base import IteratedAttack


class Momentum(IteratedAttack):
    """MI-FGSM (Dong et al. 2018): the sign of a running mean of normalised gradients."""

    decay, velocity = 1.0, None

    def step(self, number, current, gradients):
        unit = [g / g.abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12) for g in gradients]
        old = self.velocity or [0.0] * len(unit)
        self.velocity = [self.decay * v + u for v, u in zip(old, unit, strict=True)]
        return tuple(x + self.settings.step * v.sign() for x, v in zip(current, self.velocity, strict=True))
