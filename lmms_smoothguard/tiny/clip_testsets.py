"""The dual encoder's test sets: deterministic, made by code from seeds that training never uses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.company import NEGATIVES
from lmms_smoothguard.tiny.scenes import COMPANY, OBJECTS, SceneSet, make_scenes

# Seeds below 1,000 are never used in training (`train._FIRST_TRAINING_SHARD`); 1 to 4 are the LLaVA's test sets.
_ZERO_SHOT_SEED, _RETRIEVAL_SEED, _PRESENCE_SEED = 11, 12, 13
ZERO_SHOT_PER_CLASS = 20
RETRIEVAL_CAPTIONS = 500
PRESENCE_SCENES = 500
_SHARD, _SHARDS = 2000, 9  # seeds go up by a hundred from shard to shard


class ZeroShotSet(NamedTuple):
    """`images` uint8 (n, 64, 64, 3), one object in each; `labels` int64 (n,), places in OBJECTS."""

    images: np.ndarray
    labels: np.ndarray


class RetrievalSet(NamedTuple):
    """`images` uint8 (n, 64, 64, 3) and their `captions`, no caption twice."""

    images: np.ndarray
    captions: list[str]


class PresenceSet(NamedTuple):
    """`images` uint8 (n, 64, 64, 3); an object `present` in each, and one `absent` that often keeps its company; (n,)."""

    images: np.ndarray
    present: np.ndarray
    absent: np.ndarray


def _taken(scenes: SceneSet, kept: np.ndarray) -> SceneSet:
    return SceneSet(*(part[kept] for part in scenes))


def single_object(scenes: SceneSet) -> SceneSet:
    """The scenes of one object alone."""
    return _taken(scenes, np.flatnonzero((scenes.objects >= 0).sum(1) == 1))


def _shards(seed: int) -> Iterator[SceneSet]:
    for shard in range(_SHARDS):
        yield make_scenes(_SHARD, seed + 100 * shard)
    raise ValueError(f"{_SHARDS * _SHARD} scenes from seed {seed} on are not enough for what was asked; expected fewer")


@functools.cache
def zero_shot_set(per_class: int = ZERO_SHOT_PER_CLASS) -> ZeroShotSet:
    """Single-object scenes, equally many of each of the 30 classes, in the order in which they were drawn."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    shards = _shards(_ZERO_SHOT_SEED)
    while len(labels) < per_class * len(OBJECTS):
        scenes = single_object(next(shards))
        for image, label in zip(scenes.images, scenes.objects[:, 0].tolist(), strict=True):
            if labels.count(label) < per_class:
                images.append(image)
                labels.append(label)
    return ZeroShotSet(np.stack(images), np.array(labels))


@functools.cache
def retrieval_set(count: int = RETRIEVAL_CAPTIONS) -> RetrievalSet:
    """The first scenes of at least two objects that differ in their captions."""
    seen: dict[tuple[int, ...], np.ndarray] = {}
    shards = _shards(_RETRIEVAL_SEED)
    while len(seen) < count:
        scenes = next(shards)
        for index in range(len(scenes.images)):
            objects = scenes.present(index)
            if len(objects) >= 2 and len(seen) < count:
                seen.setdefault(objects, scenes.images[index])
    return RetrievalSet(np.stack(list(seen.values())), [language.caption(objects) for objects in seen])


@functools.cache
def presence_set(count: int = PRESENCE_SCENES) -> PresenceSet:
    """For each scene an object that is there and POPE's adversarial negative."""
    scenes = make_scenes(count, _PRESENCE_SEED)
    rng = np.random.default_rng([_PRESENCE_SEED, 1])
    present = [int(rng.choice(scenes.present(index))) for index in range(count)]
    absent = [COMPANY.absent(scenes.present(index), "adversarial", rng) for index in range(count)]
    return PresenceSet(scenes.images, np.array(present), np.array(absent))


_CERTIFIED_SEED, CERTIFIED_SCENES, CERTIFIED_PER_CLASS, CERTIFIED_QUESTIONS = 14, 400, 14, 420


def write_certified_sets(directory: Path) -> None:
    """What the committed certificates are of: `scenes` (ordinary ones, each with a question that nobody reads), `single` (one
    object in each, its name the label, with the article that the class prompts have) and `questions` (the first of the LLaVA's existence questions), as parquet files."""
    from lmms_smoothguard.tiny.testsets import existence_rows, existence_scenes, test_sets, write_rows

    seed = _CERTIFIED_SEED
    scenes = existence_rows(existence_scenes(CERTIFIED_SCENES, seed), seed)[:: len(NEGATIVES)]
    found = zero_shot_set(CERTIFIED_PER_CLASS)
    single = [
        {"question": "What is in the picture?", "label": language.with_article(OBJECTS[label]), "image": image}
        for image, label in zip(found.images, found.labels.tolist(), strict=True)
    ]
    rows = {"scenes": scenes, "single": single, "questions": test_sets()["pope"][:CERTIFIED_QUESTIONS]}
    directory.mkdir(parents=True, exist_ok=True)
    for name, made in rows.items():
        write_rows(made, directory / f"{name}.parquet")
