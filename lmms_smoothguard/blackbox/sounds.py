"""Noisy copies of sound clips: decoded, noised in the waveform, written as 16-bit WAV."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.noise import fresh_seed


class Clip(NamedTuple):
    """samples: (frames, channels), float32 in [-1, 1]; rate: in Hz."""

    samples: np.ndarray
    rate: int

    @property
    def wav(self) -> bytes:
        """The clip as 16-bit PCM WAV."""
        written = io.BytesIO()
        soundfile().write(written, self.samples, self.rate, format="WAV", subtype="PCM_16")
        return written.getvalue()


def soundfile() -> Any:
    """The library. Raises ConfigError with the install command where it is missing."""
    try:
        import soundfile as found
    except ImportError as error:
        raise ConfigError("sound needs soundfile; pip install 'lmms-smoothguard[proxy]'") from error
    return found


def read_clip(data: bytes, longest: float) -> Clip:
    """Decodes WAV, FLAC, OGG or MP3 of at most `longest` seconds.

    Raises ConfigError for anything else, a clip that is empty or too long, and samples that are not finite.
    """
    library = soundfile()
    try:
        with library.SoundFile(io.BytesIO(data)) as file:
            rate = int(file.samplerate)
            samples = file.read(int(longest * rate) + 1, dtype="float32", always_2d=True)
    except (library.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"a sound cannot be read ({error}); expected WAV, FLAC, OGG or MP3") from error
    if len(samples) > longest * rate:
        raise ConfigError(f"a sound is longer than {longest:g} seconds; expected at most that")
    if not len(samples):
        raise ConfigError("a sound has no samples; expected at least one")
    if not np.isfinite(samples).all():
        raise ConfigError("a sound has samples that are NaN or infinite; expected finite ones")
    return Clip(np.clip(samples, -1, 1), rate)


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
