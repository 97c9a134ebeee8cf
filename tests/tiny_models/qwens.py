"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches, each picture at its own resolution."""

from __future__ import annotations

from typing import Any

from tiny_models.architecture import NORMALISED, PATCH, finish, text_config, tokenizer

_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, **more}}


def _build(model_class: Any, processor_class: Any, config_class: Any, vision: dict[str, Any], **text: Any) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tok = tokenizer(*_TOKENS)
    _, _, start, end, image, video = tok.convert_tokens_to_ids(list(_TOKENS))
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    processor = processor_class(
        image_processor=Qwen2VLImageProcessor(**patches, min_pixels=56 * 56, max_pixels=112 * 112, **NORMALISED),
        tokenizer=tok,
        video_processor=Qwen2VLVideoProcessor(**patches),
        chat_template=_TEMPLATE,
    )
    config = config_class(
        text_config=text_config(tok, **text),
        vision_config=_VISION | vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    return finish(lambda: model_class(config), tok), processor


def qwen2_vl() -> tuple[Any, Any]:
    """Full attention among the patches of a picture."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    vision = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "in_channels": 3}
    return _build(Qwen2VLForConditionalGeneration, Qwen2VLProcessor, Qwen2VLConfig, vision, **_rope())


def qwen2_5_vl() -> tuple[Any, Any]:
    """Windowed attention in the first layer: two windows a side."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    vision = {
        "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 56,
    }  # fmt: skip
    return _build(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2_5_VLConfig, vision, **_rope())


def qwen3_vl() -> tuple[Any, Any]:
    """Features of the first vision layer are added in the language model too (deepstack)."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    vision = {
        "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return _build(
        Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLConfig, vision,
        head_dim=16, **_rope(mrope_interleaved=True),
    )  # fmt: skip
