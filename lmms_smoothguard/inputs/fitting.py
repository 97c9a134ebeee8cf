"""Whether a processor is the model's own: what a model's config, its directory and its tokenizer tell, and no more.

What would give wrong pixels is an error where it is found (`media`, `statistics`, `noise`). Here is what only looks
wrong: a tokenizer with more tokens than the model, an image processor of another class than the directory names.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = ("processor_config.json", "preprocessor_config.json")


def channels_of(config: Any) -> int | None:
    """The colour channels that a model's vision tower takes, where its config says."""
    vision = getattr(config, "vision_config", None)
    for name in ("num_channels", "in_channels", "in_chans"):
        value = getattr(vision, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def is_encoder_decoder(config: Any) -> bool:
    """Whether answers come from a decoder of their own, in the model or in the language model inside it."""
    return any(getattr(part, "is_encoder_decoder", False) for part in (config, getattr(config, "text_config", None)))


def misfits(model: Any, tokenizer: Any = None, image_processor: Any = None) -> tuple[str, ...]:
    """One sentence for everything that speaks against these being the model's own; empty where nothing does.

    They are warnings: a model's own tokenizer may have had tokens added, and its own image processor been replaced.
    """
    found = (_tokenizer_misfit(model, tokenizer), _image_processor_misfit(model, image_processor))
    return tuple(sentence for sentence in found if sentence is not None)


def all_known(tokenizer: Any, answers: Iterable[Sequence[int]]) -> bool:
    """Whether a tokenizer has all these ids. What it does not have it decodes to nothing, and answers that differ in such
    tokens alone would count as equal."""
    if not hasattr(tokenizer, "__len__"):
        return True
    return max((max(answer, default=0) for answer in answers), default=0) < len(tokenizer)


def _tokenizer_misfit(model: Any, tokenizer: Any) -> str | None:
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # every model has the method; some parts do not fill it in
        return None
    known = getattr(embeddings, "num_embeddings", None)
    if known is None or not hasattr(tokenizer, "__len__") or len(tokenizer) <= known:
        return None
    return (
        f"the tokenizer has {len(tokenizer)} tokens and the model {known}; expected at most as many. If it is not the "
        "model's, answers are compared as other words than were said: hf_integration.attach(model, its own processor)"
    )


def _image_processor_misfit(model: Any, image_processor: Any) -> str | None:
    where = getattr(model, "name_or_path", "")
    declared = _declared(where) if image_processor is not None and where else {}
    kind, given = type(image_processor).__name__, "image_processor_type"
    advice = (
        "if it is not what the pixels went through, noise in pixel units has the wrong size: "
        "hf_integration.attach(model, its own processor)"
    )
    if given in declared and _family(declared[given]) != _family(kind):
        return f"the image processor is a {kind}, the model's directory names {declared[given]}; {advice}"
    for name in ("image_mean", "image_std"):
        own, here = _numbers(declared.get(name)), _numbers(getattr(image_processor, name, None))
        if own and here and not (len(own) == len(here) and all(map(math.isclose, own, here))):
            return f"the image processor's {name} is {here}, the model's directory says {own}; {advice}"
    return None


def _numbers(value: Any) -> list[float]:
    return [] if value is None else np.ravel(value).astype(float).tolist()


def _family(name: str) -> str:
    """The class without its backend: CLIPImageProcessor, CLIPImageProcessorFast and CLIPImageProcessorPil are one."""
    return re.sub(r"(Fast|Pil|Torchvision)$", "", name.replace("FeatureExtractor", "ImageProcessor"))


@functools.cache
def _declared(directory: str) -> Mapping[str, Any]:
    """What a local model directory says of its image processor; empty where it says nothing."""
    for name in _NAMES:
        try:
            settings = json.loads((Path(directory) / name).read_text())
        except (OSError, ValueError):
            continue
        nested = settings.get("image_processor")
        if isinstance(nested, Mapping):
            return nested
        if "image_processor_type" in settings:
            return settings  # type: ignore[no-any-return]
    return {}
