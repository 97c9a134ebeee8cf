"""Between [0, 1] pixels and the model's normalised input: per-channel mean and standard deviation, and their source."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.fitting import channels_of

log = logging.getLogger(__name__)


class PixelStatistics(NamedTuple):
    """normalised = (pixel - mean) / std, both (channels,) float32; `source` says where they come from."""

    mean: torch.Tensor
    std: torch.Tensor
    source: str


def statistics_of(image_processor: Any, source: str) -> PixelStatistics | None:
    """What an image processor does to [0, 1] pixels; None when it does not say."""
    if image_processor is None:
        return None
    factor = getattr(image_processor, "rescale_factor", None)
    scale = 255 * factor if isinstance(factor, int | float) and factor > 0 else 1.0
    if getattr(image_processor, "do_rescale", True) is False or math.isclose(scale, 1):
        scale = 1.0  # all but Chameleon's, which is 255 * 0.0078
    if getattr(image_processor, "do_normalize", True) is False:
        return PixelStatistics(torch.tensor(0.0), torch.tensor(1 / scale), source)
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    if mean is None or std is None:
        return None
    mean, std = (torch.tensor(value, dtype=torch.float32) / scale for value in (mean, std))
    return PixelStatistics(mean, std, source)


def pixel_statistics(model: Any, image_processor: Any = None) -> PixelStatistics:
    """From the image processor at hand, else the one in the model's directory, else the default of the model's class.

    Raises UndefendableError where none is known, for noise in pixel units would have no scale, and where they cannot be
    the model's: another number of channels, or a std that is no positive number.
    """
    found = statistics_of(image_processor, "processor")
    where = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    if found is None and where:
        from transformers import AutoImageProcessor

        try:
            found = statistics_of(AutoImageProcessor.from_pretrained(where, local_files_only=True), str(where))
        except (OSError, ValueError, ImportError) as error:
            log.debug("no image processor in %s: %s", where, error)
    if found is None:
        found = statistics_of(_class_default(model), "class default")
        if found is not None:
            log.warning(
                "pixel-space noise uses the default mean and std of model type %r; attach the model's own processor "
                "with hf_integration.attach(model, processor) to be sure",
                model.config.model_type,
            )
    if found is None:
        raise UndefendableError(
            f"noise_space is 'pixel', but the mean and std of model type {getattr(model.config, 'model_type', '?')!r} are "
            "unknown; expected a processor. Call hf_integration.attach(model, processor), or use noise_space='normalized'."
        )
    return _checked(found, channels_of(model.config))


def _checked(found: PixelStatistics, channels: int | None) -> PixelStatistics:
    """One mean and one std for every channel; a single number stands for all of them."""
    mean, std, source = found
    count = channels or max(mean.numel(), std.numel())
    mean, std = (value.expand(count) if value.ndim == 0 else value for value in (mean, std))
    if mean.shape != (count,) or std.shape != (count,):
        raise UndefendableError(
            f"the image processor ({source}) has {mean.numel()} means and {std.numel()} stds, the model takes {count} "
            "channels; expected one of each a channel. It is not this model's: hf_integration.attach(model, its own processor)"
        )
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise UndefendableError(
            f"the image processor ({source}) has image_mean {mean.tolist()} and image_std {std.tolist()}; expected finite "
            "numbers, and a std above 0"
        )
    return PixelStatistics(mean, std, source)


def _class_default(model: Any) -> Any:
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    entry = IMAGE_PROCESSOR_MAPPING_NAMES.get(getattr(model.config, "model_type", ""))
    if isinstance(entry, dict):
        entry = entry.get("torchvision") or next(iter(entry.values()), None)
    if isinstance(entry, tuple | list):
        entry = next((name for name in reversed(entry) if name), None)
    return getattr(transformers, entry, None) if isinstance(entry, str) else None
