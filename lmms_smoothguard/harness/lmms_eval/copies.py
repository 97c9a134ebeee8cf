"""Benchmarks that are not shipped, from the user's own copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lmms_smoothguard.errors import SmoothGuardError


@contextlib.contextmanager
def saying_why(benchmark: str) -> Iterator[None]:
    """Ends the process with what is wrong with a copy: lmms-eval tries five times to load data, and then names no reason; SystemExit
    it lets through."""
    try:
        yield
    except SmoothGuardError as error:
        raise SystemExit(f"{benchmark}: {error}") from error
