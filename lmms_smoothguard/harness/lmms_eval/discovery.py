"""Lets lmms-eval find our tasks, and keeps upstream's prompts for our models.

lmms-eval has no entry point for tasks. Its `TaskManager` is wrapped instead, once it is imported; should that ever
fail, `--include_path "$(smoothguard tasks-path)"` does the same.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

from lmms_smoothguard import late_import
from lmms_smoothguard.harness.lmms_eval.bases import base_of

log = logging.getLogger(__name__)

_MARK = "__smoothguard__"


def tasks_path() -> Path:
    """The directory of our tasks: `lmms_smoothguard.tasks`, wherever it is installed."""
    import importlib.util

    spec = importlib.util.find_spec("lmms_smoothguard.tasks")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "lmms_smoothguard.tasks is not installed; expected it beside the package. Reinstall it."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def install() -> None:
    """Wraps the TaskManager now, or as soon as it is imported."""
    late_import.when_imported("lmms_eval.tasks", _wrap)


def _wrap(tasks: ModuleType) -> None:
    manager = getattr(tasks, "TaskManager", None)
    if manager is None or hasattr(manager, _MARK):
        return
    try:
        ours = str(tasks_path())
    except FileNotFoundError as error:
        log.warning("%s", error)
        return
    initialize_tasks, construct = manager.initialize_tasks, manager.__init__

    @functools.wraps(initialize_tasks)
    def with_ours(self: Any, include_path: Any = None, include_defaults: bool = True) -> Any:
        paths = [include_path] if isinstance(include_path, str) else list(include_path or [])
        if include_defaults and ours not in paths:
            paths.append(ours)
        return initialize_tasks(self, include_path=paths or None, include_defaults=include_defaults)

    @functools.wraps(construct)
    def with_base_name(self: Any, *args: Any, **kwargs: Any) -> None:
        # A task's per-model prompts are keyed by the model's name: ours must find those of its base.
        if "model_name" in kwargs:
            kwargs["model_name"] = base_of(kwargs["model_name"])
        construct(self, *args, **kwargs)

    manager.initialize_tasks, manager.__init__ = with_ours, with_base_name
    setattr(manager, _MARK, True)
