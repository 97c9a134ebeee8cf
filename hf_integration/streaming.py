"""Streamers of a defended request: code of the caller's, which runs while the model is at work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


def told_aside(streamer: Any, aside: Callable[[], AbstractContextManager[None]]) -> Any:
    """A streamer, or each of a list, that is told everything within `aside()`: what it asks the model is no part of the request."""
    if isinstance(streamer, list | tuple):
        return [_Aside(one, aside) for one in streamer]
    return _Aside(streamer, aside)


class _Aside:
    """Looks like the streamer, to isinstance too."""

    def __init__(self, streamer: Any, aside: Callable[[], AbstractContextManager[None]]) -> None:
        self._streamer, self._aside = streamer, aside

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._streamer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)

    def put(self, value: Any) -> None:
        with self._aside():
            self._streamer.put(value)

    def end(self) -> None:
        with self._aside():
            self._streamer.end()
