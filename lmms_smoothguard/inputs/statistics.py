"""Between [0, 1] pixels and the model's normalised input: per-channel mean and standard deviation, and their source."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from lmms_smoothguard.errors import UndefendableError

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
    if getattr(image_processor, "do_normalize", True) is False:
        return PixelStatistics(torch.zeros(3), torch.ones(3), source)
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    if mean is None or std is None:
        return None
    return PixelStatistics(torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32), source)


def pixel_statistics(model: Any, image_processor: Any = None) -> PixelStatistics:
    """From the image processor at hand, else the one in the model's directory, else the default of the model's class.

    Raises UndefendableError where none is known: noise in pixel units would have no scale.
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
    return found


def _class_default(model: Any) -> Any:
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    entry = IMAGE_PROCESSOR_MAPPING_NAMES.get(getattr(model.config, "model_type", ""))
    if isinstance(entry, dict):
        entry = entry.get("torchvision") or next(iter(entry.values()), None)
    if isinstance(entry, tuple | list):
        entry = next((name for name in reversed(entry) if name), None)
    return getattr(transformers, entry, None) if isinstance(entry, str) else None
