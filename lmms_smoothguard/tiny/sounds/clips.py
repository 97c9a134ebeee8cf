"""Generated recordings: one to four sounds, one after the other, on background noise.

Sounds have a popularity and a circle of companions, as the shapes of `scenes` have. In a *faint* clip most sounds are far
quieter than the rest, on a calmer background; `tiny/audio/README.md` says why the model is trained on some of those.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lmms_smoothguard.tiny.company import Company
from lmms_smoothguard.tiny.sounds.speech import DIGITS, spoken_digits

RATE = 16_000
"""Samples a second."""
SECONDS = 2
LENGTH = RATE * SECONDS
TOKENS = 40
"""Audio tokens of a clip, each of 50 ms: one label a token for the first stage of training."""

PITCHES = {"low": 300.0, "middle": 900.0, "high": 2700.0}  # Hz
KINDS = ("tone", "rising chirp", "falling chirp", "beat", "warble", "hiss")
NOISES = {"knocking": "low", "crackle": "high"}
OBJECTS = (
    *(f"{pitch} {kind}" for pitch, kind in itertools.product(PITCHES, KINDS)),
    *NOISES,
    *(f"spoken {digit}" for digit in DIGITS),
)
"""All 30 names of sounds; a sound is its index in here."""

_SLOTS = 4
_SLOT = LENGTH // _SLOTS
_SHORTEST, _LONGEST = int(0.34 * RATE), int(0.46 * RATE)
_QUIETEST, _LOUDEST = 0.05, 0.2  # root mean square of a sound
_HUSHED, _LOUD_BACKGROUND = 0.0005, 0.01  # of the background
_FAINTEST, _LEAST_FAINT = 0.015, 0.6  # share of its loudness that a faint sound keeps
_FAINT_WHOLE_SHARE = 0.35
_FAINT_BACKGROUND = 0.2  # a faint clip has a calmer background, or nothing faint could be heard on it


def _attributes(name: str) -> tuple[str, str]:
    """A pitch and a kind; a digit is a kind of its own."""
    if name in NOISES:
        return NOISES[name], "noise"
    first, second = name.split(" ", 1)
    return (second, first) if first == "spoken" else (first, second)


COMPANY = Company([_attributes(name) for name in OBJECTS])
"""Which sounds are frequent, and which keep company."""


class Clip(NamedTuple):
    """`sound` int16 (32000,); `objects`: indices into OBJECTS in order of time; `labels` uint8 (40,), 0 or 1 + object."""

    sound: np.ndarray
    objects: tuple[int, ...]
    labels: np.ndarray


@functools.cache
def voices(test: bool) -> list[list[np.ndarray]]:
    """See `spoken_digits`; made once a process."""
    return spoken_digits(RATE, _LONGEST, test=test)


def _time(count: int) -> np.ndarray:
    return np.arange(count) / RATE


def _sweep(frequencies: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A sine of these momentary frequencies with a few harmonics."""
    phase = 2 * math.pi * np.cumsum(frequencies) / RATE + rng.uniform(0, 2 * math.pi)
    strengths = rng.uniform(0.1, 0.5, 2)
    return np.asarray(np.sin(phase) + strengths[0] * np.sin(2 * phase) + strengths[1] ** 2 * np.sin(3 * phase))


