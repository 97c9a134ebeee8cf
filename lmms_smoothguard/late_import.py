"""Runs a callback right after a module is imported, without importing it now."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _AfterImport(importlib.abc.MetaPathFinder):
    """Stays until the module was really executed: a mere look for its spec, or an import that fails, changes nothing."""

    def __init__(self, module: str, callback: Callable[[ModuleType], None]) -> None:
        self.module, self.callback = module, callback
        self._looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module or self._looking:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                cancel(self)
                self.callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(module: str, callback: Callable[[ModuleType], None]) -> object:
    """Calls back now if the module is imported, else once it is. The result may be given to `cancel`.

    A module that another thread is importing at this moment is waited for.
    """
    if module in sys.modules:
        callback(importlib.import_module(module))
        return None
    finder = _AfterImport(module, callback)
    sys.meta_path.insert(0, finder)
    return finder


def cancel(waiting: object) -> None:
    """Withdraws a callback that has not run yet."""
    if waiting in sys.meta_path:
        sys.meta_path.remove(waiting)  # type: ignore[arg-type]
