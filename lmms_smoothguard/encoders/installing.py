"""Putting other weights into a model's CLIP vision tower, in one go: all that can fail comes before."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from lmms_smoothguard.boosting.booster import forget_boosters
from lmms_smoothguard.encoders.naming import Tensors, canonical
from lmms_smoothguard.errors import ConfigError

_PLACES = ("model.model.vision_tower", "model.vision_tower")


def find_clip_tower(model: Any) -> Any:
    """The model's CLIPVisionModel. Raises ConfigError where it has none, or one whose weights cannot be written to."""
    from transformers import CLIPVisionModel

    places = [getattr(getattr(model, "model", None), "vision_tower", None), getattr(model, "vision_tower", None)]
    tower = next((place for place in places if place is not None), None)
    if not isinstance(tower, CLIPVisionModel):
        found = "neither" if tower is None else f"a {type(tower).__name__}"
        raise ConfigError(
            f"{type(model).__name__} has no CLIP vision tower: looked for a CLIPVisionModel at {' and '.join(_PLACES)}, found "
            f"{found}. Expected a model such as LLaVA or LLaVA-NeXT"
        )
    for name, parameter in tower.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            kind = "offloaded (on the meta device)" if parameter.is_meta else f"quantised ({parameter.dtype})"
            raise ConfigError(
                f"the vision tower's {name} is {kind}; expected floating point weights in memory. Load the model without "
                "quantisation or offloading of its vision tower"
            )
    return tower


def cast(tensors: Tensors, own: Tensors, name: str) -> Tensors:
    """In the model's dtype and on its devices. Raises ConfigError where values are too large for the dtype."""
    ready = {}
    for key, tensor in tensors.items():
        made = tensor.to(own[key].dtype)
        if not torch.isfinite(made).all():
            raise ConfigError(
                f"the vision tower {name!r} has values in {key} that {own[key].dtype} cannot hold; expected a model in float32 or "
                "bfloat16 (dtype)"
            )
        ready[key] = made.to(own[key].device)
    return ready


@torch.no_grad()
def install(tower: Any, ready: Tensors) -> None:
    """Writes tensors by canonical name into the tower's parameters; what is not among them stays."""
    parameters = dict(tower.named_parameters())
    for short, name in canonical(parameters).items():
        if short in ready and parameters[name].shape == ready[short].shape:
            parameters[name].copy_(ready[short])
        elif short in ready:
            parameters[name].data = ready[short]  # of position embeddings of another size
    forget_boosters(tower)


def see(model: Any, tower: Any, processor: Any, size: tuple[int, int]) -> None:
    """Tells tower, configs and image processor of a new image size; the position embedding is in place already."""
    embeddings = next(module for module in tower.modules() if hasattr(module, "position_embedding"))
    count = len(embeddings.position_embedding.weight)
    embeddings.position_embedding.num_embeddings = count
    embeddings.num_positions, embeddings.num_patches, embeddings.image_size = count, count - 1, size[0]
    embeddings.position_ids = torch.arange(count, device=embeddings.position_embedding.weight.device).expand((1, -1))
    tower.config.image_size = model.config.vision_config.image_size = size[0]
    model.config.image_seq_length = count - 1
    image_processor = getattr(processor, "image_processor", processor)
    for name in ("size", "crop_size"):
        setattr(image_processor, name, _of_size(getattr(image_processor, name), size))


def _of_size(before: Any, size: tuple[int, int]) -> Any:
    """The same kind of size (a dictionary, or transformers' SizeDict), of another number of pixels."""
    plain = dict(before) if isinstance(before, dict) else dataclasses.asdict(before)
    sides = {"height": size[0], "width": size[1]}
    made = {name: sides.get(name, size[0]) for name, value in plain.items() if value is not None}
    return made if isinstance(before, dict) else type(before)(**made)
