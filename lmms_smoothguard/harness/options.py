"""Our keys among `--model_args`, taken out before lmms-eval's wrapper sees the rest: it refuses what it does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_smoothguard.attacks.cache import default_cache_dir
from lmms_smoothguard.attacks.settings import AttackSettings, all_fields, common_fields
from lmms_smoothguard.choice import DEFAULT, Choice, choose, field_names
from lmms_smoothguard.config import parse_scalar
from lmms_smoothguard.errors import ConfigError, did_you_mean
from lmms_smoothguard.judges.loading import judge_names

_TOWER_KEYS = ("vision_tower", "vision_tower_resolution")
_TASK_FIELDS = ("label", "target_field")  # in a task's metadata.attack only: names of document fields


@dataclasses.dataclass(frozen=True)
class TaskAttack:
    """An attack on a task's samples: `label` / `target_field` name the document fields of the right answer / target."""

    settings: AttackSettings
    label: str | None = None
    target_field: str | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """defense: None = the undefended run of the same wrapper; attack: settings of `--model_args`, over the task's own; judge:
    names as in `lmms_smoothguard.judges.loading`; vision_tower, vision_tower_resolution: as `encoders.load_vision_tower` takes
    them, None = the model's own tower; defense_given: the defence's fields that are not left to their defaults."""

    defense: Choice | None
    attack: dict[str, Any]
    attack_cache: Path
    attack_batch_size: int
    judge: str = "refusal"
    vision_tower: str | None = None
    vision_tower_resolution: str = "model"
    defense_given: tuple[str, ...] = ()

    def attack_on(self, metadata: Mapping[str, Any]) -> TaskAttack | None:
        """The attack for a task with that metadata; None when neither names one."""
        asked = metadata.get("attack")
        if asked is None and "name" not in self.attack:
            return None
        if asked is not None and not isinstance(asked, str | Mapping):
            raise ConfigError(f"metadata.attack is {asked!r}; expected a name such as pgd, or a mapping")
        fields = {"name": asked} if isinstance(asked, str) else dict(asked or {})
        places = {name: fields.pop(name, None) for name in _TASK_FIELDS}
        return TaskAttack(AttackSettings.parse(fields, self.attack), **places)


def take_options(kwargs: dict[str, Any], accepted: Sequence[str] = ()) -> Options:
    """Takes our keys out of a wrapper's keyword arguments, of which it accepts those named.

    Raises ConfigError for one that is misspelt, and for a defence whose fields are named as the wrapper's arguments.
    """
    name = kwargs.pop("defense", DEFAULT)
    ours = _fields_of(name)
    if name not in (None, "none", DEFAULT) and (shared := sorted(set(ours) & set(accepted))):
        raise ConfigError(
            f"defence {name!r} has the fields {', '.join(shared)}, which are the model's own arguments; expected other names"
        )
    taken = {key: parse_scalar(kwargs.pop(key)) for key in list(kwargs) if key in ours}
    defense = choose({"defense": name, **taken})
    judge = str(kwargs.pop("judge", Options.judge))
    judge_names(judge)  # a misspelt name is refused before the model is loaded
    attack: dict[str, Any] = {}
    if "attack" in kwargs:
        attack["name"] = kwargs.pop("attack")
    cache = kwargs.pop("attack_cache", None)
    batch_size = parse_scalar(kwargs.pop("attack_batch_size", 32))
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"attack_batch_size is {batch_size!r}; expected a whole number of at least 1")
    for key in [key for key in kwargs if key.startswith("attack_") and key != "attack_implementation"]:
        if key not in (known := attack_keys()):
            raise ConfigError(f"unknown attack setting {key!r}; {did_you_mean(key, [*known, 'attack_cache'])}")
        attack[key.removeprefix("attack_")] = kwargs.pop(key)
    # A bad value is refused before the model is loaded; options are those of an attack that only the task may name.
    AttackSettings.parse(attack if "name" in attack else {k: v for k, v in attack.items() if k in common_fields()})
    where = Path(cache).expanduser() if cache else default_cache_dir() / "attacks"
    # A few of lmms-eval's wrappers have a `vision_tower` of their own.
    asked = [key for key in _TOWER_KEYS if key in kwargs and "vision_tower" not in accepted]
    tower = {key: parse_scalar(kwargs.pop(key)) for key in asked}
    return Options(defense, attack, where, batch_size, judge, **tower, defense_given=tuple(taken))


def attack_keys() -> list[str]:
    """`attack_eps` and the like, those of every attack's own options among them."""
    return sorted(f"attack_{field}" for field in all_fields() - {"name"})


def _fields_of(defense: Any) -> tuple[str, ...]:
    """The keys a defence takes from the model's arguments; an undefended run ignores SmoothGuard's."""
    return field_names(DEFAULT if defense in (None, "none") else defense)


def explain_leftover(kwargs: Mapping[str, Any], accepted: Sequence[str], defense: Choice | None) -> None:
    """Refuses a key that neither the wrapper nor we know, with the nearest name of either."""
    for key in kwargs:
        if key not in accepted:
            known = [
                *accepted,
                *_fields_of(None if defense is None else defense.name),
                "defense",
                "judge",
                "attack",
                "attack_cache",
                "attack_batch_size",
                *_TOWER_KEYS,
                *attack_keys(),
            ]
            raise ConfigError(f"unknown model argument {key!r}; {did_you_mean(key, known)}")
