"""SmoothGuard and its kin for multimodal language models: defences, attacks and the numbers that tell whether they hold.

Importing this package loads neither torch nor transformers; the public names are fetched on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_smoothguard.aggregation.verdict import Verdict, aggregate
    from lmms_smoothguard.config import SmoothGuardConfig
    from lmms_smoothguard.hookspecs import hookimpl

__version__ = "0.1.0"
__all__ = ["SmoothGuardConfig", "Verdict", "__version__", "aggregate", "hookimpl"]

_HOMES = {
    "SmoothGuardConfig": "lmms_smoothguard.config",
    "Verdict": "lmms_smoothguard.aggregation.verdict",
    "aggregate": "lmms_smoothguard.aggregation.verdict",
    "hookimpl": "lmms_smoothguard.hookspecs",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
