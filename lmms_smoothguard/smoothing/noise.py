"""Where the noise of a smoothed tower comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lmms_smoothguard.inputs.media import Images
from lmms_smoothguard.inputs.statistics import PixelStatistics
from lmms_smoothguard.noise import NoiseSource, add_noise, fresh_seed


class SeededNoise:
    """The defence's own: a copy is a function of (seed, picture, number of the copy), as SmoothGuard's is."""

    def __init__(self, sigma: float, seed: int | None) -> None:
        """`seed` None: fresh entropy, once for all calls of a request."""
        self._sigma, self._seed = sigma, fresh_seed() if seed is None else seed
        self._last: tuple[torch.Tensor, NoiseSource] | None = None

    def copies(self, images: Images, statistics: PixelStatistics, numbers: Sequence[int]) -> torch.Tensor:
        """(len(numbers), *images.values.shape)."""
        if self._last is None or self._last[0] is not images.values:  # hashing pictures once is enough
            source = NoiseSource(images, sigma=self._sigma, statistics=statistics, seed=self._seed)
            self._last = (images.values, source)
        return self._last[1].copies(numbers)


@dataclass
class DrawnNoise:
    """Somebody else's draws, differentiable in the pixels: an attacker's, or fresh ones for a certificate.

    generators: (pictures of a call) -> one generator a picture; it is called once a call of the tower.
    """

    sigma: float
    generators: Callable[[int], Sequence[torch.Generator]]

    def copies(self, images: Images, statistics: PixelStatistics, numbers: Sequence[int]) -> torch.Tensor:
        """(len(numbers), *images.values.shape); numbers say only how many."""
        parts = []
        for where, generator in zip(images.slices, self._current(images, numbers), strict=True):
            values = images.values[where]
            drawn = [images.layout.standard_noise(values.detach(), where, generator) for _ in numbers]
            parts.append(add_noise(values, torch.stack(drawn), images, self.sigma, statistics))
        return torch.cat(parts, dim=1)

    def _current(self, images: Images, numbers: Sequence[int]) -> Sequence[torch.Generator]:
        if numbers[0] == 1:  # a call's first batch; later ones go on with the same generators
            self._generators = self.generators(len(images.slices))
        return self._generators
