"""Models that take channels first, their pictures in two tensors or in tiles of several sorts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tiny_models.architecture import NORMALISED, PATCH, SIDE, SQUARE, VISION, Architecture, Row, text_config, tokenizer
from tiny_models.tiled_common import GRID, PAGE, SAM, SIGLIP, made


def deepseek_vl() -> tuple[Any, Any]:
    """The whole picture, padded to a square."""
    from transformers import DeepseekVLImageProcessor, DeepseekVLProcessor

    tok = tokenizer(image_token="<image_placeholder>")
    processor = DeepseekVLProcessor(DeepseekVLImageProcessor(size=SQUARE, **NORMALISED), tok, num_image_tokens=GRID**2)
    model = made(
        "DeepseekVL", tok, vision_config=SIGLIP, text_config={"model_type": "llama", **text_config(tok)},
        image_token_id=tok.image_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


def deepseek_vl_hybrid() -> tuple[Any, Any]:
    """Every picture twice: small in pixel_values, large in high_res_pixel_values, each with its own mean and std."""
    from transformers import DeepseekVLHybridImageProcessor, DeepseekVLHybridProcessor

    tok = tokenizer(image_token="<image_placeholder>")
    large = {f"high_res_{name}": value for name, value in NORMALISED.items()}
    processor = DeepseekVLHybridProcessor(
        DeepseekVLHybridImageProcessor(size=SQUARE, high_res_size=PAGE, **NORMALISED, **large), tok,
        num_image_tokens=GRID**2,
    )  # fmt: skip
    model = made(
        "DeepseekVLHybrid", tok, vision_config=SIGLIP, text_config={"model_type": "llama", **text_config(tok)},
        high_res_vision_config={"model_type": "sam_vision_model", **SAM}, image_token_id=tok.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    model.model.high_res_vision_alpha.data.fill_(1.0)  # zero, until weights are loaded
    return model, processor


_MOE = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip


def deepseek_ocr2() -> tuple[Any, Any]:
    """The whole pictures in pixel_values, the tiles of all of them in pixel_values_local, counted in num_local_patches.

    The model answers with 144 features a view, so patches are two pixels wide.
    """
    from transformers import DeepseekOcr2ImageProcessor, DeepseekOcr2Processor

    tok = tokenizer(image_token="<image>")
    processor = DeepseekOcr2Processor(
        DeepseekOcr2ImageProcessor(size={"height": 96, "width": 96}, tile_size=96, **NORMALISED), tok, patch_size=2
    )
    model = made(
        "DeepseekOcr2", tok,
        vision_config={
            "sam_config": {**SAM, "image_size": 96, "patch_size": 2, "window_size": 14, "downsample_channels": [16, 32]},
            "encoder_config": {
                "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": 8,
            },
        },
        text_config=text_config(tok, **_MOE), image_token_id=tok.image_token_id,
    )  # fmt: skip
    return model, processor


def unlimited_ocr() -> tuple[Any, Any]:
    """As DeepSeek-OCR 2, seen by a SAM and a CLIP; patches_grid tells how tiles lie."""
    from transformers import UnlimitedOcrImageProcessor, UnlimitedOcrProcessor

    tok = tokenizer(image_token="<image>")
    processor = UnlimitedOcrProcessor(
        UnlimitedOcrImageProcessor(size=PAGE, tile_size=SIDE, min_patches=2, max_patches=4, **NORMALISED), tok,
        patch_size=PATCH,
    )  # fmt: skip
    model = made(
        "UnlimitedOcr", tok,
        vision_config={
            "sam_config": {**SAM, "downsample_channels": [16, 32]},
            "encoder_config": {**VISION, "image_size": 2 * PATCH},
        },
        text_config=text_config(tok, **_MOE), image_token_id=tok.image_token_id,
    )  # fmt: skip
    return model, processor


def llama4() -> tuple[Any, Any]:
    """Tiles and the whole without a tile dimension, in bfloat16."""
    from transformers import Llama4ImageProcessor, Llama4Processor

    tok = tokenizer(
        "<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"
    )
    processor = Llama4Processor(Llama4ImageProcessor(size=SQUARE, max_patches=4, **NORMALISED), tok, patch_size=PATCH)
    model = made(
        "Llama4", tok,
        vision_config={
            **VISION, "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32, "vision_feature_select_strategy": "default",
        },
        text_config=text_config(tok, head_dim=16, intermediate_size_mlp=64, num_local_experts=4),
        image_token_index=tok.convert_tokens_to_ids("<|patch|>"),
    )  # fmt: skip
    return model, processor


def _ask_llama4(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """The pixels in the model's type, as its users cast them."""
    texts = [f"<s>{'<|image|>' * len(pictures)}{text}" for pictures, text in rows]
    pictures = [picture for pictures, _ in rows for picture in pictures]
    made = processor(images=pictures or None, text=texts, padding=True, return_tensors="pt")
    return dict(made.to(dtype=torch.float32))


