"""Finds pixels and sounds among the keyword arguments of `generate`; what it does not know it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.carried import CLIPS, Sounds, check_carried
from lmms_smoothguard.inputs.fitting import channels_of
from lmms_smoothguard.inputs.layouts import ChannelsFirst, Layout, PackedPatches

IMAGE_KEYS = ("pixel_values", "pixel_values_images", "image_pixel_values")
AUDIO_KEYS = (
    "input_features", "input_values", "audio_values", "audio_input_features", "audio_features", "input_audio_embeds",
)  # fmt: skip
TOKEN_KEYS = ("protein_input_ids",)
"""Inputs beside the prompt that are integers: there is nothing to add noise to."""
VIDEO_KEYS = ("pixel_values_videos", "video_values", "video_pixel_values")
_ENCODED_KEYS = ("mm_encoder_outputs", "encoder_outputs")  # whatever they hold, the pixels are gone
# Float tensors that carry no media: masks and positions.
_PLAIN_KEYS = frozenset({
    "attention_mask", "decoder_attention_mask", "cross_attention_mask", "pixel_attention_mask", "position_ids",
    "token_type_ids", "mm_token_type_ids", "head_mask", "image_sizes", "image_grid_thw", "aspect_ratio_ids",
    "aspect_ratio_mask", "spatial_shapes", "image_attention_mask", "image_num_patches", "batch_num_images",
})  # fmt: skip
_COMPANIONS = ("pixel_attention_mask", "image_sizes", "aspect_ratio_ids", "aspect_ratio_mask")  # as long as the pixels


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


class Images(NamedTuple):
    """The image tensor of a request: its key, its values, its layout, one slice an image, and each image's user row.

    `rows` is None where the prompt does not tell which image belongs to which row.
    """

    key: str
    values: torch.Tensor
    layout: Layout
    slices: tuple[slice, ...]
    rows: tuple[int, ...] | None


class Media(NamedTuple):
    """All media of a request, None for what there is none of; never both None."""

    images: Images | None
    sounds: Sounds | None


def find_images(inputs: Mapping[str, Any], config: Any) -> Images | None:
    """The images of a request, or None when it has no media at all.

    As `find_media`, for what acts on pictures alone: raises UndefendableError for sounds too.
    """
    media = find_media(inputs, config)
    if media is not None and media.sounds is not None:
        raise UndefendableError(
            f"{media.sounds.key} is audio, and this acts on pictures alone; expected a request without sounds. Use "
            "defense=smoothguard, or pass smoothguard=False to run this request undefended."
        )
    return None if media is None else media.images


def find_media(inputs: Mapping[str, Any], config: Any) -> Media | None:
    """The images and sounds of a request, or None when it has no media at all.

    `config` is the model's. Raises UndefendableError for features of sounds without their clips, video, precomputed embeddings,
    caches that may hold an undefended image, any unknown float tensor, and values that are not finite: a defence that cannot act
    must say so.
    """
    _refuse_unsupported(inputs)
    pixels = _only([key for key in IMAGE_KEYS if inputs.get(key) is not None], "pixels")
    heard = _only([key for key in AUDIO_KEYS if inputs.get(key) is not None], "sounds")
    _refuse_unknown(inputs, {key for key in (pixels, heard) if key is not None})
    if pixels is None and heard is None:
        if inputs.get(CLIPS) is not None:
            raise UndefendableError(f"{CLIPS} came without features; expected all that the processor gave")
        if inputs.get("past_key_values") is not None and _is_multimodal(config):
            raise UndefendableError(
                "past_key_values may hold an image or a sound that was never defended; expected the whole conversation with its "
                "media. Send it without the cache, or pass smoothguard=False."
            )
        return None
    if inputs.get("past_key_values") is not None:
        raise UndefendableError("past_key_values cannot be shared by noisy copies; expected a request without a cache")
    images = None if pixels is None else _images(pixels, inputs, config)
    return Media(images, None if heard is None else _sounds(heard, inputs, config))


def _refuse_unsupported(inputs: Mapping[str, Any]) -> None:
    for key in VIDEO_KEYS:
        if inputs.get(key) is not None:
            raise UndefendableError(
                f"{key} is video, which is not supported yet; pass smoothguard=False to run this request undefended."
            )
    for key in TOKEN_KEYS:
        if inputs.get(key) is not None:
            raise UndefendableError(
                f"{key} is made of tokens, to which no noise can be added; expected pixels. Pass smoothguard=False to run this "
                "request undefended."
            )


def _only(found: Sequence[str], what: str) -> str | None:
    if len(found) > 1:
        raise UndefendableError(
            f"the request has {what} in {' and '.join(found)}; expected one of them, for only one would be defended"
        )
    return found[0] if found else None


def _refuse_unknown(inputs: Mapping[str, Any], found: Set[str]) -> None:
    for key, value in inputs.items():
        opaque = key in _ENCODED_KEYS and value is not None
        if key not in found and key not in _PLAIN_KEYS and (opaque or _is_continuous(value)):
            raise UndefendableError(
                f"{key} is a continuous input of unknown layout; expected one of: {', '.join(IMAGE_KEYS)}. "
                "It would pass undefended, so it is refused; pass smoothguard=False to allow that."
            )


def _checked(key: str, values: Any, what: str) -> torch.Tensor:
    """Raises UndefendableError for what is no finite tensor of floating point."""
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
            f"{key} holds NaN or Inf; expected finite {what}. Check the {'image' if what == 'pixels' else 'sound'} and its preprocessing."
        )
    return values


def _images(key: str, inputs: Mapping[str, Any], config: Any) -> Images:
    values = _checked(key, inputs[key], "pixels")
    layout, slices = layout_of(key, values, inputs, config)
    _check_rows(key, values, inputs, slices, config)
    return Images(key, values, layout, slices, _rows(inputs, config, slices, layout, values.ndim))


def _sounds(key: str, inputs: Mapping[str, Any], config: Any) -> Sounds:
    values = _checked(key, inputs[key], "features")
    found = check_carried(inputs.get(CLIPS), key, values)
    return Sounds(key, values, found, _rows_of_sounds(inputs, config, len(found)))


def _rows_of_sounds(inputs: Mapping[str, Any], config: Any, count: int) -> tuple[int, ...] | None:
    """Each sound's user row: one stretch of its tokens in the prompt a sound."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    if len(ids) == 1:
        return (0,) * count
    names = ("audio_token_id", "audio_token_index")
    token = next((found for name in names if (found := getattr(config, name, None)) is not None), None)
    rows = tuple(row for row, tokens in enumerate((ids == token).tolist()) for _ in _runs(tokens)) if token else ()
    return rows if len(rows) == count else None


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
    found = _image_tokens(inputs, config)
    if found is None:
        return None
    if packing.lengths == "tokens of a row":
        return [count for count in found.sum(1).tolist() if count]
    return [length for row in found.tolist() for length in _runs(row)]


