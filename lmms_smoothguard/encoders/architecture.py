"""Whether a tower's weights are for this model: what its config says and what its tensors show, against the model's own tower."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from lmms_smoothguard.encoders.naming import Tensors
from lmms_smoothguard.encoders.sources import Source
from lmms_smoothguard.errors import ConfigError

Facts = dict[str, Any]
"""By the names that `CLIPVisionConfig` has, and `patches`: (rows, columns). What is not known is not in it."""
OPTIONAL = frozenset({"post_layernorm.weight", "post_layernorm.bias"})
"""Used for the pooled feature alone, which a LLaVA does not read."""
_SIZES = ("image_size", "patches")
_OPEN_CLIP_DEFAULTS = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
}


def model_facts(config: Any) -> Facts:
    """Of a CLIPVisionConfig."""
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels", "patch_size",
        "image_size", "hidden_act", "layer_norm_eps",
    )  # fmt: skip
    facts = {name: getattr(config, name) for name in names}
    facts |= {name: _pair(facts[name]) for name in ("patch_size", "image_size")}
    sides = zip(facts["image_size"], facts["patch_size"], strict=True)
    return facts | {"patches": tuple(size // patch for size, patch in sides)}


def said_facts(source: Source) -> Facts:
    """What a source's config says; empty for a bare file. Raises ConfigError for a config that is no CLIP ViT's."""
    if source.config is None:
        return {}
    if source.is_open_clip:
        return _open_clip_facts(source.config, source.name)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CLIPConfig, CLIPVisionConfig

    try:
        if source.config.get("model_type") == "clip":
            return model_facts(CLIPConfig.from_dict(dict(source.config)).vision_config)
        return model_facts(CLIPVisionConfig.from_dict(dict(source.config)))
    except (TypeError, ValueError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ConfigError(
            f"vision_tower is {source.name!r}, whose config.json is no CLIP's ({error}); expected that of a CLIPModel or "
            "CLIPVisionModel"
        ) from error


def _open_clip_facts(config: Mapping[str, Any], name: str) -> Facts:
    model = config.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(vision, Mapping):
        raise ConfigError(
            f"vision_tower is {name!r}, whose open_clip_config.json has no model_cfg.vision_cfg; expected open_clip's own"
        )
    vision = {**_OPEN_CLIP_DEFAULTS, **{key: value for key, value in vision.items() if value is not None}}
    if "timm_model_name" in vision or not isinstance(vision["layers"], int):
        kind = vision.get("timm_model_name") or f"a ResNet with layers {vision['layers']}"
        raise ConfigError(f"vision_tower is {name!r}, whose tower is {kind}; expected a plain CLIP ViT")
    try:
        facts: Facts = {
            "hidden_size": int(vision["width"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": int(vision["width"]) // int(vision["head_width"]),
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "patch_size": _pair(vision["patch_size"]),
            "image_size": _pair(vision["image_size"]),
            "hidden_act": _open_clip_activation(model, vision),
            "layer_norm_eps": float((vision.get("norm_kwargs") or {}).get("eps", 1e-5)),
        }
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"vision_tower is {name!r}, whose open_clip_config.json cannot be read ({error}); expected open_clip's own"
        ) from error
    return facts


def _open_clip_activation(model: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    """As transformers calls it. open_clip itself takes gelu where `quick_gelu` is not there."""
    given = vision.get("act_kwargs") or {}
    if model.get("quick_gelu"):
        return "quick_gelu"
    return {(): "gelu", (("approximate", "tanh"),): "gelu_pytorch_tanh"}.get(tuple(given.items()), f"gelu with {given}")


def shown_facts(tensors: Tensors) -> Facts:
    """What tensors show by themselves; neither heads nor activation do."""
    facts: Facts = {}
    patch = tensors.get("embeddings.patch_embedding.weight")
    if patch is not None and patch.ndim == 4:
        facts |= {"hidden_size": patch.shape[0], "num_channels": patch.shape[1], "patch_size": tuple(patch.shape[2:])}
    positions = tensors.get("embeddings.position_embedding.weight")
    if positions is not None and positions.ndim == 2:
        side = math.isqrt(max(0, len(positions) - 1))
        if side**2 == len(positions) - 1:
            facts["patches"] = (side, side)
    layers = [int(found[1]) for name in tensors if (found := re.match(r"encoder\.layers\.(\d+)\.", name))]
    if layers:
        facts["num_hidden_layers"] = max(layers) + 1
    fully = tensors.get("encoder.layers.0.mlp.fc1.weight")
    if fully is not None:
        facts["intermediate_size"] = fully.shape[0]
    return facts


def check_architecture(source: Source, said: Facts, shown: Facts, own: Facts) -> None:
    """Raises ConfigError that names everything that differs from the model's tower."""
    differing = [
        f"{name} {_shown(found[name])} ({where}), the model has {_shown(own[name])}"
        for name in own
        for where, found in (("its config", said), ("its weights", shown))
        if name in found and not _same(found[name], own[name])
    ]
    if not differing:
        return
    raise ConfigError(
        f"the vision tower {source.name!r} does not fit the model: {'; '.join(dict.fromkeys(differing))}. "
        f"{_mend({text.split()[0] for text in differing})}"
    )


def _mend(names: set[str]) -> str:
    if names <= set(_SIZES):
        return (
            "Expected the model's own size. With vision_tower_resolution=source the model, if it is a LLaVA, sees pictures of the "
            "tower's size instead (as published for FARE and TeCoA: fewer image tokens, the projector as it is)"
        )
    if names == {"hidden_act"}:
        return (
            "Expected the same activation: weights fine-tuned from OpenAI's need quick_gelu. If the source's config is wrong, give "
            "its .safetensors file itself, which says nothing of it"
        )
    return "Expected a tower that was fine-tuned from the model's own architecture"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def check_tensors(source: Source, tensors: Tensors, own: Mapping[str, torch.Tensor], resized: bool) -> None:
    """Raises ConfigError for tensors that are missing, left over, of another shape or not finite.

    own: the model's tensors by canonical name; resized: the position embedding may have another length.
    """
    name = source.name
    if missing := sorted(set(own) - set(tensors) - OPTIONAL):
        raise ConfigError(
            f"the vision tower {name!r} lacks {_some(missing)}; expected all tensors of a CLIPVisionModel"
        )
    if extra := sorted(set(tensors) - set(own)):
        raise ConfigError(
            f"the vision tower {name!r} has {_some(extra)}, which the model's has not; expected none left over"
        )
    for key, tensor in tensors.items():
        first = 1 if resized and key == "embeddings.position_embedding.weight" else 0
        if tensor.shape[first:] != own[key].shape[first:]:
            raise ConfigError(
                f"the vision tower {name!r} has {key} of shape {tuple(tensor.shape)}; expected {tuple(own[key].shape)}"
            )
        if not tensor.is_floating_point():
            raise ConfigError(
                f"the vision tower {name!r} has {key} in {tensor.dtype}; expected floating point weights, not quantised ones"
            )
        if not torch.isfinite(tensor).all():
            raise ConfigError(
                f"the vision tower {name!r} has {int((~torch.isfinite(tensor)).sum())} values in {key} that are not finite; expected "
                "none: the file is damaged, or its training diverged"
            )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def _pair(value: Any) -> tuple[int, int]:
    both = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(both) != 2 or not all(isinstance(side, int) and side > 0 for side in both):
        raise ValueError(f"a size of {value!r}")
    return both


def _shown(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)
