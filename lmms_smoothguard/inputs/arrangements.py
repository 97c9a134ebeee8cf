"""How pixels lie in a model's tensor: by its shape where that tells, by a table of model types where it does not."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any, NamedTuple

import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.fitting import channels_of
from lmms_smoothguard.inputs.layouts import ChannelsFirst, Layout, PackedPatches
from lmms_smoothguard.inputs.rows import image_tokens, runs


class _Packing(NamedTuple):
    """How a model type packs patches, where their shape does not tell: `order` as of `PackedPatches`; `lengths`: what tells how
    many a picture has; `frames`: the vision config's name for a still's repetitions; `mask`: the input that tells padding."""

    order: str
    lengths: str = "image_grid_thw"
    frames: str | None = None
    mask: str | None = None


_VIDEO_TYPES = frozenset({"instructblipvideo"})  # that call it pixel_values
_PACKINGS = {
    "cosmos3_edge": _Packing("AC"),
    "dots3_note": _Packing("CA"),
    "ernie4_5_vl_moe": _Packing("CA"),
    "fuyu": _Packing("AC", "tokens of a row"),
    "gemma4": _Packing("AC", mask="image_position_ids"),
    "gemma4_unified": _Packing("AC", mask="image_position_ids"),
    "inkling_mm_model": _Packing("TAC", "runs of tokens", "temporal_patch_size"),
    "inkling2": _Packing("AC"),
    "kimi_k25": _Packing("CA"),
    "lfm2_vl": _Packing("AC", mask="pixel_attention_mask"),
    "muse_glimmer": _Packing("TCA", frames="patch_temporal"),
    "muse_spark": _Packing("TCA", frames="patch_temporal"),
    "nemotron_h_omni": _Packing("CA", "image_grid_hw"),
    "paddleocr_vl": _Packing("CA"),
    "video_llama_3": _Packing("CA"),
}


def layout_of(
    key: str, values: torch.Tensor, inputs: Mapping[str, Any], config: Any
) -> tuple[Layout, tuple[slice, ...]]:
    """How pixels lie in a tensor, and which part of it each picture is; `inputs` are what came with them.

    Raises UndefendableError for a layout that is not known.
    """
    packing = _PACKINGS.get(str(getattr(config, "model_type", None)))
    if packing is not None:
        return _packed(key, values, inputs, config, packing)
    channels = channels_of(config)
    if getattr(config, "model_type", None) in _VIDEO_TYPES:
        raise UndefendableError(f"{key} of model type {config.model_type!r} is video, which is not supported yet")
    if inputs.get("target_sizes") is not None:
        raise UndefendableError(
            f"{key} of shape {tuple(values.shape)} is one strip of all pictures of a request, which has no known place for "
            "copies; pass smoothguard=False to run undefended."
        )
    if values.ndim >= 4 and channels not in (None, values.shape[-3]):
        raise UndefendableError(
            f"{key} of shape {tuple(values.shape)} has {values.shape[-3]} channels, the model's vision tower takes "
            f"{channels}; expected (..., {channels}, height, width). The processor is not this model's."
        )
    if values.ndim >= 4:
        mask = inputs.get("pixel_attention_mask")
        vision_type = getattr(getattr(config, "vision_config", None), "model_type", None)
        if mask is not None and mask.ndim != values.ndim - 1:
            mask = None  # of whole tiles, which are all zero where there is none
        if values.ndim == 4 and (
            vision_type == "pixtral" or getattr(config, "model_type", None) == "emu3"
        ):  # pads every image to the largest of the batch
            mask = _mask_of_sizes(inputs.get("image_sizes"), values)
        return ChannelsFirst(mask), tuple(slice(i, i + 1) for i in range(values.shape[0]))
    grid, vision = inputs.get("image_grid_thw"), getattr(config, "vision_config", None)
    patch, frames = getattr(vision, "patch_size", None), getattr(vision, "temporal_patch_size", None)
    if values.ndim == 2 and grid is not None and isinstance(patch, int) and isinstance(frames, int):
        channels = channels or 3
        lengths = grid.prod(-1).tolist()
        if values.shape[1] == channels * frames * patch**2 and sum(lengths) == values.shape[0]:
            ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
            slices = tuple(slice(end - length, end) for end, length in zip(ends, lengths, strict=True))
            merge = getattr(vision, "spatial_merge_size", 1)
            return PackedPatches(channels, frames, merge), slices
    raise UndefendableError(
        f"{key} of shape {tuple(values.shape)} has an unknown layout for model type "
        f"{getattr(config, 'model_type', '?')!r}; expected (..., channels, height, width) or packed patches with "
        "image_grid_thw. It is refused; pass smoothguard=False to run undefended."
    )


def _packed(
    key: str, values: torch.Tensor, inputs: Mapping[str, Any], config: Any, packing: _Packing
) -> tuple[Layout, tuple[slice, ...]]:
    """The layout of patches whose order shapes cannot tell. Raises UndefendableError where they do not fit it."""
    vision = getattr(config, "vision_config", config)
    channels = channels_of(config) or 3
    frames = int(getattr(vision, packing.frames)) if packing.frames else 1
    merge = next(
        (int(getattr(vision, name)) for name in ("spatial_merge_size", "merge_size") if hasattr(vision, name)), 1
    )
    mask = None if packing.mask is None else inputs.get(packing.mask)
    lengths = _lengths(values, inputs, config, packing, mask)
    size = values.shape[1 if packing.mask is None else 2 :].numel()
    area = size // (channels * frames)
    if (
        lengths is None
        or sum(lengths) != values.shape[0]
        or area * channels * frames != size
        or isqrt(area) ** 2 != area
    ):
        needed = packing.mask or packing.lengths
        raise UndefendableError(
            f"{key} of shape {tuple(values.shape)} does not fit the patches of model type {config.model_type!r}, of {channels} "
            f"channels and {frames} frames, with their {needed}; expected what its processor makes. It is refused; pass "
            "smoothguard=False to run undefended."
        )
    if mask is not None and mask.ndim == 3:
        mask = (mask >= 0).all(-1)  # positions, -1 where there is none
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    slices = tuple(slice(end - length, end) for end, length in zip(ends, lengths, strict=True))
    return PackedPatches(channels, frames, merge, packing.order, mask), slices


def _lengths(
    values: torch.Tensor, inputs: Mapping[str, Any], config: Any, packing: _Packing, mask: Any
) -> list[int] | None:
    """How many entries of the pixels each picture has; None where what tells of it is missing."""
    if packing.mask is not None:
        fits = isinstance(mask, torch.Tensor) and values.ndim == 3 and mask.shape[:2] == values.shape[:2]
        return [1] * values.shape[0] if fits else None
    if packing.lengths.startswith("image_grid"):
        grid = inputs.get(packing.lengths)
        return None if grid is None else [int(length) for length in grid.prod(-1).tolist()]
    found = image_tokens(inputs, config)
    if found is None:
        return None
    if packing.lengths == "tokens of a row":
        return [count for count in found.sum(1).tolist() if count]
    return [length for row in found.tolist() for length in runs(row)]


def _mask_of_sizes(sizes: Any, values: torch.Tensor) -> torch.Tensor | None:
    """(images, height, width), true inside each image's own size."""
    if sizes is None:
        return None
    mask = torch.zeros(values.shape[0], *values.shape[-2:], dtype=torch.bool)
    for image, (height, width) in enumerate(torch.as_tensor(sizes).tolist()):
        mask[image, :height, :width] = True
    return mask
