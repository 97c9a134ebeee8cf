"""What an attack is asked to do: one frozen description, from a task's YAML or from `attack_*` arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lmms_smoothguard import plugins
from lmms_smoothguard.config import parse_scalar
from lmms_smoothguard.errors import ConfigError, did_you_mean

NORMS = ("linf", "l2")
LOSSES = ("margin", "ce")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """An attack and its budget.

    name: a registered attack; eps: radius in [0, 1] pixel units (L2: of the whole image); steps: gradient steps, never
    stopped early; step_size: None = max(eps / 8, half a grey level); target: a text to be forced, None = untargeted
    (away from the right answer); eot: draws of the defence's noise a step, 0 = attack the undefended model;
    loss: what an untargeted attack raises, "margin" (the best other token over the right one) or "ce" (cross-entropy,
    whose gradient fades where the model is sure); a targeted one always lowers the cross-entropy of its target;
    random_start: begin anywhere in the ball; seed: of the attacker's own randomness.
    """

    name: str = "pgd"
    norm: str = "linf"
    eps: float = 4 / 255
    steps: int = 40
    step_size: float | None = None
    loss: str = "margin"
    target: str | None = None
    eot: int = 0
    random_start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        known = plugins.offers("attacks")
        if self.name not in known:
            raise ConfigError(f"unknown attack {self.name!r}; {did_you_mean(str(self.name), known)}")
        if self.norm not in NORMS:
            raise ConfigError(f"attack norm is {self.norm!r}; {did_you_mean(str(self.norm), NORMS)}")
        if self.loss not in LOSSES:
            raise ConfigError(f"attack loss is {self.loss!r}; {did_you_mean(str(self.loss), LOSSES)}")
        if not _number(self.eps) or not math.isfinite(self.eps) or self.eps < 0:
            raise ConfigError(f"attack eps is {self.eps!r}; expected 0 or more in [0, 1] pixel units, such as 4/255")
        if self.norm == "linf" and self.eps > 1:
            raise ConfigError(
                f"attack eps is {self.eps!r}, more than the whole range of a pixel; grey levels are written as {self.eps:g}/255"
            )
        if self.norm == "linf" and 0 < self.eps < 1 / 255 - 1e-9:
            raise ConfigError(
                f"attack eps is {self.eps!r}, less than one grey level: no 8-bit image lies that near; expected 1/255 or more"
            )
        if self.step_size is not None and (not _number(self.step_size) or not self.step_size > 0):
            raise ConfigError(f"attack step_size is {self.step_size!r}; expected a positive number such as 1/255")
        for field, least in (("steps", 1), ("eot", 0), ("seed", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"attack {field} is {value!r}; expected a whole number of at least {least}")
        if self.target is not None and (not isinstance(self.target, str) or not self.target.strip()):
            raise ConfigError(f"attack target is {self.target!r}; expected a text to be forced")

    @classmethod
    def parse(cls, value: Any, base: AttackSettings | None = None) -> AttackSettings:
        """From a name or a mapping (fractions such as "4/255" may be text); its fields replace those of `base`."""
        fields = {"name": value} if isinstance(value, str) else value
        if not isinstance(fields, Mapping):
            raise ConfigError(f"attack is {value!r}; expected a name such as 'pgd' or a mapping of its settings")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ConfigError(f"unknown attack setting {name!r}; {did_you_mean(str(name), known)}")
        parsed: dict[str, Any] = {
            k: v if k in ("name", "norm", "loss", "target") else parse_scalar(v) for k, v in fields.items()
        }
        return dataclasses.replace(base, **parsed) if base is not None else cls(**parsed)

    @property
    def step(self) -> float:
        """The step in force."""
        return self.step_size or max(self.eps / 8, 0.5 / 255)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
