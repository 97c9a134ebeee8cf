"""Models that take channels first: one image, its tiles, or its crops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiny_models.architecture import (
    NORMALISED,
    PATCH,
    PINPOINTS,
    SIDE,
    SQUARE,
    VISION,
    Architecture,
    Row,
    text_config,
    tokenizer,
)
from tiny_models.tiled_common import CLIP, CROP, GRID, PAGE, SAM, SIGLIP, made
from tiny_models.tiled_gemmas import GEMMAS
from tiny_models.tiled_kin import KIN
from tiny_models.tiled_whole import WHOLE


def vipllava() -> tuple[Any, Any]:
    """CLIP, a square centre crop; features of several layers side by side."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tok = tokenizer("<image>")
    processor = LlavaProcessor(
        CLIPImageProcessor(**CROP), tok, patch_size=PATCH, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    model = made(
        "VipLlava", tok, vision_config=CLIP, text_config={"model_type": "llama", **text_config(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"), vision_feature_layer=[-2, -1],
    )  # fmt: skip
    return model, processor


def llava_next_video() -> tuple[Any, Any]:
    """Pictures as in LLaVA-NeXT: CLIP on anyres tiles."""
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    tok = tokenizer("<image>", "<video>")
    processor = LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**CROP), LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **CROP), tok,
        patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    model = made(
        "LlavaNextVideo", tok, vision_config=CLIP, text_config={"model_type": "llama", **text_config(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"), video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1,
    )  # fmt: skip
    return model, processor


def video_llava() -> tuple[Any, Any]:
    """CLIP, a square centre crop, under the key pixel_values_images; stills and videos have a tower each."""
    from transformers import VideoLlavaImageProcessor, VideoLlavaProcessor, VideoLlavaVideoProcessor

    tok = tokenizer("<image>", "<video>")
    processor = VideoLlavaProcessor(
        VideoLlavaImageProcessor(**CROP), VideoLlavaVideoProcessor(**CROP), tok, patch_size=PATCH
    )
    model = made(
        "VideoLlava", tok, vision_config=CLIP, text_config={"model_type": "llama", **text_config(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"), video_token_index=tok.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
    )  # fmt: skip
    return model, processor


def _got(kind: str, tok: Any, image: str) -> Any:
    return made(
        kind, tok, model="GotOcr2ForConditionalGeneration", vision_config=SAM,
        text_config={"model_type": "qwen2", **text_config(tok)}, image_token_index=tok.convert_tokens_to_ids(image),
        image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip


def got_ocr2() -> tuple[Any, Any]:
    """A windowed SAM encoder; crops or pages follow each other in one tensor without a tile dimension."""
    from transformers import GotOcr2ImageProcessor, GotOcr2Processor

    tok = tokenizer("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>")
    processor = GotOcr2Processor(GotOcr2ImageProcessor(size=PAGE, **NORMALISED), tok)
    return _got("GotOcr2", tok, "<imgpad>"), processor


def _ask_got(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Pages of a request are one group of image tokens."""
    texts = [f"<|im_start|>user\n<img><imgpad></img>\n{text}<|im_end|><|im_start|>assistant\n" for _, text in rows]
    pages = [list(pictures) for pictures, _ in rows]
    made = processor(
        images=pages, text=texts, multi_page=True, num_image_tokens=4, padding=True, return_tensors="pt"
    )  # fmt: skip
    return dict(made)


def pp_chart2table() -> tuple[Any, Any]:
    """GOT-OCR on whole pictures; the chat template, not the processor, writes a picture's tokens."""
    from transformers import PPChart2TableImageProcessor, PPChart2TableProcessor

    tok = tokenizer("<img>", "</img>", "<imgpad>")
    processor = PPChart2TableProcessor(PPChart2TableImageProcessor(size=PAGE, **NORMALISED), tok)
    return _got("PPChart2Table", tok, "<imgpad>"), processor


def qianfan_ocr() -> tuple[Any, Any]:
    """InternVL's crops without a tile dimension, a tower of its own."""
    from transformers import GotOcr2ImageProcessor, QianfanOCRProcessor

    tok = tokenizer("<image>", start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
    tokens = (GRID // 2) ** 2
    processor = QianfanOCRProcessor(
        GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4, **NORMALISED), tok, image_seq_length=tokens
    )
    model = made(
        "QianfanOCR", tok, vision_config=VISION,
        text_config={"model_type": "qwen3", **text_config(tok, head_dim=16)},
        image_token_id=tok.context_image_token_id, image_seq_length=tokens,
    )  # fmt: skip
    return model, processor


_COHERE = {"model_type": "cohere2", "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}


def aya_vision() -> tuple[Any, Any]:
    """GOT-OCR's crops without a tile dimension, each introduced by its number."""
    from transformers import AyaVisionProcessor, GotOcr2ImageProcessor

    tok = tokenizer(
        "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE"
    )
    processor = AyaVisionProcessor(
        GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4, **NORMALISED), tok, patch_size=PATCH,
        img_size=SIDE, downsample_factor=2,
    )  # fmt: skip
    model = made(
        "AyaVision", tok, vision_config=SIGLIP, text_config={**_COHERE, **text_config(tok)},
        image_token_index=processor.image_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


def cohere2_vision() -> tuple[Any, Any]:
    """Crops without a tile dimension."""
    from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor

    tok = tokenizer(
        boi_token="<|START_OF_IMG|>", eoi_token="<|END_OF_IMG|>", image_token="<|IMG_PATCH|>",
        img_line_break_token="<|IMG_LINE_BREAK|>",
    )  # fmt: skip
    processor = Cohere2VisionProcessor(
        Cohere2VisionImageProcessor(size=SQUARE, max_patches=4, patch_size=GRID // 2, **NORMALISED), tok
    )
    model = made(
        "Cohere2Vision", tok, vision_config=SIGLIP, text_config={**_COHERE, **text_config(tok)},
        image_token_id=tok.image_token_id, alignment_intermediate_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


_PIXTRAL = {"model_type": "pixtral", "head_dim": 16, **VISION, "image_size": 2 * SIDE}


def _pixtral(kind: str, **text: Any) -> tuple[Any, Any]:
    from transformers import PixtralImageProcessor, PixtralProcessor

    tok = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size=PATCH, **NORMALISED), tok, patch_size=PATCH,
        spatial_merge_size=2,
    )  # fmt: skip
    model = made(
        kind, tok, vision_config=_PIXTRAL, text_config=text_config(tok, **text),
        image_token_index=processor.image_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


def mistral3() -> tuple[Any, Any]:
    """Pixtral: pictures of their own sizes, padded to the largest of the batch; image_sizes tell what is padding."""
    return _pixtral("Mistral3", model_type="mistral", head_dim=16)


def mistral_large4() -> tuple[Any, Any]:
    """Pixtral in front of latent attention with an indexer."""
    return _pixtral(
        "MistralLarge4", moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, index_topk=512, index_head_dim=16, index_n_heads=2,
    )  # fmt: skip


def lighton_ocr() -> tuple[Any, Any]:
    """Pixtral without tokens at the ends of lines."""
    from transformers import LightOnOcrProcessor, PixtralImageProcessor

    tok = tokenizer(image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>")
    processor = LightOnOcrProcessor(
        PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size=2 * PATCH, **NORMALISED), tok,
        patch_size=PATCH, spatial_merge_size=2,
    )  # fmt: skip
    model = made(
        "LightOnOcr", tok, vision_config=_PIXTRAL,
        text_config={"model_type": "qwen3", **text_config(tok, head_dim=16)}, image_token_id=tok.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


def idefics2() -> tuple[Any, Any]:
    """Quarters and the whole, all of a row's pictures behind each other; their own sizes, with a mask of the padding."""
    from transformers import Idefics2ImageProcessor, Idefics2Processor

    tok = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    processor = Idefics2Processor(
        Idefics2ImageProcessor(
            size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE}, do_image_splitting=True, **NORMALISED
        ),
        tok,
        image_seq_len=4,
    )
    model = made(
        "Idefics2", tok, 12.0, vision_config={**VISION, "image_size": 2 * SIDE},
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 16, "num_key_value_heads": 2,
        },
        text_config={"model_type": "mistral", **text_config(tok, head_dim=16)}, image_token_id=processor.image_token_id,
    )  # fmt: skip
    return model, processor


def granite_docling() -> tuple[Any, Any]:
    """Tiles and the whole, a row's pictures behind each other; the mask tells real tiles from padding, no pixels."""
    from transformers import GraniteDoclingImageProcessor, GraniteDoclingProcessor

    tok = tokenizer(
        "<fake_token_around_image>", "<image>", "<global-img>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    )  # fmt: skip
    tokens = (GRID // 2) ** 2
    processor = GraniteDoclingProcessor(
        GraniteDoclingImageProcessor(size=SQUARE, max_patches=4, **NORMALISED), tok, image_seq_len=tokens
    )
    model = made(
        "GraniteDocling", tok,
        vision_config={**VISION, "out_hidden_size": 32, "scale_factor": 2, "deepstack_visual_indexes": [0]},
        text_config=text_config(tok, embedding_multiplier=1.0, logits_scaling=1.0, residual_multiplier=1.0,
                                attention_multiplier=0.25),
        image_token_id=processor.image_token_id, pad_token_id=tok.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


def granite4_vision() -> tuple[Any, Any]:
    """LLaVA-NeXT's tiles, their features added in several layers of the language model."""
    from transformers import Granite4VisionProcessor, LlavaNextImageProcessor

    tok = tokenizer("<image>")
    processor = Granite4VisionProcessor(
        LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **CROP), tok, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, downsample_rate="1/2",
    )  # fmt: skip
    model = made(
        "Granite4Vision", tok, vision_config={**CLIP, "hidden_size": 64},
        text_config=text_config(tok, num_hidden_layers=5, attention_multiplier=0.25),
        qformer_config={
            "model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 64,
            "cross_attention_frequency": 1, "use_qformer_text_input": False,
        },
        image_token_index=processor.image_token_id, image_grid_pinpoints=PINPOINTS, downsample_rate="1/2",
        deepstack_layer_map=[[1, 0]], spatial_target_layers=[1, 2, 3, 4],
    )  # fmt: skip
    return model, processor


def aria() -> tuple[Any, Any]:
    """The longer side is 980 pixels, the rest padding, which pixel_mask tells; large patches keep it small."""
    from transformers import AriaImageProcessor, AriaProcessor

    tok = tokenizer(image_token="<|img|>")
    processor = AriaProcessor(AriaImageProcessor(**NORMALISED), tok, size_conversion={980: 4})
    model = made(
        "Aria", tok,
        vision_config={"model_type": "idefics3_vision", **VISION, "image_size": 980, "patch_size": 140},
        text_config=text_config(tok, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        projector_patch_to_query_dict={49: 4}, image_token_index=tok.image_token_id,
    )  # fmt: skip
    return model, processor


KINDS: tuple[Architecture, ...] = (
    *KIN,
    *WHOLE,
    *GEMMAS,
    Architecture("vipllava", vipllava, "<image>"),
    Architecture("llava_next_video", llava_next_video, "<image>"),
    Architecture("video_llava", video_llava, "<image>"),
    Architecture("got_ocr2", got_ocr2, "<imgpad>", mixed=False, ask=_ask_got),
    Architecture("pp_chart2table", pp_chart2table, "<img><imgpad><imgpad><imgpad><imgpad></img>"),
    Architecture("qianfan_ocr", qianfan_ocr, "<image>"),
    Architecture("aya_vision", aya_vision, "<image>"),
    Architecture("cohere2_vision", cohere2_vision, "<|IMG_PATCH|>"),
    Architecture("mistral3", mistral3, "[IMG]"),
    Architecture("lighton_ocr", lighton_ocr, "<|image_pad|>"),
    Architecture("mistral_large4", mistral_large4, "[IMG]"),
    Architecture("idefics2", idefics2, "<image>", nested=True),
    Architecture("granite_docling", granite_docling, "<image>", nested=True),
    Architecture("granite4_vision", granite4_vision, "<image>"),
    Architecture("aria", aria, "<|img|>"),
)
