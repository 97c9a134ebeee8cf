"""What is attacked: pictures in the grey levels of 8 bits, or sounds in the steps of 16-bit PCM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmms_smoothguard.sounds import PCM

Slots = tuple[torch.Tensor, ...]
"""One tensor for each slot of the prompt: pictures (batch, channels, height, width) in [0, 1], or sounds (batch, samples) in
[-1, 32767/32768]. All slots are of one medium."""


@dataclass(frozen=True)
class Medium:
    """A medium as its files hold it.

    name: of several; values: what they are made of; unit: one step of these; file: what holds them; steps: how many there are
    from 0 to 1; least, most: the range, in steps; dims: of one slot's tensor, the batch among them.
    """

    name: str
    values: str
    unit: str
    file: str
    steps: int
    least: int
    most: int
    dims: int

    @property
    def low(self) -> float:
        """The smallest value."""
        return self.least / self.steps

    @property
    def high(self) -> float:
        """The largest value."""
        return self.most / self.steps

    @property
    def shortest(self) -> float:
        """What a gradient step is long at least: half a step of the medium, or rounding undoes it."""
        return 0.5 / self.steps


PICTURES = Medium("pictures", "pixels", "grey level", "8-bit image", 255, 0, 255, 4)
SOUNDS = Medium("sounds", "samples", "step of 16-bit PCM", "WAV file", PCM, -PCM, PCM - 1, 2)


def medium_of(slots: Slots) -> Medium:
    """The medium of slots, told by their dimensions."""
    return SOUNDS if slots and slots[0].ndim == SOUNDS.dims else PICTURES


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(batch,) as (batch, 1, ...), with as many dimensions as `like`."""
    return values.view(-1, *(1,) * (like.ndim - 1))