def ovis2() -> tuple[Any, Any]:
    """The whole and crops without a tile dimension; every patch becomes a mixture of visual words."""
    from transformers import Ovis2ImageProcessor, Ovis2Processor

    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tok = tokenizer("<image>", "<IMG_ATOM>", *indicators)
    processor = Ovis2Processor(
        Ovis2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4, **NORMALISED), tok,
        image_seq_length=(GRID // 2) ** 2,
    )  # fmt: skip
    model = made(
        "Ovis2", tok, vision_config={**VISION, "hidden_stride": 2, "vocab_size": 69},
        text_config={"model_type": "qwen2", **text_config(tok)},
        image_token_id=tok.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tok.convert_tokens_to_ids(indicators), vocab_size=len(tok), hidden_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


def janus() -> tuple[Any, Any]:
    """The whole picture, padded to a square."""
    from transformers import JanusImageProcessor, JanusProcessor

    tok = tokenizer(
        image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>"
    )  # fmt: skip
    processor = JanusProcessor(JanusImageProcessor(size=SQUARE, **NORMALISED), tok, num_image_tokens=GRID**2)
    model = made(
        "Janus", tok,
        vision_config={**VISION, "mlp_ratio": 2.0, "projection_dim": 32, "num_image_tokens": GRID**2},
        vq_config={
            "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
            "num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32,
        },
        text_config={"model_type": "llama", **text_config(tok)}, image_token_id=tok.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_SIGHTS = ("<|VISION_START|>", "<|VISION_END|>", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>")


def cohere_compass() -> tuple[Any, Any]:
    """Qwen3-VL's packed patches in front of a Cohere 2."""
    from transformers import CohereCompassImageProcessor, CohereCompassProcessor, CohereCompassVideoProcessor

    tok = tokenizer(*_SIGHTS)
    start, end, image, video = tok.convert_tokens_to_ids(list(_SIGHTS))
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    processor = CohereCompassProcessor(
        CohereCompassImageProcessor(**patches, min_pixels=SIDE**2, max_pixels=4 * SIDE**2, **NORMALISED), tok,
        CohereCompassVideoProcessor(**patches),
    )  # fmt: skip
    model = made(
        "CohereCompass", tok,
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config=text_config(tok, sliding_window=24, layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}, "full_attention": None}),
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    return model, processor


def molmo2() -> tuple[Any, Any]:
    """Overlapping crops as (crops, patches, pixels of a patch), channels last; image_token_pooling numbers patches of the
    whole batch."""
    from transformers import Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

    names = {
        "image_patch_id": "<im_patch>", "image_start_token_id": "<im_start>", "image_end_token_id": "<im_end>",
        "low_res_image_start_token_id": "<low_res_im_start>", "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }  # fmt: skip
    tok = tokenizer("<|image|>", "<|video|>", "<im_col>", "<im_low>", *names.values())
    processor = Molmo2Processor(
        Molmo2ImageProcessor(size=SQUARE, max_crops=4, overlap_margins=[1, 1], patch_size=PATCH, **NORMALISED),
        Molmo2VideoProcessor(size=SQUARE, patch_size=PATCH), tok,
    )  # fmt: skip
    heads = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    model = made(
        "Molmo2", tok,
        vision_config={
            **heads, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": [SIDE, SIDE], "patch_size": PATCH,
        },
        adapter_config={**heads, "intermediate_size": 64, "text_hidden_size": 32, "vision_feature_layer": [1, 0]},
        text_config=text_config(tok, head_dim=16, additional_vocab_size=8),
        **{name: tok.convert_tokens_to_ids(token) for name, token in names.items()},
    )  # fmt: skip
    return model, processor


def nemotron_h_omni() -> tuple[Any, Any]:
    """Packed patches of single frames, (patches, channels * patch * patch) in reading order, sizes in image_grid_hw."""
    from transformers import (
        NemotronH_Omni_Reasoning_V3ImageProcessor,
        NemotronH_Omni_Reasoning_V3Processor,
        NemotronH_Omni_Reasoning_V3VideoProcessor,
        ParakeetFeatureExtractor,
    )

    tok = tokenizer("<image>", "<video>", "<img>", "</img>", "<so_embedding>", "<so_start>", "<so_end>")
    processor = NemotronH_Omni_Reasoning_V3Processor(
        NemotronH_Omni_Reasoning_V3ImageProcessor(
            patch_size=PATCH, min_num_patches=16, max_num_patches=64, **NORMALISED
        ),
        NemotronH_Omni_Reasoning_V3VideoProcessor(),
        tok,
        ParakeetFeatureExtractor(),
    )
    model = made(
        "NemotronH_Omni_Reasoning_V3_", tok, model="NemotronH_Omni_Reasoning_V3",
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH,
            "max_img_size": 8 * SIDE, "num_cls_tokens": 1, "num_registers": 1, "summary_idxs": [0],
            "video_temporal_patch_size": 2,
        },
        text_config={
            **{name: value for name, value in text_config(tok).items() if name != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "full_attention", "mlp"], "head_dim": 16,
            "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
            "use_mamba_kernels": False,
        },
        vision_hidden_size=32, projector_hidden_size=32, image_token_id=tok.convert_tokens_to_ids("<image>"),
        video_token_id=tok.convert_tokens_to_ids("<video>"), audio_token_id=tok.convert_tokens_to_ids("<so_embedding>"),
    )  # fmt: skip
    return model, processor


def phi4_multimodal() -> tuple[Any, Any]:
    """The whole and tiles, all-zero ones fill up, in image_pixel_values; image_attention_mask is one of patches.

    A view is always 32 x 32 patches, which are two pixels wide here.
    """
    from transformers import Phi4MultimodalFeatureExtractor, Phi4MultimodalImageProcessor, Phi4MultimodalProcessor

    tok = tokenizer(image_token="<|endoftext10|>", audio_token="<|endoftext11|>")
    processor = Phi4MultimodalProcessor(
        Phi4MultimodalImageProcessor(size={"height": 64, "width": 64}, patch_size=2, dynamic_hd=4, **NORMALISED),
        Phi4MultimodalFeatureExtractor(), tok,
    )  # fmt: skip
    model = made(
        "Phi4Multimodal", tok, 20.0, model="Phi4MultimodalForCausalLM", **text_config(tok, max_position_embeddings=8192),
        vision_config={
            **VISION, "num_hidden_layers": 3, "image_size": 64, "crop_size": 64, "patch_size": 2,
            "image_token_id": tok.image_token_id,
        },
        audio_config={
            "hidden_size": 32, "intermediate_size": 64, "num_blocks": 1, "num_attention_heads": 2,
            "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8,
            "audio_token_id": tok.audio_token_id,
        },
    )  # fmt: skip
    for parameter in model.model.embed_tokens_extend.image_embed.img_processor.parameters():
        if parameter.ndim > 1:
            parameter.data.div_(20.0)  # the tower's are large enough as they are
    return model, processor


KIN: tuple[Architecture, ...] = (
    Architecture("deepseek_vl", deepseek_vl, "<image_placeholder>"),
    Architecture("deepseek_vl_hybrid", deepseek_vl_hybrid, "<image_placeholder>"),
    Architecture("deepseek_ocr2", deepseek_ocr2, "<image>"),
    Architecture("unlimited_ocr", unlimited_ocr, "<image>"),
    Architecture("llama4", llama4, "<|image|>", ask=_ask_llama4),
    Architecture("ovis2", ovis2, "<image>"),
    Architecture("janus", janus, "<image_placeholder>"),
    Architecture("cohere_compass", cohere_compass, "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"),
    Architecture("molmo2", molmo2, "<|image|>"),
    Architecture("nemotron_h_omni", nemotron_h_omni, "<image>"),
    Architecture("phi4_multimodal", phi4_multimodal, "<|endoftext10|>"),
)
