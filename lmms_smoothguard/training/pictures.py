"""Pictures to train on: generated scenes, or a folder; as float32 in [0, 1] at the size that the tower takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lmms_smoothguard.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_SCENE_SHARD = 61_000  # seeds of scenes that neither a test set nor another training uses
_HELD_OUT, _HELD_OUT_SEED = 200, 21
_SINGLE_SHARE = 0.15  # of scenes with one object alone


class Source(Protocol):
    """Pictures by number. `classes` is empty where they have no labels; `identity` goes into the checkpoint's recipe."""

    classes: tuple[str, ...]
    identity: str

    def __len__(self) -> int: ...

    def pictures(self, indices: Sequence[int]) -> list[Any]:
        """PIL pictures."""
        ...

    def labels(self, indices: Sequence[int]) -> torch.Tensor:
        """Places in `classes`, (n,)."""
        ...


class SceneSource:
    """Generated scenes; labelled where each has one object alone."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, identity: str) -> None:
        from lmms_smoothguard.tiny.scenes import OBJECTS

        self._images, self._labels, self.identity = images, labels, identity
        self.classes = OBJECTS if labels is not None else ()

    def __len__(self) -> int:
        return len(self._images)

    def pictures(self, indices: Sequence[int]) -> list[Any]:
        from PIL import Image

        return [Image.fromarray(self._images[index]) for index in indices]

    def labels(self, indices: Sequence[int]) -> torch.Tensor:
        if self._labels is None:
            raise ConfigError("these scenes have several objects, and no class; expected single-object scenes")
        return torch.from_numpy(self._labels[list(indices)])


class FolderSource:
    """Picture files in a folder, read when they are wanted; with `classes` the first folder of each is its class."""

    def __init__(self, folder: Path, paths: Sequence[Path], classes: tuple[str, ...] = ()) -> None:
        self._paths, self.classes = list(paths), classes
        places = [path.relative_to(folder) for path in paths]
        self._labels = np.array([classes.index(place.parts[0]) if classes else 0 for place in places])
        listed = "\n".join(f"{place} {path.stat().st_size}" for place, path in zip(places, paths, strict=True))
        self.identity = f"{len(self._paths)} pictures, {hashlib.sha256(listed.encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._paths)

    def pictures(self, indices: Sequence[int]) -> list[Any]:
        """Raises ConfigError for a file that cannot be read, and names it."""
        return [_opened(self._paths[index]) for index in indices]

    def labels(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(self._labels[list(indices)])


def _opened(path: Path) -> Any:
    from PIL import Image

    from lmms_smoothguard.files import whole_pictures

    try:
        with whole_pictures(), Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(
            f"{path} is no picture that can be read ({error}); mend or remove it, and start again: training goes on from its last "
            "checkpoint only while the folder is the same"
        ) from error


def folder_sources(folder: Path, *, labelled: bool) -> tuple[FolderSource, FolderSource]:
    """The pictures of a folder and of the folders in it: a tenth of them, 200 at most, held out, the others to train on.

    Raises ConfigError for a folder that is missing or empty, or has no class folders where they are wanted.
    """
    if not folder.is_dir():
        raise ConfigError(f"data is {str(folder)!r}; expected 'scenes' or a folder of pictures")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if len(paths) < 2:
        raise ConfigError(
            f"{folder} has {len(paths)} pictures; expected more, in files that end in {', '.join(SUFFIXES)}"
        )
    classes: tuple[str, ...] = ()
    if labelled:
        classes = tuple(sorted({path.relative_to(folder).parts[0] for path in paths if path.parent != folder}))
        if any(path.parent == folder for path in paths) or len(classes) < 2:
            raise ConfigError(
                f"{folder} has pictures outside of class folders, or fewer than two of those; expected {folder}/<class>/<picture>, "
                "for TeCoA needs each picture's class"
            )
    shuffled = [paths[place] for place in np.random.default_rng(0).permutation(len(paths))]
    kept = max(1, min(_HELD_OUT, len(paths) // 10))
    return FolderSource(folder, shuffled[kept:], classes), FolderSource(folder, shuffled[:kept], classes)


def held_out_scenes(*, labelled: bool) -> SceneSource:
    """Scenes that no training sees: 200 ordinary ones, or those of the zero-shot test set."""
    from lmms_smoothguard.tiny.clip_testsets import zero_shot_set
    from lmms_smoothguard.tiny.scenes import make_scenes

    if labelled:
        found = zero_shot_set()
        return SceneSource(found.images, found.labels, "zero-shot test set")
    return SceneSource(make_scenes(_HELD_OUT, _HELD_OUT_SEED).images, None, "held-out scenes")


def scene_source(count: int, faint: int, seed: int, *, labelled: bool) -> SceneSource:
    """Generated scenes, `count` of them and `faint` among these; labelled ones have a single object each."""
    from lmms_smoothguard.tiny.clip_testsets import single_object
    from lmms_smoothguard.tiny.train import draw_shards, shard_tasks

    base = _SCENE_SHARD + 100_000 * seed
    identity = f"{count} scenes, {faint} of them faint, {'single objects' if labelled else 'all'}"
    if not labelled:
        scenes = draw_shards(shard_tasks(count - faint, faint, base))
        return SceneSource(scenes.images, None, identity)
    scenes = single_object(draw_shards(shard_tasks(round(count / _SINGLE_SHARE * 1.1), 0, base)))
    return SceneSource(scenes.images[:count], scenes.objects[:count, 0].astype(np.int64), identity)


def to_pixels(image_processor: Any, pictures: list[Any]) -> torch.Tensor:
    """Pictures as the model's processor resizes and crops them, before it normalises: (n, 3, h, w) in [0, 1]."""
    made = image_processor(images=pictures, do_normalize=False, return_tensors="pt")["pixel_values"]
    return made.float().clamp(0, 1)
