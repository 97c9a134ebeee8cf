"""Makes lm-eval know our model and our tasks. It has no entry points, so somebody must call this: `python -m
lmms_smoothguard.lm_eval`, or the functions of any of our tasks, which the stock command imports before it looks for a model.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

MODEL = "smoothguard-hf-multimodal"
TASKS = Path(__file__).parent / "tasks"
_MARK = "__smoothguard__"


def register() -> None:
    """Adds our model to lm-eval's registry, and puts the reports of attacks around its `evaluate`; once."""
    import lm_eval.models  # noqa: F401 - what registers first hides every built-in
    from lm_eval.api.registry import model_registry

    from lmms_smoothguard.harness.lm_eval import reporting

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="lmms_smoothguard.harness.lm_eval.model:SmoothGuardMultimodalLM")
    reporting.install()


def add_tasks() -> None:
    """Lets every TaskManager made from here on know our tasks by name, after those of `--include_path`."""
    from lm_eval.tasks import TaskManager

    construct = TaskManager.__init__
    if hasattr(construct, _MARK):
        return

    @functools.wraps(construct)
    def with_ours(self: Any, verbosity: Any = None, include_path: Any = None, *args: Any, **kwargs: Any) -> None:
        paths = list(include_path) if isinstance(include_path, list | tuple) else [include_path] if include_path else []
        construct(self, verbosity, [TASKS, *paths], *args, **kwargs)

    setattr(with_ours, _MARK, True)
    TaskManager.__init__ = with_ours
