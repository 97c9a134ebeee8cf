"""Seeded Gaussian noise.

A draw is a function of (seed, the unpadded image, its number among equals in its row, copy): never of N, of the batch
or of anybody's random state. It is made in float32 on the CPU, so that every device sees the same bits.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.media import Images
from lmms_smoothguard.inputs.statistics import PixelStatistics

_SLACK, _STRAY = 0.05, 0.02
"""A resize without rounding overshoots [0, 1] by this much in this share of the values at most; beyond, the mean and std
are not those that the pixels were normalised with."""
_LARGEST_NORMALISED = 30.0
"""(1 - mean) / std of the darkest, flattest statistics in use is below 5; grey levels reach 255."""


def fresh_seed() -> int:
    """Entropy from the operating system, for `seed=None`."""
    return secrets.randbits(63)


class NoiseSource:
    """Noisy copies of the images of one request."""

    def __init__(self, images: Images, *, sigma: float, statistics: PixelStatistics | None, seed: int | None) -> None:
        """`statistics` None: `sigma` is in normalised units; else in [0, 1] pixel units, and values stay in that range.

        Raises UndefendableError where the pixels are not in that range by these statistics.
        """
        if statistics is not None:
            _check_range(images, statistics)
        elif (largest := float(images.values.abs().max())) > _LARGEST_NORMALISED:
            raise UndefendableError(
                f"the pixels reach {largest:.0f} and are not normalised, so sigma has no meaning in normalised units; expected "
                "a processor that normalises, or at least rescales to [0, 1]"
            )
        self._images, self._sigma, self._statistics = images, sigma, statistics
        self._seed = fresh_seed() if seed is None else seed
        self._identities = self._identify()

    def _identify(self) -> list[tuple[bytes, int]]:
        """(digest, number among equals in its row) of every image."""
        seen: dict[tuple[int, bytes], int] = {}
        identities = []
        for number, where in enumerate(self._images.slices):
            hasher = hashlib.blake2b(digest_size=16)
            for part in self._images.layout.unpadded(self._images.values[where], where):
                hasher.update(repr(tuple(part.shape)).encode())
                hasher.update(part.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
            digest = hasher.digest()
            occurrence = 0
            if self._images.rows is not None:
                place = (self._images.rows[number], digest)
                occurrence = seen.get(place, 0)
                seen[place] = occurrence + 1
            identities.append((digest, occurrence))
        return identities

    def copy(self, number: int) -> torch.Tensor:
        """Noisy copy `number` of the whole image tensor, in its own shape, type and place."""
        return self.copies([number])[0]

    def copies(self, numbers: Sequence[int]) -> torch.Tensor:
        """Noisy copies of these numbers, stacked: (len(numbers), *shape of the image tensor)."""
        values = self._images.values
        noisy = torch.empty((len(numbers), *values.shape), dtype=values.dtype, device=values.device)
        for where, identity in zip(self._images.slices, self._identities, strict=True):
            noise = torch.stack([self._draw(where, identity, number) for number in numbers])
            noisy[:, where] = add_noise(values[where], noise, self._images, self._sigma, self._statistics)
        return noisy

    def _draw(self, where: slice, identity: tuple[bytes, int], number: int) -> torch.Tensor:
        digest, occurrence = identity
        key = b"%d|%b|%d|%d" % (self._seed, digest, occurrence, number)
        place = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        generator = torch.Generator().manual_seed(place)
        return self._images.layout.standard_noise(self._images.values[where], where, generator)


class Draw(NamedTuple):
    """What an attacker draws a defence's randomness for: images whose `values` may carry a graph, one generator an image
    (of the attacker's own: evaluation seeds stay unseen), and the model's pixel statistics, where they are asked for."""

    images: Images
    generators: Sequence[torch.Generator]
    statistics: Callable[[], PixelStatistics]


class Inside(NamedTuple):
    """What an attacker draws a defence's randomness for that acts inside the model: `draws` passes a call, with generators
    (pictures of a call) -> one of the attacker's own a picture."""

    model: Any
    image_processor: Any
    draws: int
    generators: Callable[[int], Sequence[torch.Generator]]


class Randomness(NamedTuple):
    """A defence's randomness, for attacks that average over it (EOT).

    fields: the settings that its distribution hangs on, a seed never among them; draw: (Draw, the defence's config) -> the
    pixel tensor as the model gets it, differentiable; None for a defence that leaves pixels alone. inside: (Inside, config) -> a
    context in which the model's own forward is defended, differentiable in its pixels; None for one that leaves the model alone.
    Where there is `draw`, its draws are averaged, each with whatever `inside` does; else `inside` draws that many.
    content: (model, config) -> what fields only point at, such as weights: an attack belongs to it.
    """

    fields: tuple[str, ...]
    draw: Callable[[Draw, Any], torch.Tensor] | None = None
    inside: Callable[[Inside, Any], AbstractContextManager[Any]] | None = None
    content: Callable[[Any, Any], Any] | None = None


def draw_noise(draw: Draw, config: Any) -> torch.Tensor:
    """One noisy copy: `config` has `sigma` and `noise_space`."""
    images = draw.images
    statistics = draw.statistics() if config.noise_space == "pixel" else None
    parts = []
    for where, generator in zip(images.slices, draw.generators, strict=True):
        values = images.values[where]
        noise = images.layout.standard_noise(values.detach(), where, generator)
        parts.append(add_noise(values, noise, images, config.sigma, statistics))
    return torch.cat(parts)


NOISE = Randomness(("sigma", "noise_space"), draw_noise)


def _check_range(images: Images, statistics: PixelStatistics) -> None:
    """Noise in pixel units is clipped to [0, 1]: with another processor's statistics it would damage the picture."""
    for where in images.slices:
        values = images.values[where].float()
        mean = images.layout.per_channel(statistics.mean, values).to(values.device)
        std = images.layout.per_channel(statistics.std, values).to(values.device)
        pixels = values * std + mean
        stray = float(((pixels < -_SLACK) | (pixels > 1 + _SLACK)).float().mean())
        if stray > _STRAY:
            raise UndefendableError(
                f"by the mean and std at hand (from: {statistics.source}) the pixels lie in [{float(pixels.min()):.2f}, "
                f"{float(pixels.max()):.2f}], {stray:.0%} of them outside [0, 1]; expected the statistics of the processor "
                "that made them. Call hf_integration.attach(model, processor), or use noise_space='normalized'."
            )


def add_noise(
    values: torch.Tensor, noise: torch.Tensor, images: Images, sigma: float, statistics: PixelStatistics | None
) -> torch.Tensor:
    """`values` + sigma * `noise`, differentiable in `values`; padding (exactly 0 in `noise`) stays as it was."""
    noise = noise.to(values.device)
    if statistics is None:
        return (values.float() + sigma * noise).to(values.dtype)
    mean = images.layout.per_channel(statistics.mean, values).to(values.device)
    std = images.layout.per_channel(statistics.std, values).to(values.device)
    clipped = (values.float() + sigma * noise / std).clamp((0 - mean) / std, (1 - mean) / std)
    return torch.where(noise == 0, values.float(), clipped).to(values.dtype)
