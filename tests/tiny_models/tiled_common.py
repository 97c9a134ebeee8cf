"""What the recipes of `tiled` and its kin share."""

from __future__ import annotations

from typing import Any

from tiny_models.architecture import NORMALISED, PATCH, SIDE, SQUARE, VISION, finish

CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION}
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE, **NORMALISED}
PAGE = {"height": 2 * SIDE, "width": 2 * SIDE}
GRID = SIDE // PATCH
SAM = {
    "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 2 * SIDE,
    "patch_size": PATCH, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 64, "initializer_range": 0.02,
}  # fmt: skip


def made(kind: str, tok: Any, scale: float = 5.0, model: str = "", **config: Any) -> Any:
    """A model of the classes that `kind` begins the names of."""
    import transformers

    settings = getattr(transformers, f"{kind}Config")(**config)
    return finish(lambda: getattr(transformers, model or f"{kind}ForConditionalGeneration")(settings), tok, scale)
