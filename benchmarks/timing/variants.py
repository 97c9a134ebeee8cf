"""What is compared: the plain answer, SmoothGuard in its forms, and the loop that SmoothGuard's published code runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.defenses.request import SmoothGuardOutput
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.inputs.statistics import statistics_of
from lmms_smoothguard.noise import NoiseSource
from timing.subjects import Subject

COPIES, SIGMA = 10, 0.2
SETTING: Mapping[str, Any] = {"num_samples": COPIES, "sigma": SIGMA, "noise_space": "pixel"}
"""The demo's: N = 10, one copy clean, sigma 0.2 in pixel units."""
PLAIN, AGAIN, OURS, NAIVE, EXACT, TOKEN = (
    "plain",
    "plain again",
    "smoothguard",
    "naive loop",
    "exact early stop",
    "token",
)
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    OURS: {},
    EXACT: {"early_stop": "exact"},
    TOKEN: {"level": "token"},
}


@dataclass(frozen=True)
class Length:
    """How many tokens an answer has: exactly `tokens`, or as many as the model wants but at most `tokens`."""

    tokens: int
    forced: bool = True

    def arguments(self) -> dict[str, Any]:
        """Of `generate`. A forced length suppresses the end-of-sequence token, so texts run on."""
        least = {"min_new_tokens": self.tokens} if self.forced else {}
        return {"max_new_tokens": self.tokens, "do_sample": False, **least}

    def __str__(self) -> str:
        return str(self.tokens) if self.forced else f"its own, at most {self.tokens}"


@dataclass(frozen=True)
class Answer:
    """`ids`: the answer's tokens, without padding and end-of-sequence; `candidates`: those of every copy's answer;
    `verdict`: SmoothGuard's own."""

    ids: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...] = ()
    verdict: SmoothGuardOutput | None = None


def answer(
    subject: Subject,
    inputs: Mapping[str, torch.Tensor],
    variant: str,
    length: Length,
    sigma: float = SIGMA,
    **more: Any,
) -> Answer:
    """Answers one request. `more` goes to `generate` (a streamer)."""
    arguments = {**inputs, **length.arguments(), **more}
    if variant == NAIVE:
        return naive_loop(subject, inputs, length, sigma)
    if variant in (PLAIN, AGAIN):
        sequences = subject.model.generate(**arguments, smoothguard=False)
        return Answer(_answer_ids(subject, inputs, sequences))
    config = {**SETTING, **_FIELDS[variant], "sigma": sigma}
    out = subject.model.generate(**arguments, smoothguard=config, return_dict_in_generate=True)
    verdict = out.smoothguard[0]
    return Answer(_answer_ids(subject, inputs, out.sequences), verdict.candidates, verdict)


def naive_loop(subject: Subject, inputs: Mapping[str, torch.Tensor], length: Length, sigma: float = SIGMA) -> Answer:
    """The published code's order of things: one plain answer, then N copies, each with a `generate` and an embedder call
    of its own, then k-means.

    It gets our own noise, so that its answers can be compared, and the cheapest embedder that can embed one answer by
    itself (the mean of the model's own token embeddings): with RoBERTa, as published, it would be slower still.
    """
    images = find_images(inputs, subject.model.config)
    if images is None:
        raise ValueError("the request has no image; expected pixel_values")
    noise = NoiseSource(
        images,
        sigma=sigma,
        statistics=statistics_of(subject.processor.image_processor, "processor"),
        seed=SmoothGuardConfig().seed,
    )
    answers: list[tuple[int, ...]] = []
    vectors: list[np.ndarray] = []
    for number in range(-1, COPIES):  # -1: the plain answer that the copies' is compared with
        pixels = images.values if number < 1 else noise.copy(number)
        sequences = subject.model.generate(**{**inputs, images.key: pixels}, **length.arguments(), smoothguard=False)
        answers.append(_answer_ids(subject, inputs, sequences))
        vectors.append(_embedding(subject, answers[-1]))
    copies = tuple(answers[1:])
    return Answer(copies[nearest_to_the_majority(np.stack(vectors[1:]))], copies)


def _answer_ids(subject: Subject, inputs: Mapping[str, torch.Tensor], sequences: torch.Tensor) -> tuple[int, ...]:
    ids = sequences[0, inputs["input_ids"].shape[1] :].tolist()
    end = subject.model.generation_config.eos_token_id
    return tuple(ids[: ids.index(end)] if end in ids else ids)


def _embedding(subject: Subject, ids: tuple[int, ...]) -> np.ndarray:
    """The mean of the model's input embeddings over an answer, (width,); the text is decoded as published code does."""
    if subject.tokenizer is not None:
        subject.tokenizer.decode(list(ids), skip_special_tokens=True)
    table = subject.model.get_input_embeddings()
    with torch.no_grad():
        found = table(torch.tensor(ids or (0,), device=table.weight.device)).float().mean(0)
    return np.asarray(found.cpu().numpy())


def nearest_to_the_majority(vectors: np.ndarray) -> int:
    """(copies, width) -> a copy. k-means, k = 2; of the larger cluster the member nearest its centroid by cosine."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct answers than clusters
        labels = KMeans(2, n_init=10, random_state=0).fit(vectors).labels_
    members = np.flatnonzero(labels == np.bincount(labels).argmax())
    centre = vectors[members].mean(0)
    lengths = np.linalg.norm(vectors[members], axis=1) * np.linalg.norm(centre)
    return int(members[np.argmax(vectors[members] @ centre / np.maximum(lengths, 1e-12))])
