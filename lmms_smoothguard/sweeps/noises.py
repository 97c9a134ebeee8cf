"""The noise of a point: its size, and the units that this is in."""

from __future__ import annotations

from typing import NamedTuple

from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import ConfigError, did_you_mean

PICTURES = ("pixel", "normalized")
SOUNDS = ("amplitude", "snr")
UNITS = {
    "pixel": "[0, 1] pixels", "normalized": "normalised units", "amplitude": "amplitude, full scale 1",
    "snr": "dB below the sound",
}  # fmt: skip


class Noise(NamedTuple):
    """What a noisy copy hangs on besides its request and its number. sigma: its size in the units of `space`: "pixel" or "normalized",
    of pictures; "amplitude", or "snr" in dB, of sounds."""

    sigma: float
    space: str
    seed: int

    @property
    def config(self) -> SmoothGuardConfig:
        """A defence of this noise."""
        return config_of(self.space, self.sigma, self.seed)


def config_of(space: str, size: float, seed: int | None = 0) -> SmoothGuardConfig:
    """A defence whose noise has that size. Raises ConfigError for units that are none."""
    if space in PICTURES:
        return SmoothGuardConfig(sigma=size, noise_space=space, seed=seed)
    if space == "amplitude":
        return SmoothGuardConfig(audio_sigma=size, seed=seed)
    if space == "snr":
        return SmoothGuardConfig(audio_snr=size, seed=seed)
    raise ConfigError(f"noise space is {space!r}; {did_you_mean(space, (*PICTURES, *SOUNDS))}")


def titled(space: str, size: float) -> str:
    """`sigma 0.2 pixel`, `snr 30 dB`."""
    return f"snr {size:g} dB" if space == "snr" else f"sigma {size:g} {space}"
