"""Noisy copies of a request and their answers: what answer level does for a vote, and a sweep for many votes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.defenses.replies import Replies
from lmms_smoothguard.defenses.request import Request
from lmms_smoothguard.inputs.media import Images
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.inputs.tiling import tile
from lmms_smoothguard.noise import NoiseSource

log = logging.getLogger(__name__)


def noise_source(request: Request, config: SmoothGuardConfig, images: Images) -> NoiseSource:
    """The noise of a request. Raises UndefendableError where pixel noise has no scale."""
    statistics = None
    if config.noise_space == "pixel":
        statistics = pixel_statistics(request.model, request.image_processor)
    return NoiseSource(images, sigma=config.sigma, statistics=statistics, seed=config.seed)


def answer_batch(
    request: Request, replies: Replies, images: Images, copy: Callable[[int], torch.Tensor], numbers: Sequence[int]
) -> bool:
    """Answers the copies of these numbers as one batch and adds the answers to `replies`; `copy` makes a copy's pixels.

    False when they do not fit into memory together: then nothing is added, and fewer may. A single copy that does not
    fit raises, as does everything else.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    arguments = {key: value for key, value in request.arguments.items() if key != "streamer"}
    try:
        tiled = tile(arguments, [copy(number) for number in numbers], images.key)
        replies.add(request.generate(**tiled), len(numbers))
    except RuntimeError as error:
        if len(numbers) == 1 or not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise
        log.warning("out of memory with %d copies in a batch; going on with %d", len(numbers), len(numbers) // 2)
        clear_device_cache(garbage_collection=True)
        return False
    return True
