"""Streamers of a defended request: each user row has one stream, however many copies are behind it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from lmms_smoothguard.errors import UndefendableError


def row_streams(streamer: Any, rows: int, ends: Collection[int], pad: int | None = None) -> RowStreams | None:
    """The streams of a request's `streamer`: one for a batch of one, a list with one a row, or one that takes batches.

    Raises UndefendableError where rows and streamers do not fit, before anything is answered.
    """
    if streamer is None:
        return None
    if isinstance(streamer, list | tuple):
        if len(streamer) != rows:
            raise UndefendableError(f"{len(streamer)} streamers were given for {rows} rows; expected one a row")
        return RowStreams(list(streamer), ends, pad, together=False)
    from transformers.generation.streamers import TextStreamer

    if rows != 1 and isinstance(streamer, TextStreamer):
        raise UndefendableError(
            f"a {type(streamer).__name__} takes one row, the request has {rows}; expected a batch of one, or a list of "
            f"{rows} streamers, one a row"
        )
    return RowStreams([streamer], ends, pad, together=True)


class RowStreams:
    """Hands on what a batch of copies produces: the first rows, one a user row. A streamer in transformers' sense.

    `together`: one streamer gets all rows, as from an undefended `generate`; else each row has a streamer of its own,
    which ends with the row and gets no padding.
    """

    def __init__(self, streamers: list[Any], ends: Collection[int], pad: int | None, *, together: bool) -> None:
        self._streamers, self._ends, self._pad, self._together = streamers, ends, pad, together
        self._open = [True] * len(streamers)
        self._held: list[list[torch.Tensor]] = [[] for _ in streamers]  # padding, unless something follows

    def put(self, value: torch.Tensor) -> None:
        """(rows, tokens) of the prompt, or (rows,) of a step; further rows are copies and are left out."""
        if self._together:
            self._streamers[0].put(value)
            return
        for row, streamer in enumerate(self._streamers):
            if not self._open[row]:
                continue
            token = value[row : row + 1]
            if value.ndim == 1 and int(token) == self._pad and self._pad not in self._ends:
                self._held[row].append(token)
                continue
            for held in self._held[row]:
                streamer.put(held)
            self._held[row] = []
            streamer.put(token)
            if value.ndim == 1 and int(token) in self._ends:
                self._close(row)

    def end(self) -> None:
        """Ends what is still open."""
        for row in range(len(self._streamers)):
            if self._open[row]:
                self._close(row)

    def replay(self, sequences: torch.Tensor, start: int, lengths: Sequence[int]) -> None:
        """Answers that are known already: (rows, tokens), the first `start` of them no part of the answer; `lengths` of
        all that comes after, for each row."""
        self.put(sequences[:, :start].cpu())
        for number, step in enumerate(sequences[:, start:].T.cpu()):
            self.put(step)
            for row, length in enumerate(lengths):
                if not self._together and self._open[row] and number + 1 >= length:
                    self._close(row)
        self.end()

    def _close(self, row: int) -> None:
        self._open[row] = False
        self._streamers[row].end()


class FirstRows:
    """A streamer for a copy-major batch whose copies all say the same: passes on the first `rows`."""

    def __init__(self, streams: RowStreams, rows: int) -> None:
        self._streams, self._rows = streams, rows

    def put(self, value: torch.Tensor) -> None:
        self._streams.put(value[: self._rows])

    def end(self) -> None:
        self._streams.end()