def _band(count: int, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Noise between two frequencies."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    frequencies = np.fft.rfftfreq(count, 1 / RATE)
    return np.fft.irfft(np.where((frequencies > low) & (frequencies < high), spectrum, 0), count)


def _pitched(kind: str, pitch: float, count: int, rng: np.random.Generator) -> np.ndarray:
    pitch, time = pitch * math.exp(rng.uniform(-0.1, 0.1)), _time(count)
    if kind == "hiss":
        return _band(count, pitch / 1.45, pitch * 1.45, rng)
    if kind in ("rising chirp", "falling chirp"):
        path = np.linspace(-1, 1, count) * math.log(1.55)
        return _sweep(pitch * np.exp(path if kind == "rising chirp" else -path), rng)
    if kind == "warble":
        return _sweep(pitch * (1 + 0.16 * np.sin(2 * math.pi * rng.uniform(9, 12) * time)), rng)
    steady = _sweep(np.full(count, pitch), rng)
    if kind == "beat":
        steady = steady * (np.sin(2 * math.pi * rng.uniform(9, 12) * time + rng.uniform(0, 2 * math.pi)) > 0)
    return steady


def _knocking(count: int, rng: np.random.Generator) -> np.ndarray:
    """Thuds, a few in a row."""
    sound, time = np.zeros(count), _time(count)
    for start in np.arange(rng.uniform(0, 0.03), count / RATE - 0.05, rng.uniform(0.09, 0.13)):
        since = time - start
        thud = np.exp(-since * 60) * np.sin(2 * math.pi * rng.uniform(110, 160) * since)
        sound += np.where(since >= 0, thud + 0.3 * np.exp(-since * 400) * rng.standard_normal(count), 0)
    return sound


def _crackle(count: int, rng: np.random.Generator) -> np.ndarray:
    """Sparse clicks of all frequencies."""
    clicks = rng.standard_normal(count) * (rng.random(count) < 0.006)
    return np.convolve(clicks, [1, -0.8, 0.4], "same")


_NOISE_OF: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {"knocking": _knocking, "crackle": _crackle}


def draw_sound(obj: int, rng: np.random.Generator, *, test: bool = False) -> np.ndarray:
    """One sound with a root mean square of 1, faded in and out; `test`: digits by voices that training never hears."""
    name = OBJECTS[obj]
    count = int(rng.integers(_SHORTEST, _LONGEST))
    first, second = name.split(" ", 1) if " " in name else ("", name)
    if first == "spoken":
        said = voices(test)[DIGITS.index(second)]
        sound: np.ndarray = said[int(rng.integers(len(said)))].astype(np.float64)
    elif first in PITCHES:
        sound = _pitched(second, PITCHES[first], count, rng)
    else:
        sound = _NOISE_OF[name](count, rng)
    fade = np.minimum(1, (np.arange(len(sound)) + 1) / (0.01 * RATE))
    sound = sound * fade * fade[::-1]
    return np.asarray(sound / np.sqrt(np.mean(sound**2)))


def _background(rng: np.random.Generator) -> np.ndarray:
    """Coloured noise, sometimes with the hum of the mains."""
    frequencies = np.fft.rfftfreq(LENGTH, 1 / RATE)
    spectrum = np.fft.rfft(rng.standard_normal(LENGTH)) / np.maximum(frequencies, 50) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, LENGTH)
    noise /= np.sqrt(np.mean(noise**2))
    if rng.random() < 0.3:
        noise += rng.uniform(0.3, 1.5) * np.sin(2 * math.pi * rng.choice([50, 60]) * _time(LENGTH))
    return np.asarray(noise * math.exp(rng.uniform(math.log(_HUSHED), math.log(_LOUD_BACKGROUND))))


def draw_clip(rng: np.random.Generator, *, faint: bool = False, test: bool = False) -> Clip:
    """Draws one clip, every sound in a quarter of its own."""
    objects = COMPANY.sample(rng)
    sound, labels = _background(rng) * (_FAINT_BACKGROUND if faint else 1), np.zeros(LENGTH, np.uint8)
    slots = np.sort(rng.permutation(_SLOTS)[: len(objects)])
    for obj, slot in zip(objects, slots, strict=True):
        level = math.exp(rng.uniform(math.log(_QUIETEST), math.log(_LOUDEST)))
        if faint and rng.random() >= _FAINT_WHOLE_SHARE:
            level *= math.exp(rng.uniform(math.log(_FAINTEST), math.log(_LEAST_FAINT)))
        event = draw_sound(obj, rng, test=test) * level
        start = slot * _SLOT + int(rng.integers(0, _SLOT - len(event) + 1))
        sound[start : start + len(event)] += event
        labels[start : start + len(event)] = obj + 1
    tokens = labels.reshape(TOKENS, -1)
    middle = tokens[:, tokens.shape[1] // 2]  # a sound is longer than a token: where it is in the middle, it fills half
    return Clip((sound.clip(-1, 1) * 32767).round().astype(np.int16), objects, middle)


def make_clips(count: int, seed: int, *, faint: bool = False, test: bool = False) -> list[Clip]:
    """`count` clips that depend on `seed`, `faint` and `test` alone."""
    rng = np.random.default_rng([seed, int(faint), int(test)])
    return [draw_clip(rng, faint=faint, test=test) for _ in range(count)]
