"""Sounds too short for a model to hear anything of them, found by protected processors that tell how many tokens each sound has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from lmms_smoothguard.errors import UndefendableError

PROCESSING = "_process_audio"
"""By what transformers' processors make features of all sounds, and of each the text that takes its place in the prompt."""
_FEWEST = {"Qwen2AudioProcessor": 2}
"""Tokens of a request's longest sound where one is too few: Qwen2-Audio takes a prompt without two in a row for one that was never
expanded, and fails."""
_LONGEST = 2**18
"""Samples; what gives no token then does so for another reason."""
_FAILURES = (IndexError, RuntimeError, TypeError, ValueError)


def noting_short_sounds(original: Callable[..., Any], note: Callable[[str], None]) -> Callable[..., Any]:
    """A processor's `_process_audio` that notes a sound without a token in the prompt: most models would answer as if it were not
    there, and some fail. What the processor itself fails on is raised, as UndefendableError."""

    @functools.wraps(original)
    def process(self: Any, audio: Any, *args: Any, **kwargs: Any) -> Any:
        fewest = _FEWEST.get(type(self).__name__, 1)

        def least() -> int | None:
            """Samples of the shortest sound that is long enough."""

            def suffices(count: int) -> bool:
                try:
                    made = original(self, [np.zeros(count, np.float32)], *args, **kwargs)
                except _FAILURES:
                    return False
                return _tokens(self, made) >= [fewest]

            return _shortest(suffices)

        try:
            made = original(self, audio, *args, **kwargs)
        except UndefendableError:
            raise
        except _FAILURES as error:  # of their own code, of sounds without a single frame
            needed = least()
            for number, sound in enumerate(audio if needed else (), 1):
                if np.ndim(sound) == 1 and len(sound) < (needed or 0):
                    raise UndefendableError(_too_short(self, number, sound, 0, needed)) from error
            raise
        counts = _tokens(self, made)
        for number, (sound, count) in enumerate(zip(audio, counts, strict=False), 1):
            if not count or max(counts) < fewest:
                note(_too_short(self, number, sound, count, least()))
                break
        return made

    return process


def _tokens(processor: Any, made: Any) -> list[int]:
    """How many tokens stand for each sound; empty where that is not told."""
    token = getattr(processor, "audio_token", None)
    texts = made[1] if isinstance(made, tuple) and len(made) == 2 else None
    told = token and isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return [text.count(token) for text in texts or ()] if told else []


def _shortest(suffices: Callable[[int], bool]) -> int | None:
    """The least number that does, of those up to `_LONGEST`; what is above one that does, does too."""
    high = 1
    while not suffices(high):
        high *= 2
        if high > _LONGEST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def _too_short(processor: Any, number: int, sound: Any, count: int, needed: int | None) -> str:
    extractor: Any = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
    rate = extractor.sampling_rate
    tokens = f"{count or 'no'} audio token{'s' if count > 1 else ''}"
    expected = "a longer one" if needed is None else f"at least {needed} ({needed / rate:g} seconds)"
    return (
        f"sound {number} has {len(sound)} samples ({len(sound) / rate:g} seconds), of which {type(processor).__name__} makes {tokens}, too "
        f"little for its model to hear; expected {expected}. Put silence behind it, or leave it out"
    )
