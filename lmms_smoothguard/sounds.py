"""Sound clips: read from files and from cells of data sets, mixed down, resampled, written as 16-bit PCM WAV."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmms_smoothguard.errors import ConfigError

PCM = 32768
"""Steps of 16-bit PCM from 0 to full scale."""
LOUDEST = 1.5
"""Samples of full scale 1 do not exceed it, but for what resampling adds. Models hear hardly how loud a clip is, and noise of a set
amplitude vanishes beside a clip that is blown up: at 14 times full scale the defence lost what it held at 1."""
LONGEST = 600.0
"""Seconds of the longest clip that is read unless told otherwise."""
_MOST_RATE = 192_000
"""Hz; the highest that recorders write. FLAC can name more than three times that."""
_MOST_A_SECOND = 2 * 48_000
"""Samples that the longest clip may hold for each of its seconds: stereo, as films have it. Silence of many channels at a high rate
takes next to nothing as FLAC, and gigabytes once it is decoded."""


class Clip(NamedTuple):
    """samples: (frames, channels), float32 in [-1, 1]; rate: in Hz; notes: as a `Sound`'s."""

    samples: np.ndarray
    rate: int
    notes: tuple[str, ...] = ()

    @property
    def wav(self) -> bytes:
        """The clip as 16-bit PCM WAV."""
        written = io.BytesIO()
        soundfile().write(written, self.samples, self.rate, format="WAV", subtype="PCM_16")
        return written.getvalue()

    def mono(self) -> Sound:
        """The mean of its channels."""
        notes = (*self.notes, *_mixed(self.samples.shape[1]))
        return Sound(self.samples.mean(1, dtype=np.float32), self.rate, notes)


class Sound(NamedTuple):
    """One channel, as models hear it. samples: (n,) float32, full scale 1; rate: in Hz; notes: what it is no longer as it was
    stored, in words for a user."""

    samples: np.ndarray
    rate: int
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate

    @property
    def pcm(self) -> np.ndarray:
        """(n,) int16: the nearest 16-bit steps, clipped at full scale."""
        return np.clip(np.rint(self.samples * np.float32(PCM)), -PCM, PCM - 1).astype(np.int16)

    @property
    def wav(self) -> bytes:
        """The sound as 16-bit PCM WAV."""
        written = io.BytesIO()
        soundfile().write(written, self.pcm, self.rate, format="WAV", subtype="PCM_16")
        return written.getvalue()

    def at(self, rate: int) -> Sound:
        """The same sound at another sampling rate (polyphase filtering, as scipy does it), itself where it has that one."""
        if rate == self.rate:
            return self
        from scipy.signal import resample_poly

        common = math.gcd(rate, self.rate)
        made = resample_poly(self.samples, rate // common, self.rate // common)
        return Sound(np.asarray(made, np.float32), rate, (*self.notes, f"resampled from {self.rate} to {rate} Hz"))

    @classmethod
    def from_pcm(cls, pcm: np.ndarray, rate: int) -> Sound:
        """Of int16 samples; exactly, for float32 holds every one of their values."""
        return cls(pcm.astype(np.float32) / PCM, rate)


def soundfile() -> Any:
    """The library. Raises ConfigError with the install command where it is missing."""
    try:
        import soundfile as found
    except ImportError as error:
        raise ConfigError("sound needs soundfile; pip install 'lmms-smoothguard[audio]'") from error
    return found


def read_clip(data: bytes, longest: float = LONGEST) -> Clip:
    """Decodes WAV, FLAC, OGG or MP3 of at most `longest` seconds and 192 kHz, with no more samples than so many seconds of stereo at
    48 kHz have. What its header says is seen before it is decoded.

    Raises ConfigError for anything else, a clip that is empty, cut off or too long, and samples that are not finite or beyond
    `LOUDEST`; up to that they are clipped to full scale, which a note says.
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
    _check_whole(data)
    if problem := beyond_full_scale(samples):
        raise ConfigError(f"a sound {problem}")
    notes = ("clipped to full scale",) if np.abs(samples).max() > 1 else ()
    return Clip(np.clip(samples, -1, 1), rate, notes)


def beyond_full_scale(samples: np.ndarray) -> str:
    """What is wrong with finite samples, at least one, that exceed `LOUDEST`; empty where none does."""
    largest = float(np.abs(samples).max())
    if largest <= LOUDEST:
        return ""
    return (
        f"reaches {largest:.5g}; expected samples of full scale 1, beside which noise has its size, and peaks of at most {LOUDEST:g}, as "
        f"resampling and files of floats overshoot. Divide 16-bit samples by {PCM}, and a louder recording by its peak"
    )


def sound_of(value: Any, base: Path | None = None, longest: float = LONGEST) -> Sound:
    """The sound that a cell of a data set holds: bytes, a path (from `base`, where it is relative), both as `datasets` keeps them,
    `array` and `sampling_rate`, or torchcodec's decoder. Several channels are mixed down.

    Raises ConfigError or OSError where there is none that can be read, ConfigError for samples beyond `LOUDEST`.
    """
    if isinstance(value, Sound):
        return value
    if hasattr(value, "get_all_samples"):
        decoded = value.get_all_samples()
        return _checked(np.asarray(decoded.data), int(decoded.sample_rate), longest)
    if isinstance(value, Mapping) and "array" in value:
        return _checked(np.asarray(value["array"]), int(value.get("sampling_rate") or 0), longest)
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        if "://" in value:
            raise ConfigError(f"{value} is an address; expected a file here")
        value = (Path(value) if base is None else base / value).read_bytes()
    if not isinstance(value, bytes):
        raise ConfigError("no sound" if not value else f"{value!r:.60} is no sound")
    return read_clip(value, longest).mono()


def _checked(samples: np.ndarray, rate: int, longest: float) -> Sound:
    """Decoded samples, (n,) or (channels, n)."""
    if rate <= 0:
        raise ConfigError("a sound has no sampling_rate; expected one in Hz beside its array")
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / PCM
    notes: tuple[str, ...] = ()
    if samples.ndim == 2:
        notes = _mixed(min(samples.shape))
        samples = samples.mean(0 if samples.shape[0] <= samples.shape[1] else 1)
    if samples.ndim != 1 or not len(samples) or not np.issubdtype(samples.dtype, np.floating):
        raise ConfigError(
            f"a sound is {samples.dtype} of shape {samples.shape}; expected samples of one or two channels"
        )
    if len(samples) > longest * rate:
        raise ConfigError(f"a sound is longer than {longest:g} seconds; expected at most that")
    if not np.isfinite(samples).all():
        raise ConfigError("a sound has samples that are NaN or infinite; expected finite ones")
    if problem := beyond_full_scale(samples):
        raise ConfigError(f"a sound {problem}")
    return Sound(np.asarray(samples, np.float32), rate, notes)


def _mixed(channels: int) -> tuple[str, ...]:
    return () if channels == 1 else (f"{channels} channels mixed down to their mean",)


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


def _check_whole(data: bytes) -> None:
    """libsndfile reads what there is of a WAV that was cut off, without a word. Sizes that streams leave open are let through."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name == b"data":
            missing = place + 8 + size - len(data)
            if missing > 0 and size not in (0x7FFFFFFF, 0xFFFFFFFF) and size < 0x7FFFF000:
                raise ConfigError(
                    f"a sound is cut off: {missing} of its {size} bytes are missing; expected the whole file"
                )
            return
        place += 8 + size + size % 2
