"""What an attack is called in a table, a log or a page: by what tells it from others; and what it knows of the model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal

from lmms_smoothguard import plugins
from lmms_smoothguard.errors import SmoothGuardError

_SHOWN = ("name", "norm", "eps", "snr", "steps", "eot", "target", "seed")
"""Settings that have a place of their own in a title, or (the seed) none."""
_USUAL = {"loss": "margin", "restarts": 1, "step_size": None, "random_start": True}


def attack_title(settings: Mapping[str, Any]) -> str:
    """`PGD-40, 4/255` of flat settings (`AttackSettings.to_dict()`); `L2 0.5` for a budget in L2, `any colour` for all of [0, 1],
    `40 dB` for one below each sound's own power.

    Then whatever is not as usual: EOT's draws, a target, restarts, a loss other than the margin, and options other than the
    attack's own defaults (`feedback=answers`); all of them where the attack is not installed here.
    """
    budget = budget_of(settings)
    name = settings["name"].upper() if "pgd" in settings["name"] else settings["name"].capitalize()
    parts = [f"{name}-{settings['steps']}"]
    if settings.get("eot"):
        parts.append(f"EOT {settings['eot']}")
    parts.append("any colour" if budget == "255/255" else budget)
    if settings.get("target") is not None:
        parts.append("targeted")
    usual = {**_defaults(settings["name"]), **_USUAL}
    for name, value in settings.items():
        if name in _SHOWN or (name in usual and usual[name] == value):
            continue
        parts.append(f"{value} {name}" if name in ("loss", "restarts") else f"{name}={_short(value)}")
    return ", ".join(parts)


def budget_of(settings: Mapping[str, Any]) -> str:
    """`4/255`; `0.0005` where it is no whole number of grey levels, as of sounds; `L2 0.5`; `40 dB`."""
    if settings.get("snr") is not None:
        return f"{settings['snr']:g} dB"
    eps = settings["eps"]
    if settings["norm"] != "linf":
        return f"{settings['norm'].upper()} {eps:g}"
    levels = eps * 255
    return f"{levels:g}/255" if abs(levels - round(levels)) < 1e-6 else f"{eps:g}"


def attack_access(settings: Mapping[str, Any]) -> Literal["gradients", "scores", "answers"]:
    """What the attacker of flat settings uses of the model (`AttackRecord.access`): its gradients, else its scores, or answers alone
    where the option `feedback` says so. Raises ConfigError for an attack that is not installed here."""
    if getattr(plugins.load("attacks", settings["name"]), "needs_gradients", True):
        return "gradients"
    return "answers" if settings.get("feedback") == "answers" else "scores"


def _defaults(name: str) -> dict[str, Any]:
    """The defaults of an attack's own options; none where it is not installed here, or has no sound ones."""
    try:
        own = getattr(plugins.load("attacks", name), "options", None)
    except SmoothGuardError:
        return {}
    if not inspect.isclass(own) or not dataclasses.is_dataclass(own):
        return {}
    fields = dataclasses.fields(own)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def _short(value: Any) -> str:
    """A file by its name alone."""
    return PurePath(value).name if isinstance(value, str) and "/" in value else f"{value}"
