"""Noise on waveforms, of a set amplitude or at a set distance below each clip's own power."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.carried import Sounds
from lmms_smoothguard.noise.seeds import fresh_seed, generator_of, identify


class WaveformNoise:
    """Noisy copies of the sounds of one request: noise on the clips, features by the processor's own extractor."""

    def __init__(self, sounds: Sounds, *, sigma: float, snr: float | None, seed: int | None) -> None:
        """sigma: in amplitude, full scale 1; snr: in dB, replaces it: power of each clip over that of its noise.

        Raises UndefendableError for silence under `snr`: noise below nothing is no noise.
        """
        self._sounds, self._sigma, self._snr = sounds, sigma, snr
        self._seed = fresh_seed() if seed is None else seed
        self._clips = [torch.from_numpy(np.ascontiguousarray(clip, np.float32)) for clip in sounds.carried.clips]
        self._identities = identify(([clip] for clip in self._clips), sounds.rows)
        for number, clip in enumerate(self._clips, 1):
            if snr is not None and not clip.any():
                raise UndefendableError(
                    f"sound {number} is silent, and audio_snr is {snr:g} dB below its power; expected a sound, or audio_sigma"
                )

    def clips(self, number: int) -> list[np.ndarray]:
        """Noisy copy `number` of every clip, (n,) float32 each."""
        made = []
        for clip, identity in zip(self._clips, self._identities, strict=True):
            noise = torch.randn(clip.shape, generator=generator_of(self._seed, identity, number))
            made.append(add_waveform_noise(clip, noise, self._sigma, self._snr).numpy())
        return made

    def copies(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """Features of the noisy copies of these numbers, each in the shape, type and place of the request's own."""
        values = self._sounds.values
        made = self._sounds.carried.extract([self.clips(number) for number in numbers])
        return [features.to(values.device, values.dtype) for features in made]


def add_waveform_noise(clips: torch.Tensor, noise: torch.Tensor, sigma: float, snr: float | None) -> torch.Tensor:
    """`clips` (..., samples) and standard `noise` of that shape, differentiable in `clips`; nothing is cut off at full scale."""
    if snr is None:
        return clips + sigma * noise
    power = clips.square().mean(-1, keepdim=True)
    return clips + (power * 10 ** (-snr / 10)).sqrt() * noise


def draw_waveform_noise(clips: torch.Tensor, generators: Sequence[torch.Generator], config: Any) -> torch.Tensor:
    """One noisy copy of (batch, samples), a generator a row: `config` has `audio_sigma` and `audio_snr`."""
    noise = torch.stack([torch.randn(clips.shape[1:], generator=generator) for generator in generators])
    return add_waveform_noise(clips, noise.to(clips), config.audio_sigma, config.audio_snr)
