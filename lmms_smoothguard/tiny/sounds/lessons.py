"""What the embedded audio model is asked about a clip in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lmms_smoothguard.tiny import language as images
from lmms_smoothguard.tiny.company import NEGATIVES
from lmms_smoothguard.tiny.packing import Batch, Exchange, Packer
from lmms_smoothguard.tiny.sounds import language
from lmms_smoothguard.tiny.sounds.clips import COMPANY, TOKENS, Clip
from lmms_smoothguard.tiny.sounds.model import END, TURN, prompt

if TYPE_CHECKING:
    from transformers import Qwen2AudioProcessor

_EXISTENCE, _SENTENCE, _REQUEST = 3.0, 1.0, 0.5  # loss weights of an answer token
_KINDS, _SHARES = ("caption", "count", "order", "choice", "request"), (0.3, 0.15, 0.2, 0.2, 0.15)


def distractors(objects: Sequence[int], rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Up to two other captions' objects, as wrong as can be: the same sounds in another order, or one of them exchanged."""
    found: list[tuple[int, ...]] = []
    while len(found) < 2:
        other = list(objects)
        if len(objects) > 1 and rng.random() < 0.6:
            other = [objects[index] for index in rng.permutation(len(objects))]
        else:
            sampling = "attribute" if rng.random() < 0.8 else "random"  # some sounds have but one near relation
            other[int(rng.integers(len(other)))] = COMPANY.absent(objects, sampling, rng)
        if tuple(other) != tuple(objects) and tuple(other) not in found:
            found.append(tuple(other))
    return found


class Teacher:
    """Makes packed rows for clips."""

    def __init__(self, processor: Qwen2AudioProcessor) -> None:
        tokenizer = processor.tokenizer
        token = "<|AUDIO|>"
        before, after = prompt("").removesuffix(TURN).split(token)
        self.token_id = tokenizer.convert_tokens_to_ids(token)
        self._packer = Packer(tokenizer, [before, [self.token_id] * TOKENS, after], turn=TURN, end=END)

    def lesson(self, objects: Sequence[int], rng: np.random.Generator) -> list[Exchange]:
        """Two or three pairs of existence questions (half of the negatives swap attributes), often something else."""
        order, exchanges = rng.permutation(objects), []
        lot = rng.random()
        for index in range(3 if lot < 0.35 else 2):
            sampling = (*NEGATIVES, "attribute", "attribute", "attribute")[rng.integers(6)]
            asked = (int(order[index % len(order)]), "Yes"), (COMPANY.absent(objects, sampling, rng), "No")
            for obj, answer in asked:
                suffix = images.POPE_SUFFIX if rng.random() < 0.06 else ""
                question = language.existence_question(obj) + suffix
                exchanges.append(self._packer.exchange(question, answer, _EXISTENCE))
        if lot >= 0.35:
            exchanges.append(self._other(str(rng.choice(_KINDS, p=_SHARES)), objects, rng))
        return exchanges

    def _other(self, kind: str, objects: Sequence[int], rng: np.random.Generator) -> Exchange:
        if kind == "order" and len(objects) > 1:
            first, second = sorted(rng.choice(len(objects), 2, replace=False))
            turned = rng.random() < 0.5
            pair = (objects[second], objects[first]) if turned else (objects[first], objects[second])
            return self._packer.exchange(language.order_question(*pair), "No" if turned else "Yes", _EXISTENCE)
        if kind == "count":
            return self._packer.exchange(language.COUNT, language.NUMBERS[len(objects) - 1], _EXISTENCE)
        if kind == "choice":
            captions = [language.caption(o) for o in (objects, *distractors(objects, rng)[: int(rng.integers(1, 3))])]
            order = rng.permutation(len(captions))
            question = language.choice_question([captions[index] for index in order])
            return self._packer.exchange(question, str(int(np.flatnonzero(order == 0)[0]) + 1), _EXISTENCE)
        if kind == "request":
            return self._packer.exchange(*images.taught_request(rng), _REQUEST)
        wording = language.DESCRIBE[rng.integers(len(language.DESCRIBE))]
        return self._packer.exchange(wording, language.caption(objects), _SENTENCE)

    def batch(self, clips: Sequence[Clip], rng: np.random.Generator) -> Batch:
        """Packs one lesson a clip."""
        return self._packer.pack((self.lesson(clip.objects, rng) for clip in clips), len(clips))
