"""Noisy copies of whole pictures, 8 bits in and out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard.inputs.layouts import ChannelsFirst
from lmms_smoothguard.inputs.media import Images
from lmms_smoothguard.inputs.statistics import PixelStatistics
from lmms_smoothguard.noise import NoiseSource, fresh_seed

_UNNORMALISED = PixelStatistics(torch.zeros(3), torch.ones(3), "8-bit picture")


def brought_to(picture: Image.Image, shortest_side: int | None) -> Image.Image:
    """The picture with its shorter side at most so many pixels long; None, or a smaller one: as it is.

    Noise belongs where the model looks. An engine that shrinks a picture tenfold averages a hundred pixels of noise into one, and
    a tenth of sigma is left.
    """
    shorter = min(picture.size)
    if shortest_side is None or shorter <= shortest_side:
        return picture
    width, height = (max(1, round(side * shortest_side / shorter)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


class NoisyPictures:
    """Noisy copies of the pictures of one request (SmoothGuard, section 3.2), in pixel space, rounded to 8 bits.

    sigma: in [0, 1] intensities; seed: None for fresh entropy. A draw is a function of (seed, picture, its number among equals in
    the request, copy), as inside of a model.
    """

    def __init__(self, pictures: Sequence[Image.Image], sigma: float, seed: int | None) -> None:
        self.clean = [picture.convert("RGB") for picture in pictures]
        seed = fresh_seed() if seed is None else seed
        self._places: list[tuple[int, int]] = []  # of each picture: its source, its row there
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, picture in enumerate(self.clean):
            by_size.setdefault(picture.size, []).append(number)
        self._sources = [self._source([self.clean[n] for n in members], sigma, seed) for members in by_size.values()]
        for number, picture in enumerate(self.clean):
            self._places.append((list(by_size).index(picture.size), by_size[picture.size].index(number)))

    @staticmethod
    def _source(pictures: Sequence[Image.Image], sigma: float, seed: int) -> NoiseSource:
        values = (
            torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).float() / 255
        )
        slices = tuple(slice(n, n + 1) for n in range(len(pictures)))
        images = Images("pixels", values, ChannelsFirst(), slices, (0,) * len(pictures))  # one row: equals are counted
        return NoiseSource(images, sigma=sigma, statistics=_UNNORMALISED, seed=seed)

    def copy(self, number: int) -> list[Image.Image]:
        """Noisy copy `number`, from 1, of every picture."""
        found = [
            (source.copy(number) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for source in self._sources
        ]
        return [Image.fromarray(found[source][row]) for source, row in self._places]
