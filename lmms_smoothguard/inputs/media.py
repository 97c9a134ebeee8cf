"""Finds the pixels among the keyword arguments of `generate`; what it does not know it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.fitting import channels_of
from lmms_smoothguard.inputs.layouts import ChannelsFirst, Layout, PackedPatches

IMAGE_KEYS = ("pixel_values",)
AUDIO_KEYS = (
    "input_features", "input_values", "audio_values", "audio_input_features", "audio_features", "input_audio_embeds",
)  # fmt: skip
VIDEO_KEYS = ("pixel_values_videos", "video_values", "video_pixel_values")
_ENCODED_KEYS = ("mm_encoder_outputs", "encoder_outputs")  # whatever they hold, the pixels are gone
# Float tensors that carry no media: masks and positions.
_PLAIN_KEYS = frozenset({
    "attention_mask", "decoder_attention_mask", "cross_attention_mask", "pixel_attention_mask", "position_ids",
    "token_type_ids", "mm_token_type_ids", "head_mask", "image_sizes", "image_grid_thw", "aspect_ratio_ids",
    "aspect_ratio_mask", "spatial_shapes", "image_attention_mask", "image_num_patches", "batch_num_images",
})  # fmt: skip
_COMPANIONS = ("pixel_attention_mask", "image_sizes", "aspect_ratio_ids", "aspect_ratio_mask")  # as long as the pixels


class Images(NamedTuple):
    """The image tensor of a request: its key, its values, its layout, one slice an image, and each image's user row.

    `rows` is None where the prompt does not tell which image belongs to which row.
    """

    key: str
    values: torch.Tensor
    layout: Layout
    slices: tuple[slice, ...]
    rows: tuple[int, ...] | None


def find_images(inputs: Mapping[str, Any], config: Any) -> Images | None:
    """The images of a request, or None when it has no media at all.

    `config` is the model's. Raises UndefendableError for audio, video, precomputed embeddings, caches that may hold an
    undefended image, any unknown float tensor, and pixels that are not finite: a defence that cannot act must say so.
    """
    for key in AUDIO_KEYS:
        if inputs.get(key) is not None:
            raise UndefendableError(
                f"{key} is audio: the published noise is waveform noise, and only features reach generate(). "
                "Audio is not supported yet; pass smoothguard=False to run this request undefended."
            )
    for key in VIDEO_KEYS:
        if inputs.get(key) is not None:
            raise UndefendableError(
                f"{key} is video, which is not supported yet; pass smoothguard=False to run this request undefended."
            )
    found = [key for key in IMAGE_KEYS if inputs.get(key) is not None]
    for key, value in inputs.items():
        opaque = key in _ENCODED_KEYS and value is not None
        if key not in found and key not in _PLAIN_KEYS and (opaque or _is_continuous(value)):
            raise UndefendableError(
                f"{key} is a continuous input of unknown layout; expected one of: {', '.join(IMAGE_KEYS)}. "
                "It would pass undefended, so it is refused; pass smoothguard=False to allow that."
            )
    if not found:
        if inputs.get("past_key_values") is not None and _is_multimodal(config):
            raise UndefendableError(
                "past_key_values may hold an image that was never defended; expected the whole conversation with its "
                "pixels. Send it without the cache, or pass smoothguard=False."
            )
        return None
    if inputs.get("past_key_values") is not None:
        raise UndefendableError("past_key_values cannot be shared by noisy copies; expected a request without a cache")
    key = found[0]
    values = inputs[key]
    if not isinstance(values, torch.Tensor):
        raise UndefendableError(
            f"{key} is a {type(values).__name__}; expected one tensor. Lists of tensors have no known layout."
        )
    if not values.is_floating_point():
        raise UndefendableError(
            f"{key} is of type {str(values.dtype).removeprefix('torch.')}; expected floating point, or noise is rounded away. "
            "Let the processor rescale and normalise."
        )
    if not torch.isfinite(values).all():
        raise UndefendableError(
            f"{key} holds NaN or Inf; expected finite pixels. Check the image and its preprocessing."
        )
    layout, slices = layout_of(key, values, inputs, config)
    _check_rows(key, values, inputs, slices)
    return Images(key, values, layout, slices, _rows(inputs, config, slices, layout))


def _is_continuous(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    if isinstance(value, Mapping):
        return any(_is_continuous(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_is_continuous(item) for item in value)
    return isinstance(value, np.ndarray | Image)


def _is_multimodal(config: Any) -> bool:
    names = ("vision_config", "audio_config", "vision_tower", "vq_config", "thinker_config", "encoder", "image_token_id",
             "image_token_index", "audio_token_id")  # fmt: skip
    return any(getattr(config, name, None) is not None for name in names)


def layout_of(
    key: str, values: torch.Tensor, inputs: Mapping[str, Any], config: Any
) -> tuple[Layout, tuple[slice, ...]]:
    """How pixels lie in a tensor, and which part of it each picture is; `inputs` are what came with them.

    Raises UndefendableError for a layout that is not known.
    """
    channels = channels_of(config)
    if values.ndim >= 4 and channels not in (None, values.shape[-3]):
        raise UndefendableError(
            f"{key} of shape {tuple(values.shape)} has {values.shape[-3]} channels, the model's vision tower takes "
            f"{channels}; expected (..., {channels}, height, width). The processor is not this model's."
        )
    if values.ndim >= 4:
        mask = inputs.get("pixel_attention_mask")
        vision_type = getattr(getattr(config, "vision_config", None), "model_type", None)
        if vision_type == "pixtral" and values.ndim == 4:  # pads every image to the largest of the batch
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


def _check_rows(key: str, values: torch.Tensor, inputs: Mapping[str, Any], slices: tuple[slice, ...]) -> None:
    """Refuses pixels that do not belong to the rows of what came with them; copies of them would slip against each other."""
    for name in _COMPANIONS:
        value = inputs.get(name)
        if values.ndim >= 4 and isinstance(value, torch.Tensor) and value.shape[0] != values.shape[0]:
            raise UndefendableError(
                f"{name} has {value.shape[0]} entries, {key} {values.shape[0]}; expected as many. The processor is not this "
                "model's, or it leaves out rows without an image (Mllama's does): send such rows by themselves."
            )
    questions = inputs.get("qformer_input_ids")
    if isinstance(questions, torch.Tensor) and questions.shape[0] != len(slices):
        raise UndefendableError(
            f"the request has {len(slices)} images in {questions.shape[0]} rows; expected one a row, as this model's "
            "Q-Former reads every image with its row's question"
        )


def _mask_of_sizes(sizes: Any, values: torch.Tensor) -> torch.Tensor | None:
    """(images, height, width), true inside each image's own size."""
    if sizes is None:
        return None
    mask = torch.zeros(values.shape[0], *values.shape[-2:], dtype=torch.bool)
    for image, (height, width) in enumerate(torch.as_tensor(sizes).tolist()):
        mask[image, :height, :width] = True
    return mask


def _rows(inputs: Mapping[str, Any], config: Any, slices: tuple[slice, ...], layout: Layout) -> tuple[int, ...] | None:
    """Which user row each image belongs to, from the image placeholders in the prompt."""
    values = inputs["pixel_values"]
    if values.ndim > 4 or getattr(getattr(config, "vision_config", None), "model_type", None) == "pixtral":
        return None  # an image's tokens depend on its size, so a neighbour could shift the count
    ids = inputs.get("input_ids")
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    per_row = (ids == token).sum(1).tolist() if token is not None else [0] * len(ids)
    total, rows = sum(per_row), []
    if total:
        needs = [layout.tokens(s, total, len(slices)) for s in slices]
        row, left = 0, per_row[0]
        for need in needs:
            while left == 0 and row + 1 < len(per_row):
                row, left = row + 1, per_row[row + 1]
            if need > left:
                return None
            rows.append(row)
            left -= need
        return tuple(rows)
    return tuple(range(len(slices))) if len(slices) == len(ids) else None
