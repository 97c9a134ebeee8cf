"""What the embedded LLaVA is asked about a scene in training.

What a batch holds depends on (seed, stage, step) alone: a resumed run sees what an unbroken one saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.company import NEGATIVES
from lmms_smoothguard.tiny.packing import Batch, Exchange, Packer
from lmms_smoothguard.tiny.scenes import COMPANY, GRID, SceneSet

if TYPE_CHECKING:
    from transformers import LlavaProcessor

_EXISTENCE, _CAPTION, _REQUEST = 3.0, 1.0, 0.5  # loss weights of an answer token


class Teacher:
    """Makes packed rows for scenes."""

    def __init__(self, processor: LlavaProcessor) -> None:
        from lmms_smoothguard.tiny.model import prompt

        before, after = prompt("").removesuffix(" ASSISTANT:").split("<image>")
        pictures = [processor.image_token_id] * (GRID * GRID)
        self._packer = Packer(processor.tokenizer, [before, pictures, after], turn=" ASSISTANT:", end="</s>")

    def _exchange(self, question: str, answer: str, weight: float) -> Exchange:
        return self._packer.exchange(question, f" {answer}", weight)

    def lesson(self, present: Sequence[int], rng: np.random.Generator) -> list[Exchange]:
        """Two or three pairs of existence questions (half of the negatives swap attributes), often a caption or a request."""
        lot = rng.random()
        order = rng.permutation(present)
        exchanges = []
        for index in range(3 if lot < 0.6 else 2):
            sampling = (*NEGATIVES, "attribute", "attribute", "attribute")[rng.integers(6)]
            asked = (int(order[index % len(order)]), "Yes"), (COMPANY.absent(present, sampling, rng), "No")
            for obj, answer in asked:
                suffix = language.POPE_SUFFIX if rng.random() < 0.06 else ""
                exchanges.append(self._exchange(language.existence_question(obj) + suffix, answer, _EXISTENCE))
        if 0.6 <= lot < 0.85:
            wording = language.DESCRIBE[rng.integers(len(language.DESCRIBE))]
            exchanges.append(self._exchange(wording, language.caption(present), _CAPTION))
        if lot >= 0.75:
            exchanges.append(self._exchange(*language.taught_request(rng), _REQUEST))
        return exchanges

    def batch(self, scenes: SceneSet, indices: Sequence[int], rng: np.random.Generator) -> Batch:
        """Packs one lesson a scene."""
        return self._packer.pack((self.lesson(scenes.present(index), rng) for index in indices), len(indices))
