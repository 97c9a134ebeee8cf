"""What becomes of a thread's calls of `generate`, for whoever watches."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from lmms_smoothguard.defenses.request import SmoothGuardOutput

_thread = threading.local()


@dataclass(eq=False)
class Observation:
    """What happened to one thread's calls: how many were defended, their verdicts (one list a call, one entry a row;
    empty for a defence that gives none), and the first error one of them raised."""

    defended: int = 0
    verdicts: list[list[SmoothGuardOutput]] = field(default_factory=list)
    error: BaseException | None = None


@contextlib.contextmanager
def observe() -> Iterator[Observation]:
    """Watches this thread's `generate` calls; for harnesses that swallow errors or take the answer only."""
    seen = Observation()
    watching = watchers()
    watching.append(seen)
    try:
        yield seen
    finally:
        watching.remove(seen)


def watchers() -> list[Observation]:
    """Those of this thread."""
    if not hasattr(_thread, "watchers"):
        _thread.watchers = []
    return _thread.watchers
