"""Spoken digits from eSpeak NG, which a package brings as a library: many voices, speeds and pitches, the same bytes every time."""

from __future__ import annotations

import ctypes
import importlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lmms_smoothguard.errors import SmoothGuardError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_ACCENTS = ("en-us", "en", "en-gb-scotland", "en-029")
_TIMBRES = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4")
_TEST_TIMBRES = ("m6", "f3")  # never heard in training
_SPEEDS, _PITCHES = (170, 210, 250), (35, 50, 65)  # words a minute; eSpeak's scale from 0 to 99
_SYNCHRONOUS, _RATE, _PITCH, _BY_CHARACTER, _UTF8 = 2, 1, 3, 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class _Speaker:
    """eSpeak NG, started once. Raises SmoothGuardError where it is missing."""

    def __init__(self) -> None:
        try:
            package = importlib.import_module("espeakng_loader")
        except ImportError as error:
            raise SmoothGuardError(
                "training on spoken digits needs eSpeak NG; pip install 'lmms-smoothguard[speech]'"
            ) from error
        self._library = ctypes.CDLL(package.get_library_path())
        data = str(Path(package.get_data_path()).parent).encode()
        self.rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
        if self.rate <= 0:
            raise SmoothGuardError(f"eSpeak NG does not start with its data in {package.get_data_path()}")
        self._heard: list[np.ndarray] = []
        self._callback = _CALLBACK(self._hear)  # kept, for the library has but its address
        self._library.espeak_SetSynthCallback(self._callback)

    def _hear(self, samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
        """int16 samples at `rate`, without the silence around them."""
        self._heard.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise SmoothGuardError(f"eSpeak NG has no voice {voice!r}")
        self._library.espeak_SetParameter(_RATE, speed, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # or its flutter is another one in every process
        text = word.encode()
        self._library.espeak_Synth(text, len(text) + 1, 0, _BY_CHARACTER, 0, _UTF8, None, None)
        said = np.concatenate(self._heard)
        loud = np.flatnonzero(np.abs(said.astype(np.int32)) > 0.01 * np.abs(said.astype(np.int32)).max())
        return said[loud[0] : loud[-1] + 1]


def spoken_digits(rate: int, longest: int, *, test: bool) -> list[list[np.ndarray]]:
    """For every digit its renderings: float32 with a root mean square of 1, at most `longest` samples at `rate`.

    `test`: by the voices that training never hears. They are spoken in a process of their own, for what eSpeak NG says hangs on all that
    it said before in the same one. Raises SmoothGuardError where it is missing.
    """
    from scipy.signal import resample_poly

    command = [sys.executable, "-m", "lmms_smoothguard.tiny.sounds.speech", "test" if test else "training"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        raise SmoothGuardError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    said = np.load(io.BytesIO(done.stdout), allow_pickle=False)
    found: list[list[np.ndarray]] = [[] for _ in DIGITS]
    for name in said.files[1:]:
        sound = resample_poly(said[name].astype(np.float32), rate, int(said["rate"]))
        if len(sound) <= longest:
            found[int(name.partition(" ")[0])].append((sound / np.sqrt(np.mean(sound**2))).astype(np.float32))
    return found


def _speak(voices: str) -> dict[str, np.ndarray]:
    """All renderings, named by digit and number, behind their sampling rate."""
    speaker = _Speaker()
    timbres = _TEST_TIMBRES if voices == "test" else tuple(t for t in _TIMBRES if t not in _TEST_TIMBRES)
    spoken: dict[str, np.ndarray] = {"rate": np.array(speaker.rate)}
    for place, digit in enumerate(DIGITS):
        for voice in (f"{accent}+{timbre}" for accent in _ACCENTS for timbre in timbres):
            for speed, pitch in zip(_SPEEDS, _PITCHES, strict=True):
                spoken[f"{place} {len(spoken)}"] = speaker.say(digit, voice, speed, pitch)
    return spoken


if __name__ == "__main__":
    try:
        written = io.BytesIO()
        np.savez(written, **_speak(sys.argv[1]))  # type: ignore[arg-type]
        sys.stdout.buffer.write(written.getvalue())
    except SmoothGuardError as error:
        sys.exit(str(error))
