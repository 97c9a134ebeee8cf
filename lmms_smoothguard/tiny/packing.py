"""Training batches: one picture or clip, several questions about it in one packed row.

Every question sees the prefix and itself, never its neighbours (a block mask), so what is asked about is encoded once for
all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

ROW_LENGTH = 160
IGNORED = -100
_END = 0.2  # share of an answer's weight for the end-of-sentence token, which is soon learnt


class Exchange(NamedTuple):
    """A question's and an answer's token ids, and the weight of the answer's tokens in the loss."""

    question: list[int]
    answer: list[int]
    weight: float


class Batch(NamedTuple):
    """Packed rows: `input_ids`, `position_ids`, `targets` (next tokens or IGNORED), `weights`: (batch, ROW_LENGTH);
    `attention_mask`: additive, (batch, 1, ROW_LENGTH, ROW_LENGTH)."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    attention_mask: torch.Tensor


class Packer:
    """Makes packed rows out of exchanges, all behind one prefix."""

    def __init__(self, tokenizer: Any, prefix: Sequence[str | Sequence[int]], turn: str, end: str) -> None:
        """`prefix`: texts and token ids before every question; `turn`: what stands between question and answer; `end`: the token
        that ends an answer."""
        self._tokenizer, self._turn, self._end = tokenizer, turn, end
        self._cache: dict[str, list[int]] = {}
        parts = (self._ids(part) if isinstance(part, str) else part for part in prefix)
        self.prefix = [token for part in parts for token in part]

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def exchange(self, question: str, answer: str, weight: float) -> Exchange:
        """One question and answer, tokenised as the chat template would have it."""
        return Exchange(self._ids(question + self._turn), self._ids(answer + self._end), weight)

    def pack(self, lessons: Iterable[Sequence[Exchange]], rows: int) -> Batch:
        """One row a lesson; what does not fit into a row is left out."""
        shape = (rows, ROW_LENGTH)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets, weights = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.float32)
        block = np.full(shape, -1, np.int64)  # 0: the prefix; k: the k-th exchange; -1: padding
        for row, lesson in enumerate(lessons):
            start = len(self.prefix)
            ids[row, :start], positions[row, :start], block[row, :start] = self.prefix, np.arange(start), 0
            for number, item in enumerate(lesson, start=1):
                length = len(item.question) + len(item.answer)
                if start + length > ROW_LENGTH:
                    break
                span = slice(start, start + length)
                ids[row, span], block[row, span] = item.question + item.answer, number
                positions[row, span] = np.arange(len(self.prefix), len(self.prefix) + length)
                answered = slice(start + len(item.question) - 1, start + length - 1)
                targets[row, answered] = item.answer
                weights[row, answered] = [item.weight] * (len(item.answer) - 1) + [item.weight * _END]
                start += length
        blocks = torch.from_numpy(block)
        sees = (blocks[:, None, :] == 0) | (blocks[:, None, :] == blocks[:, :, None])
        sees &= torch.ones(ROW_LENGTH, ROW_LENGTH, dtype=torch.bool).tril()
        sees |= torch.eye(ROW_LENGTH, dtype=torch.bool)
        mask = torch.zeros(sees.shape).masked_fill(~sees, -1e9)[:, None]
        tensors = [torch.from_numpy(array) for array in (ids, positions, targets, weights)]
        return Batch._make([*tensors, mask])
