"""Pictures to train on, as the model's image processor makes them: [0, 1] pixels at the model's resolution."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lmms_smoothguard.errors import ConfigError, SmoothGuardError
from lmms_smoothguard.inputs.statistics import statistics_of

SCENES = "scenes"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class TrainingPictures(Protocol):
    """A finite set; digest: which pictures."""

    digest: str

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """(len(indices), 3, height, width) in [0, 1]; `rng` mirrors half of them, None none."""


class Scenes:
    """Generated scenes of the embedded model, a share of them faint; none of them is in a test set."""

    def __init__(self, ordinary: int, faint: int, seed: int) -> None:
        from lmms_smoothguard.tiny.train import Recipe, training_scenes

        recipe = Recipe(seed=seed, ordinary_scenes=ordinary, faint_scenes=faint)
        self._images = training_scenes(recipe).images
        self.digest = f"scenes {ordinary} {faint} {seed}"

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Mirrored scenes are scenes."""
        images = _mirrored(self._images[indices], rng)
        return torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()


class Folder:
    """The pictures of a directory, read when they are wanted, through the model's own image processor."""

    def __init__(self, directory: Path, processor: Any) -> None:
        """Raises ConfigError for a directory without pictures, or a processor that makes no plain square of them."""
        self._files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in _SUFFIXES)
        if not self._files:
            raise ConfigError(f"{directory} has no pictures ({', '.join(_SUFFIXES)}); expected some to train on")
        self._processor = getattr(processor, "image_processor", processor)
        statistics = statistics_of(self._processor, "processor")
        if statistics is None:
            raise ConfigError(
                f"{type(self._processor).__name__} has no mean and std; expected an image processor that normalises"
            )
        self._mean, self._std = (value.view(-1, 1, 1) for value in statistics[:2])
        names = "\n".join(f"{path.relative_to(directory)} {path.stat().st_size}" for path in self._files)
        self.digest = hashlib.sha256(names.encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self._files)

    def batch(self, indices: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """Raises SmoothGuardError for a file that is no picture, or pixels that are no (3, height, width) of one size."""
        from PIL import Image, UnidentifiedImageError

        images = []
        for index in indices:
            try:
                with Image.open(self._files[index]) as opened:
                    images.append(opened.convert("RGB"))
            except (OSError, UnidentifiedImageError) as error:
                raise SmoothGuardError(
                    f"{self._files[index]} cannot be read ({error}); mend or remove it and start again"
                ) from error
        made = self._processor(images=images, return_tensors="pt")["pixel_values"]
        if not isinstance(made, torch.Tensor) or made.ndim != 4:
            raise ConfigError(
                f"{type(self._processor).__name__} makes pixels of shape {tuple(getattr(made, 'shape', ()))}; expected (pictures, 3, "
                "height, width): boosters are for towers that take plain pictures"
            )
        pixels = (made.float() * self._std + self._mean).clamp(0, 1)
        if rng is not None:
            mirrored = torch.from_numpy(rng.random(len(pixels)) < 0.5)
            pixels[mirrored] = pixels[mirrored].flip(-1)
        return pixels


def find_pictures(data: str, processor: Any, *, seed: int, scale: float = 1.0) -> TrainingPictures:
    """`scenes` (generated, for the embedded model) or a directory of pictures. Raises ConfigError for anything else."""
    if data == SCENES:
        return Scenes(max(64, round(12_000 * scale)), max(32, round(6_000 * scale)), seed)
    directory = Path(data).expanduser()
    if not directory.is_dir():
        raise ConfigError(f"data is {data!r}; expected {SCENES} or a directory of pictures")
    return Folder(directory, processor)


def _mirrored(images: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
    if rng is None:
        return images
    images = images.copy()
    mirrored: Sequence[bool] = rng.random(len(images)) < 0.5  # type: ignore[assignment]
    images[mirrored] = images[mirrored][:, :, ::-1]
    return images
