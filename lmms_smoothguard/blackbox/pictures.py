"""Noisy copies of whole pictures, 8 bits in and out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.inputs.layouts import ChannelsFirst
from lmms_smoothguard.inputs.media import Images
from lmms_smoothguard.inputs.statistics import PixelStatistics
from lmms_smoothguard.noise import NoiseSource, fresh_seed

_UNNORMALISED = PixelStatistics(torch.zeros(3), torch.ones(3), "8-bit picture")


_MOST_ASPECT = 3.0
_LEAST_SIDE = 8


class Sight(NamedTuple):
    """The size at which a model looks at pictures, for noise belongs there: an engine that shrinks a picture tenfold averages a hundred
    pixels of noise into one, and a tenth of sigma is left.

    shortest_side: the shorter side has at most so many pixels, and the shape stays; size: width and height into which every picture is
    squeezed; neither: pictures are seen in their own size.
    """

    shortest_side: int | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: Any) -> Sight:
        """`336`: the shorter side; `384x384`: squeezed into that; `keep`: as they are. Raises ConfigError for anything else."""
        if text == "keep":
            return cls()
        sides = [int(part) if part.isdecimal() and part.isascii() else 0 for part in str(text).split("x")]
        if len(sides) > 2 or min(sides) < _LEAST_SIDE:
            raise ConfigError(
                f"seen_as is {text!r}; expected the pixels of a picture's shorter side as the model sees it, such as 336; or WIDTHxHEIGHT, such "
                "as 384x384, where it squeezes every picture into that; or 'keep' where it sees pictures in their own size. A model that "
                "shrinks a picture averages its noise away"
            )
        return cls(sides[0]) if len(sides) == 1 else cls(size=(sides[0], sides[1]))

    def of(self, picture: Image.Image) -> Image.Image:
        """The picture as the model will see it. Raises what `check` raises."""
        self.check(picture)
        if self.size is not None:
            return picture.resize(self.size, Image.Resampling.BICUBIC)
        shorter = min(picture.size)
        if self.shortest_side is None or shorter <= self.shortest_side:
            return picture
        width, height = (max(1, round(side * self.shortest_side / shorter)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.BICUBIC)

    def check(self, picture: Image.Image) -> None:
        """Raises UndefendableError for a picture so narrow that its noise may be averaged away."""
        if self.shortest_side is not None and max(picture.size) > _MOST_ASPECT * min(picture.size):
            raise UndefendableError(
                f"a picture has {picture.width} x {picture.height} pixels; expected sides of at most {_MOST_ASPECT:g} to 1, for an engine that "
                "squeezes it would average the noise away. Crop it; or let the operator say how the model sees pictures: seen_as WIDTHxHEIGHT or keep"
            )


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
