"""Finds pixels and sounds among the keyword arguments of `generate`; what it does not know it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Image

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.arrangements import layout_of
from lmms_smoothguard.inputs.carried import CLIPS, Sounds, check_carried, check_features, refuse_problem
from lmms_smoothguard.inputs.layouts import Layout
from lmms_smoothguard.inputs.rows import rows_of_images, rows_of_sounds

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
    refuse_problem(inputs.get(CLIPS))
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
                f"{key} is a continuous input of unknown layout; expected one of: {', '.join((*IMAGE_KEYS, *AUDIO_KEYS))}. "
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
    return Images(key, values, layout, slices, rows_of_images(inputs, config, slices, layout, values.ndim))


def _sounds(key: str, inputs: Mapping[str, Any], config: Any) -> Sounds:
    found = check_carried(inputs.get(CLIPS), key)  # first, for what is wrong with a clip shows in its features too
    values = _checked(key, inputs[key], "features")
    check_features(found, key, values)
    return Sounds(key, values, found, rows_of_sounds(inputs, config, len(found)))


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
