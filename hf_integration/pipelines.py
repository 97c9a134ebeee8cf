"""transformers' pipelines: the processor of every one that hears is protected, so that a defence asked for later can act."""

from __future__ import annotations

import functools
import weakref
from types import ModuleType
from typing import Any

from hf_integration.protecting import hears, is_protected, protect, unprotect

_protected: weakref.WeakSet[Any] = weakref.WeakSet()
"""Processors that were protected here, and by nobody else."""
_wrapped: list[tuple[type, Any]] = []


def install(base: ModuleType) -> None:
    """Wraps what makes a pipeline. `base`: transformers.pipelines.base."""
    if _wrapped:
        return
    original = base.Pipeline.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        processor = getattr(self, "processor", None)
        if _wrapped and processor is not None and hears(processor) and not is_protected(processor):
            _protected.add(protect(processor))

    _wrapped.append((base.Pipeline, original))
    base.Pipeline.__init__ = __init__


def uninstall() -> None:
    """Takes that back, processors too: without the override, `generate` would refuse what they carry."""
    while _wrapped:
        owner, original = _wrapped.pop()
        owner.__init__ = original  # type: ignore[misc]
    for processor in list(_protected):
        unprotect(processor)
    _protected.clear()
