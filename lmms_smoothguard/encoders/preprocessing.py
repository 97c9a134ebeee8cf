"""Whether a tower is given the pictures it was trained on: its own preprocessing against the model's image processor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_smoothguard.encoders.sources import Source
from lmms_smoothguard.errors import ConfigError

_NEAR = 1e-3  # of mean and std: a quarter of a grey level; checkpoints round them
_OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """size: (height, width) of what the tower sees; resize: "shortest" (that side, then a centre crop), "squash" or "longest",
    and `resize_to` the side or sides it is brought to; None: the processor's own geometry (tiles, padding). mean, std: of [0, 1] pixels;
    scale: what 8-bit pixels are multiplied by."""

    size: tuple[int, int]
    resize: str | None
    resize_to: tuple[int, ...] | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255


def source_preprocessing(source: Source) -> Preprocessing | None:
    """What a source says of it; None where it says nothing. Raises ConfigError for what cannot be read."""
    if source.is_open_clip and source.config is not None:
        given = source.config.get("preprocess_cfg")
        return _of_open_clip(source, given) if isinstance(given, Mapping) else None
    if source.preprocessing is None:
        return None
    return processor_preprocessing(_image_processor(source.preprocessing, source.name), source.name)


def _image_processor(directory: Path, name: str) -> Any:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(str(directory), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(
            f"the image processor beside the vision tower {name!r} cannot be loaded ({str(error).splitlines()[0]}); expected one "
            "of transformers' own, or none"
        ) from error


def _of_open_clip(source: Source, given: Mapping[str, Any]) -> Preprocessing:
    """Where an entry is missing, what open_clip takes: OpenAI's."""
    told = {key: value for key, value in given.items() if value is not None}
    try:
        size = told.get("size", source.config["model_cfg"]["vision_cfg"].get("image_size", 224))  # type: ignore[index]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        resize = str(told.get("resize_mode", "shortest"))
        return Preprocessing(
            size=(int(height), int(width)),
            resize=resize,
            resize_to=(int(height),) if resize == "shortest" and height == width else (int(height), int(width)),
            interpolation=str(told.get("interpolation", "bicubic")),
            mean=tuple(map(float, told.get("mean", _OPENAI["mean"]))),
            std=tuple(map(float, told.get("std", _OPENAI["std"]))),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"the vision tower {source.name!r} has a preprocess_cfg that cannot be read ({error}); expected open_clip's own"
        ) from error


def processor_preprocessing(image_processor: Any, name: str) -> Preprocessing:
    """What a transformers image processor does. Raises ConfigError for one that makes no pictures of one size."""
    crop, size = getattr(image_processor, "crop_size", None), getattr(image_processor, "size", None)
    crops = bool(getattr(image_processor, "do_center_crop", False)) and _sides(crop) is not None
    shortest, longest = _edge(size, "shortest_edge"), _edge(size, "longest_edge")
    final = _sides(crop) if crops else _sides(size) or ((shortest, shortest) if shortest else None)
    if final is None:
        raise ConfigError(
            f"the image processor of {name!r}, a {type(image_processor).__name__}, makes pictures of no fixed size (size {size}, "
            f"crop_size {crop}); expected CLIP's"
        )
    resize, resize_to = None, None
    if not _own_geometry(image_processor):
        ways = {"squash": _sides(size), "shortest": shortest and (shortest,), "longest": longest and (longest,)}
        resize, resize_to = next(((way, to) for way, to in ways.items() if to), (None, None))
        if not getattr(image_processor, "do_resize", True):
            resize, resize_to = "none", None
    normalise = getattr(image_processor, "do_normalize", True)
    return Preprocessing(
        size=final,
        resize=resize,
        resize_to=resize_to,
        interpolation=_interpolation(getattr(image_processor, "resample", None)),
        mean=tuple(map(float, image_processor.image_mean)) if normalise else (0.0,) * 3,
        std=tuple(map(float, image_processor.image_std)) if normalise else (1.0,) * 3,
        scale=float(image_processor.rescale_factor) if getattr(image_processor, "do_rescale", True) else 1.0,
    )


def _own_geometry(image_processor: Any) -> bool:
    """Tiles of anyres, pictures padded to squares: a LLaVA's own way, in which its projector was trained."""
    return getattr(image_processor, "image_grid_pinpoints", None) is not None or bool(
        getattr(image_processor, "do_pad", False)
    )


def check_preprocessing(name: str, tower: Preprocessing, model: Preprocessing) -> None:
    """Raises ConfigError that names all that differs. A model with a geometry of its own is held to size and statistics."""
    differing = []
    for field in dataclasses.fields(Preprocessing):
        theirs, ours = getattr(tower, field.name), getattr(model, field.name)
        if field.name in ("resize", "resize_to") and None in (tower.resize, model.resize):
            continue
        if not _near(theirs, ours):
            differing.append(f"{field.name} {_shown(theirs)}, the model's image processor has {_shown(ours)}")
    if differing:
        raise ConfigError(
            f"the vision tower {name!r} was trained on other pictures: {'; '.join(differing)}. Expected the same preprocessing. To "
            "load it all the same, give its .safetensors file itself, which says nothing of it"
        )


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_near, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=_NEAR)
    return bool(one == other)


def _edge(size: Any, name: str) -> int | None:
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return int(value) if value else None


def _sides(size: Any) -> tuple[int, int] | None:
    height, width = _edge(size, "height"), _edge(size, "width")
    return (height, width) if height and width else None


def _interpolation(resample: Any) -> str:
    """PIL's number, PIL's or torchvision's constant, by its name in lower case."""
    from PIL.Image import Resampling

    if isinstance(resample, int):
        return Resampling(int(resample)).name.lower()
    return str(getattr(resample, "value", resample)).lower()


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_shown(part) for part in value) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
