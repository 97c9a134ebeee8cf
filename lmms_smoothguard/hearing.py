"""What a processor does with sounds: what stands for a sound in a prompt, and what it drops in silence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hf_integration.protecting import extractor_of
from lmms_smoothguard.sounds import Sound


def audio_token(processor: Any) -> str:
    """What stands for a sound in a plain prompt; empty where there is nothing."""
    token = str(getattr(processor, "audio_token", None) or "")
    begin, end = (getattr(processor, f"audio_{side}_token", None) or "" for side in ("bos", "eos"))
    return f"{begin}{token}{end}" if token else ""


def heard_seconds(processor: Any) -> float | None:
    """The longest sound that a processor says it takes: of several windows where it cuts sounds into them, else of its
    extractor's only one; None where it does not say."""
    extractor = extractor_of(processor)
    longest = getattr(processor, "max_audio_len", None)
    window = getattr(extractor, "n_samples", None)
    if longest is None and window is not None:
        longest = window / extractor.sampling_rate
    return None if longest is None else float(longest)


def drops_the_end(processor: Any, sound: Sound, make: Callable[[Sound], Mapping[str, Any]]) -> bool:
    """Whether the model would not hear how a sound ends; `make`: its inputs for a sound that stands in for this one.

    Whisper's extractor cuts a sound off at its window's end without a word, and some processors cut it into windows first, or
    cut it off later. No attribute tells which, so the sound is processed once more with another end: where it may be too long.
    """
    count, window = len(sound.samples), int(getattr(extractor_of(processor), "n_samples", 0))
    if count <= window:
        return False
    bounds = [window, int((heard_seconds(processor) or 0) * sound.rate)]
    size = min([count, max(1, sound.rate // 10), *(count - bound for bound in bounds if bound < count)])
    other = sound.samples.copy()
    other[count - size :] = np.random.default_rng(0).normal(0, 0.1, size)
    return _same(make(sound), make(Sound(other, sound.rate)))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    tensors = {key: value for key, value in one.items() if isinstance(value, torch.Tensor)}
    return all(
        tensors[key].shape == other[key].shape and torch.equal(tensors[key], other[key]) for key in tensors
    )  # a mask, or more tokens, will do
