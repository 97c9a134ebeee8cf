"""Noisy copies of sound clips: noised in the waveform."""

from __future__ import annotations

import numpy as np

from lmms_smoothguard.noise import fresh_seed
from lmms_smoothguard.sounds import Clip


class NoisyClips:
    """Noisy copies of one request's clips. sigma: in amplitude, full scale 1; seed: None for fresh entropy."""

    def __init__(self, clips: list[Clip], sigma: float, seed: int | None) -> None:
        self.clean, self._sigma = clips, sigma
        self._seed = fresh_seed() if seed is None else seed

    def copy(self, number: int) -> list[Clip]:
        """Noisy copy `number`, from 1, of every clip."""
        return [self._noisy(clip, place, number) for place, clip in enumerate(self.clean)]

    def _noisy(self, clip: Clip, place: int, number: int) -> Clip:
        noise = np.random.default_rng([self._seed, place, number]).standard_normal(clip.samples.shape, np.float32)
        return Clip(np.clip(clip.samples + self._sigma * noise, -1, 1), clip.rate)
