"""Sounds as attacks search them: slots of samples, what is said of a changed one, and the changed ones as they are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lmms_smoothguard.attacks.media import SOUNDS, Slots
from lmms_smoothguard.attacks.pictures import changes
from lmms_smoothguard.sounds import Sound


def sound_slots(rows: Sequence[Sequence[Sound]], device: torch.device) -> Slots:
    """Clips as float slots (batch, samples), as they are; all of a slot have one length."""
    return tuple(
        torch.from_numpy(np.stack([np.asarray(row[slot].samples, np.float32) for row in rows])).to(device)
        for slot in range(len(rows[0]))
    )


def in_16_bits(slots: Slots) -> Slots:
    """The nearest samples that a WAV file holds."""
    medium = SOUNDS
    return tuple((slot * medium.steps).round().clamp(medium.least, medium.most) / medium.steps for slot in slots)


def sound_of_row(samples: torch.Tensor, rate: int) -> Sound:
    """(samples,) in whole steps as a sound; exactly."""
    return Sound.from_pcm((samples * SOUNDS.steps).round().to(torch.int16).cpu().numpy(), rate)


TOO_FAINT = "sounds too faint for the attack's snr"
"""Why a sample of an attacked run is left as it is, and out of every rate under attack."""


def too_faint(sounds: Sequence[Sound], snr: float | None) -> bool:
    """Whether nothing of a request's sounds can be changed: a change by one step of 16 bits is nearer than `snr` decibels to each,
    as any is to silence. Never without `snr`, nor without sounds."""
    if snr is None or not sounds:
        return False
    return all(np.linalg.norm(sound.pcm.astype(np.float64)) * 10 ** (-snr / 20) < 1 for sound in sounds)


def decibels_apart(adversarial: Slots, clean: Slots) -> list[list[float | None]]:
    """For each request, and each of its clips, the power of the clean clip over that of its change, in dB; None where one of them
    has none."""
    deltas = changes(adversarial, clean)
    return [
        [_ratio(slot[row], delta[row]) for slot, delta in zip(clean, deltas, strict=True)]
        for row in range(len(clean[0]))
    ]


def _ratio(clip: torch.Tensor, change: torch.Tensor) -> float | None:
    signal, noise = (float(part.double().square().sum()) for part in (clip, change))
    return 10 * math.log10(signal / noise) if signal and noise else None
