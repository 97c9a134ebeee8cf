"""Which defence, with which settings: what users write, in a generation config, a call or `--model_args`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from lmms_smoothguard import plugins
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import ConfigError, did_you_mean
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig

DEFAULT = "smoothguard"
_OF_CONFIGS = {SmoothGuardConfig: DEFAULT, FeatureSmoothingConfig: "feature_smoothing"}


class Choice(NamedTuple):
    """`name`: a registered defence; `config`: an instance of that defence's own frozen dataclass."""

    name: str
    config: Any

    def to_dict(self) -> dict[str, Any]:
        """The name and all fields, ready for JSON; `choose` reads it back."""
        return {"defense": self.name, **dataclasses.asdict(self.config)}


def choose(value: Any, base: Choice | None = None) -> Choice | None:
    """A defence from what users write: None / False (off), True, a mapping of fields, a SmoothGuardConfig,
    a FeatureSmoothingConfig or a Choice.

    A mapping may name its `defense`; its fields replace those of `base` where that is the same defence, else the
    defaults. Raises ConfigError for an unknown defence or field, or an impossible value.
    """
    if value is None or value is False:
        return None
    if value is True:
        return base or Choice(DEFAULT, config_class(DEFAULT)())
    if isinstance(value, Choice):
        return value
    if type(value) in _OF_CONFIGS:
        return Choice(_OF_CONFIGS[type(value)], value)
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"smoothguard is {value!r}; expected True, False, a dict such as {{'sigma': 0.1}}, a SmoothGuardConfig or a "
            "FeatureSmoothingConfig"
        )
    fields = dict(value)
    name = fields.pop("defense", base.name if base is not None else DEFAULT)
    if name in (None, "none"):
        return None
    config = config_class(name)
    known = field_names(name)
    for field in fields:
        if field not in known:
            raise ConfigError(f"unknown {name} field {field!r}; {did_you_mean(str(field), known)}")
    with plugins.blame("defenses", name):
        if base is not None and base.name == name:
            return Choice(name, dataclasses.replace(base.config, **fields))
        return Choice(name, config(**fields))


def config_class(name: Any) -> type[Any]:
    """The dataclass that describes a defence. Raises ConfigError for an unknown defence."""
    known = plugins.offers("defenses")
    if name not in known:
        raise ConfigError(f"unknown defence {name!r}; {did_you_mean(str(name), ['none', *known])}")
    config = getattr(plugins.load("defenses", name), "config", None)
    if not isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise ConfigError(
            f"defence {name!r} of {known[name].owner} has no config dataclass; expected a lmms_smoothguard.defenses.Defense"
        )
    return config


def field_names(name: Any) -> tuple[str, ...]:
    """The fields of a defence."""
    return tuple(field.name for field in dataclasses.fields(config_class(name)))


def check(choice: Choice | None, model: Any, image_processor: Any = None) -> None:
    """Refuses now what the defence would refuse for every request to this model. Raises what it raises."""
    if choice is None:
        return
    found = getattr(plugins.load("defenses", choice.name), "check", None)
    if found is not None:
        with plugins.blame("defenses", choice.name):
            found(model, choice.config, image_processor)
