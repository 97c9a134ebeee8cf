"""Noisy copies of sound clips: decoded, noised in the waveform, written as 16-bit WAV."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.noise import fresh_seed

_MOST_RATE = 192_000
"""Hz; the highest that recorders write. FLAC can name more than three times that."""
_MOST_A_SECOND = 2 * 48_000
"""Samples that the longest clip may hold for each of its seconds: stereo, as films have it. Silence of many channels at a high rate
takes next to nothing as FLAC, and gigabytes once it is decoded."""


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
    """Decodes WAV, FLAC, OGG or MP3 of at most `longest` seconds and 192 kHz, with no more samples than so many seconds of stereo at
    48 kHz have. What its header says is seen before it is decoded.

    Raises ConfigError for anything else, a clip that is empty or too long, and samples that are not finite.
    """
    library = soundfile()
    try:
        with library.SoundFile(io.BytesIO(data)) as file:
            rate, channels = int(file.samplerate), int(file.channels)
            if rate > _MOST_RATE:
                raise ConfigError(f"a sound has a rate of {rate} Hz; expected at most {_MOST_RATE}. Resample it")
            if _says_its_length(file):
                _check_length(file.frames, channels, rate, longest)
            most = int(longest * min(rate, _MOST_A_SECOND / channels))
            samples = file.read(most + 1, dtype="float32", always_2d=True)
    except ConfigError:
        raise
    except (library.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"a sound cannot be read ({error}); expected WAV, FLAC, OGG or MP3") from error
    _check_length(len(samples), channels, rate, longest)
    if not len(samples):
        raise ConfigError("a sound has no samples; expected at least one")
    if not np.isfinite(samples).all():
        raise ConfigError("a sound has samples that are NaN or infinite; expected finite ones")
    return Clip(np.clip(samples, -1, 1), rate)


def _says_its_length(file: Any) -> bool:
    """An MP3's length is guessed from the bit rate of its first frame, and a stream's is the largest there is."""
    return bool(file.format != "MP3" and file.frames < 2**63 - 1)


def _check_length(frames: int, channels: int, rate: int, longest: float) -> None:
    if frames > longest * rate:
        raise ConfigError(f"a sound is longer than {longest:g} seconds; expected at most that")
    if frames * channels > longest * _MOST_A_SECOND:
        raise ConfigError(
            f"a sound has {frames} samples in each of {channels} channels; expected at most {longest * _MOST_A_SECOND:.0f} "
            f"in all, as {longest:g} seconds of stereo at 48000 Hz have. Resample it, or mix its channels down"
        )


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
