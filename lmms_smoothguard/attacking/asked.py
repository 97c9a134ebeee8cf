"""What a user asks of `smoothguard attack`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackRun:
    """What a user asks for.

    model: a hub id, a directory or tiny-llava; data: whatever `find_questions` takes, with split, limit, question and columns;
    targeted: every question has a target of its own; attack: its settings; defense: what EOT averages over, and what answers
    what was crafted a second time; defense_given: those of its fields that are not left to their defaults; max_new_tokens: None = the data's own, else 32; judge, match: see `Rules`;
    batch_size: rows of the model at once in crafting, EOT's draws and restarts counted; cache: of adversarial images and sounds;
    vision_tower, vision_tower_resolution: see `encoders.load_vision_tower`, None = the model's own tower.
    """

    model: str
    data: str
    out: Path
    attack: AttackSettings
    defense: Choice | None = None
    defense_given: tuple[str, ...] = ()
    split: str | None = None
    limit: int | None = None
    question: str | None = None
    columns: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    targeted: bool = False
    max_new_tokens: int | None = None
    match: str = "exact"
    judge: str | None = None
    batch_size: int = 32
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    cache: Path | None = None
    vision_tower: str | None = None
    vision_tower_resolution: str = "model"

    def __post_init__(self) -> None:
        for field in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{field} is {value!r}; expected a whole number of at least 1")
        if self.attack.name == "universal":
            raise ConfigError(
                "attack is 'universal', one change for all images or sounds, which `smoothguard attack` cannot share out; "
                "expected an attack on each, such as pgd, or lmms-eval's attack=universal"
            )
        if self.targeted and self.attack.target is not None:
            raise ConfigError(
                f"target is {self.attack.target!r}, and every question was to have its own; expected one of the two"
            )
        if self.attack.eot and self.defense is None:
            raise ConfigError(
                f"eot is {self.attack.eot}, an average over a defence's randomness, and there is no defence; expected one, such "
                "as --defense smoothguard"
            )
