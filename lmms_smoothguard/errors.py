"""Errors a user can act on: each names the value, what was expected and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SmoothGuardError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(SmoothGuardError, ValueError):
    """A setting that cannot be meant."""


class UndefendableError(SmoothGuardError, ValueError):
    """A request that the defence cannot act on, and therefore refuses."""


class AttackError(SmoothGuardError, RuntimeError):
    """An attack that cannot be carried out as asked."""


def explain(error: BaseException) -> str:
    """Type, message and notes in one line; a note says which plugin raised it."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error}{notes}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'? Known: ...`, or only the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
