"""SmoothGuard inside transformers: importing this package defends every `generate` whose config asks for it.

    import hf_integration
    model.generation_config.smoothguard = True      # or {"sigma": 0.1, "num_samples": 10, ...}
    model.generate(**inputs)                        # the defended answer
    model.generate(**inputs, smoothguard=False)     # plain, for this call

It may be imported before or after transformers and loads neither it nor torch. Where it is NOT imported, a
`smoothguard` entry in a generation config does nothing at all.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lmms_smoothguard import late_import

if TYPE_CHECKING:
    from hf_integration.attached import attach
    from hf_integration.calls import force, generate_defended
    from hf_integration.observing import Observation, observe
    from hf_integration.protecting import protect, unprotect
    from lmms_smoothguard.config import SmoothGuardConfig
    from lmms_smoothguard.defenses.consensus import SmoothGuardLogitsProcessor
    from lmms_smoothguard.defenses.request import SmoothGuardOutput
    from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
    from lmms_smoothguard.smoothing.context import smoothed

__all__ = ["FeatureSmoothingConfig", "Observation", "SmoothGuardConfig", "SmoothGuardLogitsProcessor", "SmoothGuardOutput", "attach", "disable",
           "enable", "enabled", "force", "generate_defended", "observe", "protect", "smoothed", "unprotect"]  # fmt: skip

_HOMES = {
    "Observation": "hf_integration.observing",
    "attach": "hf_integration.attached",
    "force": "hf_integration.calls",
    "generate_defended": "hf_integration.calls",
    "observe": "hf_integration.observing",
    "protect": "hf_integration.protecting",
    "unprotect": "hf_integration.protecting",
    "SmoothGuardConfig": "lmms_smoothguard.config",
    "SmoothGuardLogitsProcessor": "lmms_smoothguard.defenses.consensus",
    "SmoothGuardOutput": "lmms_smoothguard.defenses.request",
    "FeatureSmoothingConfig": "lmms_smoothguard.smoothing.config",
    "smoothed": "lmms_smoothguard.smoothing.context",
}
_WATCHED = (
    "transformers.generation.utils",
    "transformers.modeling_utils",
)  # the second for models without the first's mixin
_PIPELINES = "transformers.pipelines.base"
_waiting: list[object] = []
_enabled = False


def enable() -> None:
    """Installs the override, now or as soon as transformers is imported. Calling it again changes nothing."""
    global _enabled
    if not _enabled:
        _enabled = True
        _waiting.extend(late_import.when_imported(module, _install) for module in _WATCHED)
        _waiting.append(late_import.when_imported(_PIPELINES, _install_in_pipelines))


def disable() -> None:
    """Takes the override out again: every class has the `generate` it had before."""
    global _enabled
    if _enabled:
        _enabled = False
        while _waiting:
            late_import.cancel(_waiting.pop())
        override = importlib.import_module("hf_integration.override") if _loaded() else None
        if override is not None:
            override.uninstall()
        if "hf_integration.pipelines" in sys.modules:
            importlib.import_module("hf_integration.pipelines").uninstall()


def enabled(model: Any = None) -> bool:
    """Whether the override is in place, or will be as soon as transformers is imported.

    With a model, or torch.compile's, PEFT's or a data-parallel wrapper of one: whether its `generate` is ours, so that what a defence is
    asked for is defended or refused. False where the override is out, and where a `generate` that is not ours stands in the way: one that
    was put into the model or its class after the override was (`model.generate = ...`, `Cls.generate = ...`), even if it calls ours in
    the end; one on a model that was hidden by `gc.freeze()` when the override came; none at all.
    """
    if model is not None:
        reaches: bool = importlib.import_module("hf_integration.override").reaches(model)
        return reaches
    if _enabled and "transformers.generation.utils" in sys.modules:
        return _loaded() and importlib.import_module("hf_integration.override").installed()
    return _enabled


def asked_for() -> bool:
    """Whether the override shall be in place, be it there already or not."""
    return _enabled


def _loaded() -> bool:
    return "hf_integration.override" in sys.modules


def _install(utils: ModuleType) -> None:
    override = importlib.import_module("hf_integration.override")
    if hasattr(override, "install"):  # else it is what is importing transformers, and installs itself when it is done
        override.install()


def _install_in_pipelines(base: ModuleType) -> None:
    importlib.import_module("hf_integration.pipelines").install(base)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


enable()
