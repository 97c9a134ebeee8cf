"""LLaVA, LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

from typing import Any

from tiny_models.architecture import NORMALISED, PATCH, PINPOINTS, SIDE, SQUARE, VISION, finish, text_config, tokenizer


def llava() -> tuple[Any, Any]:
    """CLIP, a square centre crop."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tok = tokenizer("<image>")
    image = tok.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE, **NORMALISED),
        tok,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", **text_config(tok)},
        image_token_index=image,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return finish(lambda: LlavaForConditionalGeneration(config), tok), processor


def llava_next() -> tuple[Any, Any]:
    """CLIP on anyres tiles."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tok = tokenizer("<image>")
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(
            size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS, **NORMALISED
        ),
        tok,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", **text_config(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return finish(lambda: LlavaNextForConditionalGeneration(config), tok), processor


def llava_onevision() -> tuple[Any, Any]:
    """SigLIP on anyres tiles; one tile a picture where a row has several."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tok = tokenizer("<image>", "<video>")
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS, **NORMALISED),
        tok,
        LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<video>",
    )
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        text_config={"model_type": "qwen2", **text_config(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return finish(lambda: LlavaOnevisionForConditionalGeneration(config), tok), processor
