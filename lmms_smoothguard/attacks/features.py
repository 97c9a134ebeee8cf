"""What a model makes of pictures before its language model reads them: projected image tokens, whatever the architecture."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from lmms_smoothguard.errors import AttackError


def image_features(model: Any, inputs: Mapping[str, Any], rows: int) -> torch.Tensor:
    """(rows, tokens, width): the image tokens that each row's language model is given, those of all its pictures.

    inputs: pixels and whatever else the model reads them with (sizes, grids, masks, a Q-Former's question). All rows have
    pictures of the same sizes, so they have equally many tokens. Architectures return them as one tensor, a list or tuple
    of tensors a picture, or inside an output object. Qwen3-VL's deep-stack features are not among them.

    Raises AttackError for a model without `get_image_features`, such as Mllama, whose pictures are seen by cross-attention.
    """
    method = getattr(model, "get_image_features", None)
    if method is None:
        raise AttackError(
            f"{type(model).__name__} has no get_image_features: there are no image tokens before its language model. Expected "
            "a model that projects its pictures to tokens, such as LLaVA, Qwen-VL, InternVL, Idefics 3 or PaliGemma"
        )
    wanted = _arguments(model)
    found = method(**{name: value for name, value in inputs.items() if name in wanted})
    found = getattr(found, "pooler_output", found)
    parts = [found] if isinstance(found, torch.Tensor) else found
    if not isinstance(parts, list | tuple) or not parts or not all(isinstance(part, torch.Tensor) for part in parts):
        raise AttackError(
            f"{type(model).__name__}.get_image_features gave a {type(found).__name__}; expected tensors of image tokens"
        )
    tokens = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    if len(tokens) % rows:
        raise AttackError(
            f"{type(model).__name__} makes {len(tokens)} image tokens of {rows} rows; expected equally many a row"
        )
    return tokens.view(rows, -1, tokens.shape[-1]).float()


def _arguments(model: Any) -> set[str]:
    """What `get_image_features` takes; where it only passes keywords on, also what the inner model's takes, and Pixtral's
    image_sizes, which transformers up to 5.17 named in `forward` alone."""
    parameters = inspect.signature(model.get_image_features).parameters
    names, inner = set(parameters), getattr(getattr(model, "model", None), "get_image_features", None)
    if inner is not None and any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        names |= set(inspect.signature(inner).parameters)
        names |= {"image_sizes"} & set(inspect.signature(model.forward).parameters)
    return names


def text_feature(model: Any, processor: Any, text: str) -> torch.Tensor:
    """(width,): the mean of the language model's input embeddings of a text's tokens.

    Where images and texts share no contrastively trained space, a picture whose tokens point the same way need not mean the
    same: a weak target. Raises AttackError for a text without tokens.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise AttackError(f"{type(processor).__name__} has no tokenizer; expected the model's whole processor")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise AttackError(
            f"attack target_text is {text!r}, which has no tokens; expected words of the model's vocabulary"
        )
    with torch.no_grad():
        embedded: torch.Tensor = model.get_input_embeddings()(torch.tensor(ids, device=model.device))
    return embedded.float().mean(0)
