"""Training batches: one image, several questions about it in one packed row.

Every question sees the image prefix and itself, never its neighbours (a block mask), so an image is encoded once for
all of them. What a batch holds depends on (seed, stage, step) alone: a resumed run sees what an unbroken one saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.scenes import GRID, SceneSet

if TYPE_CHECKING:
    from transformers import LlavaProcessor

ROW_LENGTH = 160
IGNORED = -100
_EXISTENCE, _CAPTION, _REQUEST = 3.0, 1.0, 0.5  # loss weights of an answer token
_END = 0.2  # share of that for the end-of-sentence token, which is soon learnt


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


class Teacher:
    """Makes packed rows for scenes."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self._tokenizer = processor.tokenizer
        self._cache: dict[str, list[int]] = {}
        before, after = (self._ids(part) for part in language_prefix())
        self.prefix = before + [processor.image_token_id] * (GRID * GRID) + after

    def _ids(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def exchange(self, question: str, answer: str, weight: float) -> Exchange:
        """One question and answer, tokenised as the chat template would have it."""
        return Exchange(self._ids(f"{question} ASSISTANT:"), self._ids(f" {answer}</s>"), weight)

    def lesson(self, present: Sequence[int], rng: np.random.Generator) -> list[Exchange]:
        """Two or three pairs of existence questions (half of the negatives swap attributes), often a caption or a request."""
        lot = rng.random()
        order = rng.permutation(present)
        exchanges = []
        for index in range(3 if lot < 0.6 else 2):
            sampling = (*language.NEGATIVES, "attribute", "attribute", "attribute")[rng.integers(6)]
            asked = (int(order[index % len(order)]), "Yes"), (language.absent_object(present, sampling, rng), "No")
            for obj, answer in asked:
                suffix = language.POPE_SUFFIX if rng.random() < 0.06 else ""
                exchanges.append(self.exchange(language.existence_question(obj) + suffix, answer, _EXISTENCE))
        if 0.6 <= lot < 0.85:
            wording = language.DESCRIBE[rng.integers(len(language.DESCRIBE))]
            exchanges.append(self.exchange(wording, language.caption(present), _CAPTION))
        if lot >= 0.75:
            forbidden = rng.random() < 0.5
            verbs = language.FORBIDDEN_VERBS if forbidden else language.PERMITTED_VERBS
            pairs = language.request_pairs(verbs, test=False)
            verb, thing = pairs[rng.integers(len(pairs))]
            answer = language.REFUSAL if forbidden else language.compliance(verb, thing)
            question = language.request(verb, thing, int(rng.integers(len(language.REQUESTS))))
            exchanges.append(self.exchange(question, answer, _REQUEST))
        return exchanges

    def batch(self, scenes: SceneSet, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        """Packs one lesson a scene."""
        shape = (len(indices), ROW_LENGTH)
        ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets, weights = np.full(shape, IGNORED, np.int64), np.zeros(shape, np.float32)
        block = np.full(shape, -1, np.int64)  # 0: the image prefix; k: the k-th exchange; -1: padding
        for row, index in enumerate(indices):
            start = len(self.prefix)
            ids[row, :start], positions[row, :start], block[row, :start] = self.prefix, np.arange(start), 0
            for number, item in enumerate(self.lesson(scenes.present(index), rng), start=1):
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


def language_prefix() -> tuple[str, str]:
    """The text before and after the image tokens of a row."""
    from lmms_smoothguard.tiny.model import prompt

    before, after = prompt("").removesuffix(" ASSISTANT:").split("<image>")
    return before, after
