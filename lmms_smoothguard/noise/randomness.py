"""What an attacker who averages over a defence's randomness (EOT) draws it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from lmms_smoothguard.inputs.media import Images
from lmms_smoothguard.inputs.statistics import PixelStatistics
from lmms_smoothguard.noise.pixels import add_noise
from lmms_smoothguard.noise.waveforms import draw_waveform_noise


class Draw(NamedTuple):
    """What an attacker draws a defence's randomness for: images whose `values` may carry a graph, one generator an image
    (of the attacker's own: evaluation seeds stay unseen), and the model's pixel statistics, where they are asked for."""

    images: Images
    generators: Sequence[torch.Generator]
    statistics: Callable[[], PixelStatistics]


class Inside(NamedTuple):
    """What an attacker draws a defence's randomness for that acts inside the model: `draws` passes a call, with generators
    (pictures of a call) -> one of the attacker's own a picture."""

    model: Any
    image_processor: Any
    draws: int
    generators: Callable[[int], Sequence[torch.Generator]]


class Randomness(NamedTuple):
    """A defence's randomness, for attacks that average over it (EOT).

    fields: the settings that its distribution hangs on, a seed never among them; draw: (Draw, the defence's config) -> the
    pixel tensor as the model gets it, differentiable; None for a defence that leaves pixels alone. inside: (Inside, config) -> a
    context in which the model's own forward is defended, differentiable in its pixels; None for one that leaves the model alone.
    Where there is `draw`, its draws are averaged, each with whatever `inside` does; else `inside` draws that many.
    content: (model, config) -> what fields only point at, such as weights: an attack belongs to it.
    sound_fields, sound: the same two for waveforms: (batch, samples) that may carry a graph, one of the attacker's generators a row,
    config -> (batch, samples) as a processor gets them; None for a defence that does nothing to sounds.
    """

    fields: tuple[str, ...]
    draw: Callable[[Draw, Any], torch.Tensor] | None = None
    inside: Callable[[Inside, Any], AbstractContextManager[Any]] | None = None
    content: Callable[[Any, Any], Any] | None = None
    sound_fields: tuple[str, ...] = ()
    sound: Callable[[torch.Tensor, Sequence[torch.Generator], Any], torch.Tensor] | None = None


def draw_noise(draw: Draw, config: Any) -> torch.Tensor:
    """One noisy copy: `config` has `sigma` and `noise_space`."""
    images = draw.images
    statistics = draw.statistics() if config.noise_space == "pixel" else None
    parts = []
    for where, generator in zip(images.slices, draw.generators, strict=True):
        values = images.values[where]
        noise = images.layout.standard_noise(values.detach(), where, generator)
        parts.append(add_noise(values, noise, images, config.sigma, statistics))
    return torch.cat(parts)


NOISE = Randomness(
    ("sigma", "noise_space"), draw_noise, sound_fields=("audio_sigma", "audio_snr"), sound=draw_waveform_noise
)
