"""A run sharded over processes by torchrun or accelerate: one that fails must take the others with it.

Nothing is exchanged here: every process answers, attacks and scores its own share of the samples, and the harness gathers
the scores. But lmms-eval's command line prints most exceptions and exits with 0, so that the launcher waits for
processes that wait for this one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)

_MARK = "__smoothguard__"


def sharded() -> bool:
    """Whether this process is one of several, by the variable that lmms-eval itself goes by."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """In a sharded run an exception ends the process with status 1, which makes the launcher end the others."""
    try:
        yield
    except Exception as error:
        if not sharded():
            raise
        log.exception("rank %s failed, and the run with it", os.environ.get("RANK", "?"))
        raise SystemExit(1) from error


def guard_evaluator() -> None:
    """Puts `all_or_none` around lmms-eval's `evaluate`: answering, scoring and gathering. Takes leave when all is done."""
    from lmms_eval import evaluator

    evaluate = evaluator.evaluate
    if not sharded() or hasattr(evaluate, _MARK):
        return

    @functools.wraps(evaluate)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with all_or_none():
            return evaluate(*args, **kwargs)

    setattr(guarded, _MARK, True)
    evaluator.evaluate = guarded
    atexit.register(take_leave)


def take_leave() -> None:
    """Ends gloo's process group while Python still runs: its threads, left to the interpreter's end, may abort a process
    whose work is done (exit status 134), and the launcher then fails the whole run. lmms-eval never ends the group."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
