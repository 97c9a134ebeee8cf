"""Noisy copies of a request and their answers: what answer level does for a vote, and a sweep for many votes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.defenses.replies import Replies
from lmms_smoothguard.defenses.request import Request
from lmms_smoothguard.inputs.media import Media
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.inputs.tiling import tile_media
from lmms_smoothguard.noise import NoiseSource, WaveformNoise

log = logging.getLogger(__name__)

Inputs = dict[str, torch.Tensor]
"""What differs from copy to copy: pixels, features of sounds, or both, by their keys."""


class Copies:
    """Copies of a request's media by their numbers: 0 as they came, noisy ones from 1."""

    def __init__(self, request: Request, config: SmoothGuardConfig, media: Media) -> None:
        """Raises UndefendableError where pixel noise has no scale."""
        self._media = media
        self._pixels: NoiseSource | None = None
        self._waveforms: WaveformNoise | None = None
        if media.images is not None:
            statistics = None
            if config.noise_space == "pixel":
                statistics = pixel_statistics(request.model, request.image_processor)
            self._pixels = NoiseSource(media.images, sigma=config.sigma, statistics=statistics, seed=config.seed)
        if media.sounds is not None:
            self._waveforms = WaveformNoise(
                media.sounds, sigma=config.audio_sigma, snr=config.audio_snr, seed=config.seed
            )

    def __call__(self, numbers: Sequence[int]) -> list[Inputs]:
        """What differs in the copies of these numbers. All sounds of noisy ones go through their extractor together."""
        made: list[Inputs] = [{} for _ in numbers]
        images, sounds = self._media
        if images is not None and self._pixels is not None:
            for inputs, number in zip(made, numbers, strict=True):
                inputs[images.key] = self._pixels.copy(number) if number else images.values
        if sounds is not None and self._waveforms is not None:
            noisy = [number for number in numbers if number]
            features = dict(zip(noisy, self._waveforms.copies(noisy) if noisy else [], strict=True))
            for inputs, number in zip(made, numbers, strict=True):
                inputs[sounds.key] = features[number] if number else sounds.values
        return made


def answer_batch(
    request: Request, replies: Replies, copies: Callable[[Sequence[int]], list[Inputs]], numbers: Sequence[int]
) -> bool:
    """Answers the copies of these numbers as one batch and adds the answers to `replies`; `copies` makes what differs in them.

    False when they do not fit into memory together: then nothing is added, and fewer may. A single copy that does not
    fit raises, as does everything else.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    arguments = {key: value for key, value in request.arguments.items() if key != "streamer"}
    try:
        tiled = tile_media(arguments, copies(numbers))
        replies.add(request.generate(**tiled), len(numbers))
    except RuntimeError as error:
        if len(numbers) == 1 or not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        log.warning("out of memory with %d copies in a batch; going on with %d", len(numbers), len(numbers) // 2)
        clear_device_cache(garbage_collection=True)
        return False
    return True
