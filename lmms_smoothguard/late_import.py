"""Runs a callback right after a module is imported, without importing it now."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _AfterImport(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, callback: Callable[[ModuleType], None]) -> None:
        self.module, self.callback = module, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        cancel(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run, callback = spec.loader.exec_module, self.callback

        def exec_module(module: ModuleType) -> None:
            run(module)
            callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(module: str, callback: Callable[[ModuleType], None]) -> object:
    """Calls back now if the module is fully imported, else once it is. The result may be given to `cancel`."""
    present = sys.modules.get(module)
    spec = getattr(present, "__spec__", None)
    if present is not None and not getattr(spec, "_initializing", False):
        callback(present)
        return None
    finder = _AfterImport(module, callback)
    sys.meta_path.insert(0, finder)
    return finder


def cancel(waiting: object) -> None:
    """Withdraws a callback that has not run yet."""
    if waiting in sys.meta_path:
        sys.meta_path.remove(waiting)  # type: ignore[arg-type]
