"""What an attack is asked to do: one frozen description, from a task's YAML or from `attack_*` arguments."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.media import PICTURES, SOUNDS, Medium
from lmms_smoothguard.config import parse_scalar
from lmms_smoothguard.errors import ConfigError, did_you_mean

NORMS = ("linf", "l2")
LOSSES = ("margin", "ce", "dlr")
_LEAST_SNR, _MOST_SNR = (
    -40.0,
    120.0,
)  # a change of a hundred times the amplitude, and one that rounding to 16 bits undoes
_TEXTS = ("name", "norm", "loss", "target")
_BUDGETS = {
    PICTURES: "--eps 4/255, or attack_eps=4/255 in lmms-eval",
    SOUNDS: (
        "--eps 0.0005 (amplitude, full scale 1) or --norm l2 --snr 45 (dB), or in lmms-eval attack_eps=0.0005 or "
        "attack_norm=l2,attack_snr=45"
    ),
}
"""Examples of a budget, as those write it who have no vocabulary of their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """An attack and its budget.

    name: a registered attack; eps: radius, in [0, 1] pixel units of pictures (L2: of the whole image) and in amplitude of sounds,
    full scale 1 (L2: of the whole clip). The default is made for pictures; for sounds it has to be given, and 0.0005 (L-inf) is what
    breaks most answers of a model that is not defended; snr: instead of eps, for sounds and norm "l2": by how many decibels each
    clip's power exceeds that of its change, so a ball of radius ||clip|| 10^(-snr / 20) of its own (45 is about as loud as 0.0005);
    steps: gradient steps, never stopped early (square: queries); step_size: None = the attack's own rule (pgd, patch and feature:
    max(radius / 8, half a step of the medium); apgd: twice the radius; universal: `Universal.rate`; square has no step);
    target: a text to be forced, None = untargeted (away from the right answer); eot: draws of the defence's noise a step, 0 =
    attack the undefended model; loss: what an untargeted attack raises, "margin" (the best other token over the right one) or "ce"
    (cross-entropy, whose gradient fades where the model is sure) or "dlr" (the margin over the distance of the first from the third
    token, so that the scale of the logits says nothing); a targeted one always lowers the cross-entropy of its target;
    random_start: begin anywhere in the ball; restarts: independent beginnings, all in one batch, of which the best is kept;
    seed: of the attacker's own randomness; options: the attack's own settings, an instance of its class's `options`.
    """

    name: str = "pgd"
    norm: str = "linf"
    eps: float = 4 / 255
    snr: float | None = None
    steps: int = 40
    step_size: float | None = None
    loss: str = "margin"
    target: str | None = None
    eot: int = 0
    random_start: bool = True
    restarts: int = 1
    seed: int = 0
    options: Any = None

    def __post_init__(self) -> None:
        own = options_of(self.name)
        if self.norm not in NORMS:
            raise ConfigError(f"attack norm is {self.norm!r}; {did_you_mean(str(self.norm), NORMS)}")
        if self.loss not in LOSSES:
            raise ConfigError(f"attack loss is {self.loss!r}; {did_you_mean(str(self.loss), LOSSES)}")
        if not _number(self.eps) or not math.isfinite(self.eps) or self.eps < 0:
            raise ConfigError(
                f"attack eps is {self.eps!r}; expected 0 or more in [0, 1] pixel units, such as 4/255, or in amplitude, such as 0.0005"
            )
        if self.norm == "linf" and self.eps > 1:
            raise ConfigError(f"attack eps is {self.eps!r}, {_too_far(self)}")
        if _takes_sounds(self.name):
            _check_rounding(self.eps, SOUNDS)
        else:
            _check_rounding(self.eps, PICTURES, changed_by=self.name)
        if self.snr is not None:
            self._check_snr()
        if self.step_size is not None and (not _number(self.step_size) or not self.step_size > 0):
            raise ConfigError(f"attack step_size is {self.step_size!r}; expected a positive number such as 1/255")
        for field, least in (("steps", 1), ("eot", 0), ("restarts", 1), ("seed", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"attack {field} is {value!r}; expected a whole number of at least {least}")
        if self.target is not None and (not isinstance(self.target, str) or not self.target.strip()):
            raise ConfigError(f"attack target is {self.target!r}; expected a text to be forced")
        if self.options is None:
            with plugins.blame("attacks", self.name):
                object.__setattr__(self, "options", own())
        elif not isinstance(self.options, own):
            raise ConfigError(f"the options of attack {self.name!r} are {self.options!r}; expected a {own.__name__}")
        check = getattr(plugins.load("attacks", self.name), "check", None)
        if check is not None:
            with plugins.blame("attacks", self.name):
                check(self)

    @classmethod
    def parse(cls, *layers: Any) -> AttackSettings:
        """From names or flat mappings (fractions such as "4/255" may be text); later layers win. An eps such as "40dB" is
        norm "l2" and an snr.

        A layer that names another attack than those before brings that attack's defaults with it and drops the other's
        options. Raises ConfigError for what the attack does not know.
        """
        name, merged = "pgd", _defaults("pgd")
        for layer in map(_mapping, layers):
            asked = [field for field in ("eps", "snr") if parse_scalar(layer.get(field)) is not None]
            if len(asked) > 1:
                raise ConfigError(
                    f"attack eps is {layer['eps']!r} and snr {layer['snr']!r}; expected one of them, for both say how far"
                )
            layer = _room(layer)
            if asked:
                merged = {k: v for k, v in merged.items() if k not in ("eps", "snr")}
            if (named := layer.get("name", name)) != name:
                merged = {k: v for k, v in merged.items() if k in common_fields()} | _defaults(named)
                name = named
            known = common_fields() | _names(options_of(name))
            for field in layer:
                if field not in known:
                    raise ConfigError(f"unknown attack setting {field!r} of {name}; {did_you_mean(str(field), known)}")
            merged |= layer
        own = options_of(name)
        texts = {*_TEXTS, *_text_options(own)}
        parsed = {k: v if k in texts else parse_scalar(v) for k, v in merged.items()}
        with plugins.blame("attacks", name):
            options = own(**{field: parsed.pop(field) for field in _names(own) & set(parsed)})
        return cls(**parsed | {"name": name, "options": options})

    @property
    def step(self) -> float:
        """PGD's step on pictures: `step_size`, or max(eps / 8, half a grey level). Attacks with another rule do not read it."""
        return self.step_size or max(self.eps / 8, PICTURES.shortest)

    def to_dict(self) -> dict[str, Any]:
        """All fields, the options' among them, ready for JSON; `parse` reads it back. Of `eps` and `snr` only that which holds."""
        flat = dataclasses.asdict(self)
        flat.pop("snr" if self.snr is None else "eps")
        return flat | flat.pop("options")

    def check_medium(self, medium: Medium, budgets: Mapping[Medium, str] = _BUDGETS) -> None:
        """Raises ConfigError for an attack or a budget that says nothing about this medium. budgets: examples of one for each, as the
        user would write it."""
        if medium is PICTURES:
            if self.snr is not None:
                raise ConfigError(
                    f"attack snr is {self.snr!r}, a budget of sounds, and the request has pictures; expected one for pictures, such as "
                    f"{budgets[PICTURES]}"
                )
        elif not _takes_sounds(self.name):
            raise ConfigError(
                f"attack {self.name!r} changes pictures, and the request has sounds; expected one of {', '.join(sound_attacks())}"
            )
        elif self.snr is None and self.eps == _default_eps(self.name) and self.eps * PICTURES.steps >= 1:
            raise ConfigError(
                f"attack eps is {self.eps:.4g}, which pictures have by default and is made for pictures; expected one for "
                f"sounds, such as {budgets[SOUNDS]}"
            )
        _check_rounding(self.eps, medium)

    def _check_snr(self) -> None:
        if not _number(self.snr) or not _LEAST_SNR <= float(self.snr or 0) <= _MOST_SNR:
            raise ConfigError(
                f"attack snr is {self.snr!r}; expected {_LEAST_SNR:g} to {_MOST_SNR:g} decibels, such as 45"
            )
        if self.norm != "l2":
            raise ConfigError(
                f"attack snr is {self.snr!r}, of L2 norms, and norm {self.norm!r}; expected --norm l2, or attack_norm=l2 in "
                "lmms-eval"
            )
        if self.eps not in (AttackSettings.eps, _default_eps(self.name)):
            raise ConfigError(
                f"attack eps is {self.eps!r} and snr {self.snr!r}; expected one of them, for both say how far"
            )
        if not _takes_sounds(self.name):
            raise ConfigError(
                f"attack snr is {self.snr!r}, a budget of sounds, and attack {self.name!r} changes pictures; expected eps, or "
                f"one of {', '.join(sound_attacks())}"
            )


def _room(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer whose eps may be in decibels below each sound, in the fields that settings have for that."""
    found = re.fullmatch(r"\s*([-+]?[\d.]+)\s*dB\s*", str(layer.get("eps")), re.IGNORECASE)
    if found is None:
        return layer
    return {"norm": "l2", **{k: v for k, v in layer.items() if k != "eps"}, "snr": found[1]}


def _too_far(settings: AttackSettings) -> str:
    grey = f"grey levels are written as {settings.eps:g}/255"
    if not _takes_sounds(settings.name):
        return f"more than the whole range of a pixel; {grey}"
    return (
        "more than full scale; expected of a sound an amplitude, full scale 1, such as 0.0005, or decibels below it such as 45dB; of "
        f"a picture, {grey}"
    )


def sound_attacks() -> list[str]:
    """The attacks that take sounds."""
    return sorted(filter(_takes_sounds, plugins.offers("attacks")))


def common_fields() -> set[str]:
    """The settings that every attack has."""
    return {field.name for field in dataclasses.fields(AttackSettings)} - {"options"}


def options_of(name: Any) -> type[Any]:
    """The dataclass of an attack's own settings. Raises ConfigError for an unknown attack, or one without a sound one."""
    known = plugins.offers("attacks")
    if name not in known:
        raise ConfigError(f"unknown attack {name!r}; {did_you_mean(str(name), known)}")
    own = getattr(plugins.load("attacks", name), "options", None)
    if not isinstance(own, type) or not dataclasses.is_dataclass(own):
        raise ConfigError(
            f"attack {name!r} of {known[name].owner} has no dataclass `options`; expected a "
            "lmms_smoothguard.attacks.base.Attack"
        )
    if taken := _names(own) & (common_fields() | {"options"}):
        raise ConfigError(
            f"attack {name!r} has the option {min(taken)!r}, a name of the common settings; expected another"
        )
    return own


def all_fields() -> set[str]:
    """The settings of every attack there is."""
    return common_fields().union(*(_names(options_of(name)) for name in plugins.offers("attacks")))


def _takes_sounds(name: str) -> bool:
    return bool(getattr(plugins.load("attacks", name), "sounds", False))


def _default_eps(name: str) -> Any:
    return parse_scalar(_defaults(name).get("eps", AttackSettings.eps))


def _check_rounding(eps: float, medium: Medium, changed_by: str | None = None) -> None:
    """changed_by: an attack that changes nothing but this medium."""
    if 0 < eps < 1 / medium.steps - 1e-9:
        whose, instead = "attack eps", ""
        if changed_by is not None:
            whose = f"attack {changed_by!r} changes {medium.name} alone, and its eps"
            instead = f", or for sounds one of {', '.join(sound_attacks())}"
        raise ConfigError(
            f"{whose} is {eps!r}, less than one {medium.unit}: no {medium.file} lies that near; expected 1/{medium.steps} or more"
            f"{instead}"
        )


def _names(options: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(options)}


def _text_options(options: type[Any]) -> set[str]:
    """Options declared as texts: "1/2" and "none" are no number and no None there."""
    return {field.name for field in dataclasses.fields(options) if field.type in (str, str | None, "str", "str | None")}


def _defaults(name: Any) -> dict[str, Any]:
    options_of(name)
    return dict(getattr(plugins.load("attacks", name), "defaults", {}))


def _mapping(layer: Any) -> dict[str, Any]:
    if isinstance(layer, str):
        return {"name": layer}
    if not isinstance(layer, Mapping):
        raise ConfigError(f"attack is {layer!r}; expected a name such as 'pgd' or a mapping of its settings")
    return dict(layer)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
