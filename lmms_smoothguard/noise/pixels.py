"""Noise on pixels, in the model's normalised units or in those of [0, 1] intensities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.media import Images
from lmms_smoothguard.inputs.statistics import PixelStatistics
from lmms_smoothguard.noise.seeds import Identity, fresh_seed, generator_of, identify

_SLACK, _STRAY = 0.05, 0.02
"""A resize without rounding overshoots [0, 1] by this much in this share of the values at most; beyond, the mean and std
are not those that the pixels were normalised with."""
_LARGEST_NORMALISED = 30.0
"""(1 - mean) / std of the darkest, flattest statistics in use is below 5; grey levels reach 255."""


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
        layout, values = images.layout, images.values
        self._identities = identify((layout.unpadded(values[where], where) for where in images.slices), images.rows)

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

    def _draw(self, where: slice, identity: Identity, number: int) -> torch.Tensor:
        generator = generator_of(self._seed, identity, number)
        return self._images.layout.standard_noise(self._images.values[where], where, generator)


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
