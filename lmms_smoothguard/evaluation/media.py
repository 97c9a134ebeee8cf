"""The pictures and sounds of questions, read once before anything is asked: their digests, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.sounds import LONGEST, Sound

if TYPE_CHECKING:
    from lmms_smoothguard.evaluation.questions import Words

log = logging.getLogger(__name__)

_SHOWN = 10
_FULL_SCALE = 1 - 1.5 / 32768  # both ends of 16-bit PCM
_CLIPPED = 0.001
"""Share of its samples at full scale from which a sound is said to look clipped."""


class Checked(NamedTuple):
    """digests: one a question, of its words, pixels and samples; heard: the ids of those with sounds."""

    digests: tuple[str, ...]
    heard: tuple[str, ...]


def checked(
    words: Sequence[Words],
    images: Callable[[int], Sequence[Image.Image]],
    sounds: Callable[[int], Sequence[Sound]] | None,
    source: str,
) -> Checked:
    """What all questions' pictures and sounds are; sounds: None where no question has any.

    Raises ConfigError that names every question whose pictures or sounds are missing or cannot be read. Warns of sounds that
    look clipped: nothing tells them from loud ones, so they are read.
    """
    digests, with_sounds, broken, clipped = [], [], [], []
    for number, asked in enumerate(words):
        hasher = hashlib.sha256(json.dumps(asked if asked.accepted else asked[:-1]).encode())
        try:
            seen, heard = images(number), () if sounds is None else sounds(number)
            if not seen and not heard:
                raise ValueError("no picture" if sounds is None else "neither picture nor sound")
            for image in seen:
                hasher.update(repr(image.size).encode() + np.asarray(image).tobytes())
            for sound in heard:  # float32 holds 16-bit samples exactly, so a WAV and its FLAC have one digest
                hasher.update(repr((sound.rate, len(sound.samples))).encode() + sound.samples.tobytes())
            if heard:
                with_sounds.append(asked.id)
            if any(_looks_clipped(sound) for sound in heard):
                clipped.append(asked.id)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            broken.append(f"{asked.id} ({error or type(error).__name__})")
        digests.append(hasher.hexdigest())
    if broken:
        kinds = "pictures" if sounds is None else "pictures or sounds"
        heard_too = "" if sounds is None else f" or a whole sound of at most {LONGEST:g} seconds"
        raise ConfigError(
            f"{source} has {len(broken)} {kinds} that cannot be read: {some(broken)}; expected a whole 8-bit picture{heard_too} for each "
            "question. Mend or remove them"
        )
    if clipped:
        log.warning(
            "%s has %d questions with sounds that look clipped, at full scale for more than %g of their samples: %s",
            source, len(clipped), _CLIPPED, some(clipped),
        )  # fmt: skip
    return Checked(tuple(digests), tuple(with_sounds))


def some(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _looks_clipped(sound: Sound) -> bool:
    return bool(np.mean(np.abs(sound.samples) >= _FULL_SCALE) > _CLIPPED)
