"""One certificate at a time: of a picture's features, its class, or the answer to a question about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.certify import (
    certify_answer,
    certify_image,
    certify_image_class,
    largest_answer_radius,
    largest_class_radius,
    largest_feature_radius,
)
from lmms_smoothguard.certify.features import SERVED
from lmms_smoothguard.certifying.asked import Certification
from lmms_smoothguard.choice import choose
from lmms_smoothguard.dual import DualEncoder
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.answers import same_answer, says
from lmms_smoothguard.evaluation.questions import Question
from lmms_smoothguard.subject import Subject


class Worker(Protocol):
    """Certifies one question of the data."""

    def certify(self, question: Question, digest: str) -> dict[str, Any]:
        """What the record has beside the question's own fields, ready for JSON. digest: what its randomness hangs on."""

    def largest(self, similarity: float) -> float | None:
        """The radius that n and alpha cannot certify, whatever the model (features: at that cosine)."""


def seed_of(seed: int, digest: str, purpose: str) -> int:
    """A seed for one purpose and one picture: another for each of them, the same wherever a run was interrupted."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{digest}|{purpose}".encode(), digest_size=8).digest(), "big") >> 2


def _generator(seed: int, digest: str, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, digest, purpose))


class FeatureWorker:
    """Of the features of one picture; encoder: a `TowerEncoder`; call: (question) -> what its tower is called with."""

    def __init__(self, asked: Certification, encoder: Any, call: Callable[[Question], Any]) -> None:
        self._asked, self._encoder, self._call = asked, encoder, call

    def certify(self, question: Question, digest: str) -> dict[str, Any]:
        asked = self._asked
        served = asked.reference == SERVED
        found = certify_image(
            self._encoder,
            self._call(question),
            n=asked.n,
            estimation=_generator(asked.seed, digest, "estimation"),
            alpha=asked.alpha,
            selection=_generator(asked.seed, digest, "selection") if served else None,
            n_selection=asked.n_select if served else 0,
            reference=asked.reference,
        )
        return {"certificate": found.feature.to_dict(), "tokens": found.tokens.to_dict()}

    def largest(self, similarity: float) -> float | None:
        return largest_feature_radius(self._asked.n, self._asked.alpha, self._asked.sigma, similarity)


class ClassWorker:
    """Of the class of one picture."""

    def __init__(self, asked: Certification, encoder: Any, dual: DualEncoder, classes: Sequence[str]) -> None:
        self._asked, self._encoder, self._dual, self._classes = asked, encoder, dual, tuple(classes)
        self._prototypes = dual.prototypes(classes, asked.prompts)

    def certify(self, question: Question, digest: str) -> dict[str, Any]:
        asked = self._asked
        found = certify_image_class(
            self._encoder,
            self._dual.call(question.images),
            self._prototypes,
            n=asked.n,
            n_selection=asked.n_select,
            selection=_generator(asked.seed, digest, "selection"),
            estimation=_generator(asked.seed, digest, "estimation"),
            alpha=asked.alpha,
        )
        selected = self._classes[found.selected]
        right = None if not question.right else any(same_answer(selected, name) for name in question.right)
        return {"certificate": found.to_dict(), "selected": selected, "right": right}

    def largest(self, similarity: float) -> float | None:
        return largest_class_radius(self._asked.n, self._asked.alpha, self._asked.sigma, len(self._classes))


def _noise(question: Question, sigma: float) -> dict[str, Any]:
    """Fields of SmoothGuard for noise on the question's pictures, or on its sounds. Raises ConfigError where there are both: one
    radius would be of neither."""
    if question.images and question.sounds:
        raise ConfigError(
            f"question {question.id!r} has pictures and sounds; expected one of them, for a radius is in the units of its noise"
        )
    return {"audio_sigma": sigma} if question.sounds else {"sigma": sigma, "noise_space": "pixel"}


class AnswerWorker:
    """Of the model's greedy answer to one question: SmoothGuard's own noisy copies, without the clean one, are its draws."""

    def __init__(self, asked: Certification, subject: Subject, max_new_tokens: int) -> None:
        self._asked, self._subject, self._tokens = asked, subject, max_new_tokens

    def certify(self, question: Question, digest: str) -> dict[str, Any]:
        asked, inputs = self._asked, self._subject.inputs(question)
        noise = _noise(question, asked.sigma)
        chosen = self._answers(inputs, asked.n_select, seed_of(asked.seed, digest, "selection"), noise)
        fresh = self._answers(inputs, asked.n, seed_of(asked.seed, digest, "estimation"), noise)
        found = certify_answer(chosen, fresh, sigma=asked.sigma, alpha=asked.alpha)
        selected = str(found.selected)
        clean = self._subject.answer(inputs, self._tokens).text
        same = same_answer if asked.match == "exact" else says
        right = None if not question.right else any(same(selected, text) for text in question.right)
        return {"certificate": found.to_dict(), "selected": selected, "right": right, "clean_answer": clean}

    def _answers(self, inputs: Any, count: int, seed: int, noise: Mapping[str, Any]) -> list[str]:
        """As the vote counts them: case, white space and a closing full stop make no other answer."""
        copies = choose({
            "defense": "smoothguard", "num_samples": count, "include_clean": False, **noise,
            "aggregator": "vote", "seed": seed, "max_copies_per_batch": self._asked.batch_size,
        })  # fmt: skip
        verdict = self._subject.answer(inputs, self._tokens, copies).verdict
        tokenizer = self._subject.tokenizer
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in verdict.candidates]
        if len(texts) != count:
            raise ConfigError(f"the model answered {len(texts)} copies; expected the {count} that were asked for")
        return [normalize_answer(text) for text in texts]

    def largest(self, similarity: float) -> float | None:
        return largest_answer_radius(self._asked.n, self._asked.alpha, self._asked.sigma)
