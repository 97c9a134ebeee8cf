"""Loads a model that sees, hears or both, and its processor, through the auto class that knows it."""

from __future__ import annotations

from typing import Any

import torch

from hf_integration.protecting import extractor_of
from lmms_smoothguard.errors import ConfigError


def device_of(device: str | None) -> torch.device:
    """None = the GPU if there is one. Raises ConfigError for a device that is none, or not here."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; expected cpu, cuda or cuda:0") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, and torch sees no GPU; expected cpu")
    return found


def load_model(where: str, device: torch.device, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """(model in evaluation mode, processor). Raises ConfigError for what cannot be loaded, and for a processor of neither pictures
    nor sounds."""
    from transformers import AutoConfig, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        auto, config = _class_of(config)
        model = auto.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            device_map=str(device),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"the model {where!r} cannot be loaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}. "
            f"Expected a hub id, a directory with safetensors weights and a processor, or an embedded model's name, such as tiny-llava"
        ) from error
    if not hasattr(processor, "image_processor") and extractor_of(processor) is None:
        raise ConfigError(
            f"{where!r} has a {type(processor).__name__}; expected a processor of pictures or sounds, and text"
        )
    return model.eval(), processor


def _class_of(config: Any) -> tuple[Any, Any]:
    """The auto class for a config, and the config that it is given.

    What sees is in the first, whether it hears or not; of what hears alone the second has most and AudioFlamingo3 is in the third.
    A whole Omni is a thinker, which answers, and a voice: the thinker has a config and a class of its own.
    """
    from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForSeq2SeqLM

    thinker = getattr(config, "thinker_config", None)
    config = config if thinker is None else thinker
    own = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping or auto.__name__ in own:
            return auto, config
    return AutoModelForImageTextToText, config
