"""What is fine-tuned: a CLIP-type vision tower, taken out of a multimodal model, a dual encoder, or a checkpoint of its own."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.tiny import place

TOKENS = ("read", "class", "all")
"""Which of the tower's outputs FARE holds on to; see `Reader`."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model whose tower is trained.

    name: as it was asked for; model: all of it, frozen, its own tower untouched; tower: a trainable copy (CLIPVisionModel);
    original: the tower as it was; image_processor: the model's; processor: the model's whole one, None of a bare tower.
    """

    name: str
    model: Any
    tower: Any
    original: Any
    image_processor: Any
    processor: Any

    @property
    def dual(self) -> bool:
        """Whether it is a dual encoder (CLIPModel)."""
        return hasattr(self.model, "get_text_features") and hasattr(self.model, "visual_projection")

    def reader(self, tokens: str) -> Reader:
        """Reads the tower's outputs of that name. Raises ConfigError for an unknown one."""
        if tokens not in TOKENS:
            raise ConfigError(f"tokens is {tokens!r}; expected one of {', '.join(TOKENS)}")
        config = self.model.config
        layers = getattr(config, "vision_feature_layer", None)
        if layers is None:
            return Reader("class" if tokens == "read" else tokens)
        skipped = int(getattr(config, "vision_feature_select_strategy", "full") == "default")
        return Reader(tokens, (layers,) if isinstance(layers, int) else tuple(layers), skipped)


@dataclass(frozen=True)
class Reader:
    """What a loss is over.

    tokens "read": what the multimodal model reads, the hidden states of `layers` without the first `skipped` tokens; of a
    dual encoder or a bare tower the class token. "class": the class token after the last layer norm, as FARE was published.
    "all": every token of `layers` (the last layer where there are none), the class token among them.
    """

    tokens: str
    layers: tuple[int, ...] = (-1,)
    skipped: int = 0

    def __call__(self, tower: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (n, 3, h, w) -> (n, tokens, width), float32."""
        if self.tokens == "class":
            return tower(pixel_values=pixels).pooler_output[:, None].float()
        hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        skipped = 0 if self.tokens == "all" else self.skipped
        return torch.cat([hidden[layer][:, skipped:].float() for layer in self.layers], dim=1)

    def __str__(self) -> str:
        if self.tokens == "class":
            return "the class token after the last layer norm"
        layers = ", ".join(map(str, self.layers))
        what = "patch tokens" if self.skipped and self.tokens == "read" else "all tokens"
        return f"{what} of hidden state {layers}"


def load(name: str, device: str | torch.device = "cpu") -> Subject:
    """A model of a name (tiny-llava, tiny-clip), a directory or a hub id, in float32.

    Raises ConfigError for what cannot be loaded, and for a model without a CLIP-type tower.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, CLIPModel, CLIPVisionModel

    where = place(name)
    try:
        config = AutoConfig.from_pretrained(where)
        _check_tower(config, name)
        factories = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModel}
        factory: Any = factories.get(config.model_type, AutoModelForImageTextToText)
        model = factory.from_pretrained(where, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"model {name!r} cannot be loaded ({str(error).splitlines()[0]}); expected tiny-llava, tiny-clip, a directory or a hub id "
            "of a model that transformers knows, with safetensors weights"
        ) from error
    original = find_clip_tower(model, name)
    model.to(device).eval().requires_grad_(False)
    processor, image_processor = _processors(where, name)
    tower = copy.deepcopy(original).requires_grad_(True)
    # A copy that another attention computes would not be the same function; on a CPU SDPA's bf16 backward is slow.
    for module in (tower, original):
        module.set_attn_implementation("eager")
    return Subject(name, model, tower, original, image_processor, processor)


def _check_tower(config: Any, name: str) -> None:
    vision = getattr(config, "vision_config", None)
    kind = config.model_type if vision is None else getattr(vision, "model_type", None)
    if kind != "clip_vision_model":
        seen = "its config names no vision tower" if vision is None else f"its vision tower is of type {kind!r}"
        raise ConfigError(
            f"model {name!r} (type {config.model_type!r}) has no CLIP-type vision tower: {seen}; expected a model with a CLIPVisionModel "
            "in it, such as LLaVA or CLIP"
        )


def find_clip_tower(model: Any, name: str) -> Any:
    """The CLIPVisionModel that is or stands in a model. Raises ConfigError where there is none."""
    from transformers import CLIPVisionModel

    found = next((module for module in model.modules() if isinstance(module, CLIPVisionModel)), None)
    if found is None:
        raise ConfigError(
            f"model {name!r} ({type(model).__name__}) has no CLIPVisionModel in it; expected one, as in LLaVA or CLIP"
        )
    return found


def _processors(where: str, name: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        image_processor = AutoImageProcessor.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {name!r} has no image processor ({str(error).splitlines()[0]}); expected its config beside the weights"
        ) from error
    try:
        processor = AutoProcessor.from_pretrained(where)
    except (OSError, ValueError):
        processor = image_processor  # a bare tower's directory
    return (None if type(processor) is type(image_processor) else processor), image_processor