def _image_tokens(inputs: Mapping[str, Any], config: Any) -> torch.Tensor | None:
    """(rows, length), true where the prompt has a picture's token."""
    ids = inputs.get("input_ids")
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    return ids == token if isinstance(ids, torch.Tensor) and ids.ndim == 2 and token is not None else None


def _runs(row: Sequence[bool]) -> list[int]:
    """Lengths of the stretches of true."""
    return [len(list(group)) for true, group in itertools.groupby(row) if true]


def _check_rows(
    key: str, values: torch.Tensor, inputs: Mapping[str, Any], slices: tuple[slice, ...], config: Any
) -> None:
    """Refuses pixels that do not belong to the rows of what came with them; copies of them would slip against each other."""
    for name in _COMPANIONS:
        value = inputs.get(name)
        if values.ndim >= 4 and isinstance(value, torch.Tensor) and value.shape[0] != values.shape[0]:
            raise UndefendableError(
                f"{name} has {value.shape[0]} entries, {key} {values.shape[0]}; expected as many. The processor is not this "
                "model's, or it leaves out rows without an image (Mllama's does): send such rows by themselves."
            )
    ids = inputs.get("qformer_input_ids", inputs.get("input_ids") if hasattr(config, "num_query_tokens") else None)
    if isinstance(ids, torch.Tensor) and ids.shape[0] != len(slices):
        raise UndefendableError(
            f"the request has {len(slices)} images in {ids.shape[0]} rows; expected one a row, as this model's Q-Former reads "
            "one image with each row"
        )


def _mask_of_sizes(sizes: Any, values: torch.Tensor) -> torch.Tensor | None:
    """(images, height, width), true inside each image's own size."""
    if sizes is None:
        return None
    mask = torch.zeros(values.shape[0], *values.shape[-2:], dtype=torch.bool)
    for image, (height, width) in enumerate(torch.as_tensor(sizes).tolist()):
        mask[image, :height, :width] = True
    return mask


def _rows(
    inputs: Mapping[str, Any], config: Any, slices: tuple[slice, ...], layout: Layout, dimensions: int
) -> tuple[int, ...] | None:
    """Which user row each image belongs to, from the image placeholders in the prompt."""
    packed = isinstance(layout, PackedPatches)
    vision_type = getattr(getattr(config, "vision_config", None), "model_type", None)
    if not packed and (dimensions > 4 or vision_type == "pixtral"):
        return None  # an image's tokens depend on its size, so a neighbour could shift the count
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    found = _image_tokens(inputs, config)
    if found is None or not found.any():
        return tuple(range(len(slices))) if len(slices) == len(ids) else None
    per_row, total = found.sum(1).tolist(), int(found.sum())
    by_count = _by_count([layout.tokens(s, total, len(slices)) for s in slices], per_row)
    if by_count is not None or not packed:
        return by_count
    runs = [(row, length) for row, tokens in enumerate(found.tolist()) for length in _runs(tokens)]
    return (
        tuple(row for row, _ in runs) if len(runs) == len(slices) else None
    )  # with tokens for ends of lines, and the like


def _by_count(needs: Sequence[int], per_row: Sequence[int]) -> tuple[int, ...] | None:
    """Each image's row, where the images' tokens fill every row exactly."""
    rows, row, left = [], 0, per_row[0]
    for need in needs:
        while left == 0 and row + 1 < len(per_row):
            row, left = row + 1, per_row[row + 1]
        if need > left:
            return None
        rows.append(row)
        left -= need
    return tuple(rows) if left == 0 and not any(per_row[row + 1 :]) else None
