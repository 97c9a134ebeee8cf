"""The stronger attacks of the README's table: every attack there is, on the undefended model and on the defence."""

from __future__ import annotations

from collections.abc import Mapping

from lmms_smoothguard.report.experiments import Experiment

_PIXEL = {"sigma": "0.2", "noise_space": "pixel"}
_EOT = {"attack_eot": "8", "attack_batch_size": "128"}
_UNDEFENDED, _DEFENDED = "undefended", "SmoothGuard, N = 10, sigma 0.2 pixel"


def _both(name: str, task: str, limit: int, attack: Mapping[str, str] | None = None) -> tuple[Experiment, ...]:
    """The same pictures, crafted on the undefended model, against both."""
    asked = dict(attack or {})
    return (
        Experiment(f"plain_{name}", {"defense": "none"} | asked, (task,), limit, about=_UNDEFENDED),
        Experiment(f"smoothguard_{name}", _PIXEL | asked, (task,), limit, about=_DEFENDED),
    )


def _adaptive(name: str, task: str, limit: int, attack: Mapping[str, str] | None = None) -> Experiment:
    """Pictures crafted through the defence's noise."""
    return Experiment(f"smoothguard_{name}_eot", _PIXEL | _EOT | dict(attack or {}), (task,), limit, about=_DEFENDED)


_UNIVERSAL, _ANY_COLOUR = {"attack_steps": "300"}, {"attack_eps": "1", "attack_steps": "300"}
# Fixed beforehand: 4/255 (8/255 where nothing but answers or features is used), adaptive ones 8 draws a step.
STRONGER = (
    *_both("restarts", "shapes_pope_pgd", 100, {"attack_restarts": "5"}),
    *_both("apgd", "shapes_pope_apgd", 300),
    *_both("l2", "shapes_pope_pgd_l2", 150),
    *_both("square", "shapes_pope_square", 100),
    *_both("square_answers", "shapes_pope_square", 40, {"attack_feedback": "answers", "attack_steps": "1600"}),
    *_both("patch", "shapes_pope_patch", 150),
    *_both("feature", "shapes_pope_feature", 150),
    *_both("universal", "shapes_safety_universal", 104, _UNIVERSAL),
    *_both("universal_free", "shapes_safety_universal", 104, _ANY_COLOUR),
    _adaptive("apgd", "shapes_pope_apgd", 100),
    _adaptive("l2", "shapes_pope_pgd_l2", 60),
    _adaptive("patch", "shapes_pope_patch", 60),
    _adaptive("feature", "shapes_pope_feature", 60),
    _adaptive("universal", "shapes_safety_universal", 104, {"attack_steps": "1000", "attack_batch": "4"}),
    _adaptive("universal_free", "shapes_safety_universal", 104, _ANY_COLOUR | {"attack_steps": "150", "attack_batch": "4"}),
)  # fmt: skip
