"""The media of a batch of requests: their clean slots, the way from there to the model, and how results are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard.attacks.media import Slots
from lmms_smoothguard.attacks.rendering import PIXELS, Renderer, Rendering, warn_of
from lmms_smoothguard.attacks.sound_clips import decibels_apart, in_16_bits, sound_of_row, sound_slots
from lmms_smoothguard.attacks.sound_rendering import FEATURES, SoundRenderer, warn_of_rounding
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.sounds import Sound


class Stored(NamedTuple):
    """One row's result as files hold it, and what its record says of it beyond distances."""

    images: tuple[np.ndarray, ...]
    sounds: tuple[Sound, ...]
    record: dict[str, Any]


class Batch(NamedTuple):
    """clean: the slots that the search and its budget start from; renderer: to the model's inputs, checked; gaps: how far each
    row is from what the ordinary path gave; stored: (adversarial slots, row) -> what is kept."""

    clean: Slots
    renderer: Rendering
    gaps: list[float]
    stored: Callable[[Slots, int], Stored]

    def prompts(self, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """The tensors of each row's inputs that do not come from what is attacked."""
        rendered = set(self.renderer(tuple(slot[:1] for slot in self.clean)))
        return [{k: v for k, v in row.items() if isinstance(v, torch.Tensor) and k not in rendered} for row in inputs]


def picture_batch(
    rows: Sequence[Sequence[Image.Image]], inputs: Sequence[Mapping[str, Any]], processor: Any, device: torch.device
) -> Batch:
    """rows: the clean pictures of each request, of equal sizes slot by slot; inputs: what the ordinary path gave. Raises
    AttackError where that is not what the renderer gives."""
    clean = slots_of(rows, device)
    renderer = Renderer(processor, device, inputs[0][PIXELS].dtype)
    with torch.no_grad():
        gaps = renderer.check(clean, _captured(inputs, PIXELS), PIXELS)
    warn_of(gaps)

    def stored(adversarial: Slots, row: int) -> Stored:
        images = [(slot[row] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy() for slot in adversarial]
        return Stored(tuple(images), (), {})

    return Batch(clean, renderer, gaps, stored)


def sound_batch(
    rows: Sequence[Sequence[Sound]], inputs: Sequence[Mapping[str, Any]], processor: Any, device: torch.device
) -> Batch:
    """The same of sounds, of equal lengths slot by slot: what is attacked is their nearest 16-bit PCM."""
    exact, rate = sound_slots(rows, device), rows[0][0].rate
    renderer = SoundRenderer(processor, device, inputs[0][FEATURES].dtype)
    if others := {sound.rate for row in rows for sound in row} - {renderer.rate}:
        raise AttackError(
            f"a sound has a rate of {min(others)} Hz, and the model hears {renderer.rate} Hz; expected what its processor was given"
        )
    clean, captured = in_16_bits(exact), _captured(inputs, FEATURES)
    with torch.no_grad():
        renderer.check(exact, captured, FEATURES)
        gaps = renderer.gaps(clean, captured)
    warn_of_rounding(gaps)

    def stored(adversarial: Slots, row: int) -> Stored:
        apart = decibels_apart(tuple(s[row : row + 1] for s in adversarial), tuple(s[row : row + 1] for s in clean))
        sounds = tuple(sound_of_row(slot[row], rate) for slot in adversarial)
        return Stored((), sounds, {"rate": rate, "snr_db": apart[0]})

    return Batch(clean, renderer, gaps, stored)


def _captured(inputs: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {**inputs[0], key: torch.cat([row[key] for row in inputs])}


def slots_of(rows: Sequence[Sequence[Image.Image]], device: torch.device) -> Slots:
    """Clean pictures as float slots (batch, 3, height, width)."""
    arrays = [[np.asarray(image.convert("RGB"), np.float32) / 255 for image in row] for row in rows]
    return tuple(
        torch.from_numpy(np.stack([row[slot] for row in arrays])).permute(0, 3, 1, 2).contiguous().to(device)
        for slot in range(len(arrays[0]))
    )
