"""Task code of lmms-eval that an import statement cannot name, because its folder has a dash in it."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from lmms_smoothguard.errors import SmoothGuardError


@functools.cache
def task_module(folder: str, name: str = "utils") -> ModuleType:
    """lmms-eval's `tasks/<folder>/<name>.py`, executed once: some read data beside them when they are.

    Raises SmoothGuardError when this version of lmms-eval has no such file.
    """
    import lmms_eval.tasks

    file = Path(str(lmms_eval.tasks.__file__)).parent / folder / f"{name}.py"
    alias = f"_smoothguard_upstream.{folder.replace('-', '_')}.{name}"
    spec = importlib.util.spec_from_file_location(alias, file) if file.is_file() else None
    if spec is None or spec.loader is None:
        raise SmoothGuardError(f"lmms-eval has no {file}; expected 0.7.3 or a later version that still has it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module
