"""Time to the first token that a streamer sees."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer


class FirstToken(BaseStreamer):
    """Notes when the first token of the answer comes; the prompt, which generate streams too, does not count.

    `seconds`: since `start()`; None before there was a token.
    """

    def __init__(self, prompt: int) -> None:
        self._prompt = prompt
        self._started = 0.0
        self._seen = 0
        self.seconds: float | None = None

    def start(self) -> None:
        """The request is made."""
        self._started = time.perf_counter()

    def put(self, value: torch.Tensor) -> Any:
        """Takes a prompt or a token; it is on the CPU already, so nothing has to be waited for."""
        self._seen += value.numel()
        if self.seconds is None and self._seen > self._prompt:
            self.seconds = time.perf_counter() - self._started

    def end(self) -> None:
        """Nothing is left to do."""
