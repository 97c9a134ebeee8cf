"""A dual encoder (CLIP, SigLIP) by itself: pictures and class names as unit vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.tiny import place


class DualEncoder:
    """Loaded from a hub id, a directory, or `tiny-clip` for the embedded one. Raises ConfigError for what is none."""

    def __init__(self, pretrained: str, device: str | None, dtype: str, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoModel, AutoProcessor

        where = place(pretrained)
        self.name = pretrained
        try:
            self.processor = AutoProcessor.from_pretrained(where, trust_remote_code=trust_remote_code)
            model = AutoModel.from_pretrained(
                where, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"the model {where!r} cannot be loaded: {said}. Expected a hub id or a directory of a dual encoder"
            ) from error
        if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
            raise ConfigError(
                f"{where!r} is a {type(model).__name__}; expected a dual encoder such as CLIP or SigLIP for --what classes"
            )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()

    @property
    def image_processor(self) -> Any:
        """The part of the processor that makes pixels."""
        return getattr(self.processor, "image_processor", self.processor)

    @torch.inference_mode()
    def prototypes(self, classes: Sequence[str], prompts: Sequence[str]) -> torch.Tensor:
        """(classes, width): each the mean direction of its prompts."""
        rows = []
        for name in classes:
            texts = [prompt.replace("{}", name) for prompt in prompts]
            # SigLIP has learned texts of full length only.
            padding: Any = "max_length" if "siglip" in str(self.model.config.model_type) else True
            made = self.processor(text=texts, padding=padding, truncation=True, return_tensors="pt").to(self.device)
            found = _embedding(self.model.get_text_features(**made)).float()
            rows.append((found / found.norm(dim=1, keepdim=True)).mean(0))
        return torch.stack(rows)

    def call(self, images: Sequence[Image.Image]) -> Any:
        """What the vision tower is called with for one picture."""
        from lmms_smoothguard.smoothing.encoder import tower_call
        from lmms_smoothguard.smoothing.towers import find_tower

        if len(images) != 1:
            raise ConfigError(f"a question has {len(images)} pictures; expected one for a dual encoder")
        made = self.processor(images=list(images), return_tensors="pt").to(self.device)
        made = {key: value.to(self.model.dtype) if value.is_floating_point() else value for key, value in made.items()}
        return tower_call(find_tower(self.model), lambda: self.model.get_image_features(**made))


def is_dual(pretrained: str) -> bool:
    """Whether a model answers nothing and compares: by its config. False for what cannot be read."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(place(pretrained))
    except (OSError, ValueError):
        return False
    both = all(hasattr(config, part) for part in ("vision_config", "text_config"))
    return both and config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _embedding(output: Any) -> torch.Tensor:
    """transformers gives a tensor or, since 5.0, an output with the projected embedding pooled."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
