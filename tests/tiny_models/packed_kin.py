"""Models whose packed patches lie otherwise than Qwen-VL's, or come with other processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tiny_models.architecture import NORMALISED, PATCH, SIDE, Architecture, Row, finish, text_config, tokenizer

_AREA = {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
_TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "patch_size": PATCH}  # fmt: skip
_QWEN_NAMES = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}


def _mrope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10000.0, **more}}


def _ids(tok: Any, *names: str) -> dict[str, int]:
    """A config's ids of the tokens that the tokenizer knows by these names."""
    return {f"{name}_id": getattr(tok, f"{name}_id") for name in names}


_STILL = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 1}


def dots3_note() -> tuple[Any, Any]:
    """Patches of one frame only: the tower has no temporal size."""
    import transformers

    tok = tokenizer("<|img|>", "<|imgpad|>", "<|endofimg|>", "<|video_pad|>", "<|audio_comp_pad|>")
    processor = transformers.Dots3NoteProcessor(
        transformers.Qwen2VLImageProcessor(size=_AREA, **_STILL, **NORMALISED),
        tok,
        transformers.Qwen2VLVideoProcessor(**_STILL),
        transformers.Dots3NoteFeatureExtractor(feature_size=16),
    )
    text = text_config(
        tok, moe_intermediate_size=32, shared_experts_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, head_dim=16, index_topk=64,
        index_head_dim=16, index_n_heads=2, use_sliding_window=False,
    )  # fmt: skip
    config = transformers.Dots3NoteConfig(
        text_config=text,
        vision_config=_TRANSFORMER | {
            "moe_intermediate_size": 32, "adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "dense"],
        },
        audio_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "feature_size": 16,
            "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 32,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        audio_token_id=processor.audio_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    return finish(lambda: transformers.Dots3NoteForConditionalGeneration(config), tok), processor


def ernie4_5_vl_moe() -> tuple[Any, Any]:
    """Patches of one frame; experts of their own for the tokens of pictures."""
    import transformers

    tok = tokenizer(
        image_token="<|IMAGE_PLACEHOLDER|>", image_start_token="<|IMAGE_START|>", image_end_token="<|IMAGE_END|>",
        video_token="<|VIDEO_PLACEHOLDER|>", video_start_token="<|VIDEO_START|>", video_end_token="<|VIDEO_END|>",
    )  # fmt: skip
    processor = transformers.Ernie4_5_VLMoeProcessor(
        transformers.Ernie4_5_VLMoeImageProcessor(size=_AREA, **_STILL, **NORMALISED),
        tok,
        transformers.Ernie4_5_VLMoeVideoProcessor(),
    )
    names = ("image_token_id", "image_start_token_id", "image_end_token_id", "video_token_id", "video_start_token_id",
             "video_end_token_id")  # fmt: skip
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config=text_config(
            tok, moe_intermediate_size=[32, 16], moe_k=2, moe_num_experts=4, moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"], **_mrope(3, 3, 2),
        ),
        vision_config={"depth": 2, "num_heads": 2, **_TRANSFORMER},
        tie_word_embeddings=False,
        **{name: getattr(tok, name) for name in names},
    )  # fmt: skip
    return finish(lambda: transformers.Ernie4_5_VLMoeForConditionalGeneration(config), tok), processor


def video_llama_3() -> tuple[Any, Any]:
    """Patches of one frame; a tensor of its own says by how much each picture's are merged."""
    import transformers

    tok = tokenizer(**_QWEN_NAMES)
    patches = _STILL | {"merge_size": 1}
    processor = transformers.VideoLlama3Processor(
        transformers.VideoLlama3ImageProcessor(size=_AREA, **patches, **NORMALISED),
        tok,
        transformers.VideoLlama3VideoProcessor(**patches),
    )
    config = transformers.VideoLlama3Config(
        text_config={"model_type": "qwen2", **text_config(tok)},
        vision_config=_TRANSFORMER,
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        tie_word_embeddings=False,
    )
    return finish(lambda: transformers.VideoLlama3ForConditionalGeneration(config), tok), processor


def paddleocr_vl() -> tuple[Any, Any]:
    """Each patch is a small picture (patches, channels, height, width), in rows of the whole picture."""
    import transformers

    tok = tokenizer("<|IMAGE_START|>", "<|IMAGE_END|>", image_token="<|IMAGE_PLACEHOLDER|>")
    processor = transformers.PaddleOCRVLProcessor(
        transformers.PaddleOCRVLImageProcessor(size=_AREA, **_STILL, **NORMALISED), tok
    )
    start, end = tok.convert_tokens_to_ids(["<|IMAGE_START|>", "<|IMAGE_END|>"])
    config = transformers.PaddleOCRVLConfig(
        text_config=text_config(tok, head_dim=16, **_mrope(2, 3, 3)),
        vision_config=_TRANSFORMER | {"image_size": SIDE},
        image_token_id=tok.image_token_id,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    return finish(lambda: transformers.PaddleOCRVLForConditionalGeneration(config), tok), processor


def hunyuan_vl() -> tuple[Any, Any]:
    """Patches of one frame in rows of the whole picture; tokens of their own end each row and the picture."""
    import transformers

    tok = tokenizer(image_token="<image>", image_start_token="<im_start>", image_end_token="<im_end>")
    processor = transformers.HunYuanVLProcessor(
        transformers.HunYuanVLImageProcessor(size=_AREA, **_STILL, **NORMALISED), tok
    )
    config = transformers.HunYuanVLConfig(
        text_config=text_config(tok, head_dim=16, **_mrope(2, 2, 2, 2)),
        vision_config=_TRANSFORMER | {"out_hidden_size": 32, "max_image_size": 2 * SIDE, "text_hidden_size": 32},
        image_token_id=tok.image_token_id,
        im_start_id=tok.image_start_token_id,
        im_end_id=tok.image_end_token_id,
        tie_word_embeddings=False,
    )
    return finish(lambda: transformers.HunYuanVLForConditionalGeneration(config), tok), processor


def lfm2_vl() -> tuple[Any, Any]:
    """Tiles of patches (tiles, patches, height * width * channels), padded to the largest; the channel comes last."""
    import transformers

    tok = tokenizer(
        "<|img_row_1_col_1|>", "<|img_row_1_col_2|>", "<|img_row_2_col_1|>", "<|img_row_2_col_2|>",
        image_token="<image>", image_start_token="<|image_start|>", image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )  # fmt: skip
    processor = transformers.Lfm2VlProcessor(
        transformers.Lfm2VlImageProcessor(
            encoder_patch_size=PATCH, tile_size=SIDE, min_tiles=2, max_tiles=4, min_image_tokens=2, max_image_tokens=4,
            **NORMALISED,
        ),
        tok,
    )  # fmt: skip
    config = transformers.Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model",
            "num_patches": 16,
            "vision_use_head": False,
            **_TRANSFORMER,
        },
        text_config={"model_type": "lfm2", **text_config(tok, layer_types=["conv", "full_attention"])},
        image_token_id=tok.image_token_id,
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )
    return finish(lambda: transformers.Lfm2VlForConditionalGeneration(config), tok), processor


def _gemma4(
    kind: str, vision: dict[str, Any], maker: str = "Gemma4", model: str = "ForConditionalGeneration",
    more: dict[str, Any] | None = None, **text: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Random weights would say tokens of media, which the model then takes for media that were not given."""
    import transformers

    tok = tokenizer(
        "<|video|>", boi_token="<|image>", eoi_token="<image|>", image_token="<|image|>", boa_token="<|audio>",
        eoa_token="<audio|>", audio_token="<|audio|>",
    )  # fmt: skip
    sizes = {"patch_size": PATCH // 2, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    processor = getattr(transformers, f"{maker}Processor")(
        getattr(transformers, f"{maker}AudioFeatureExtractor")(),
        getattr(transformers, f"{maker}ImageProcessor")(**sizes),
        tok,
        getattr(transformers, f"{maker}VideoProcessor")(**sizes),
    )
    if "hidden_size_per_layer_input" in text:
        text["vocab_size_per_layer_input"] = len(tok)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text_config(
            tok, head_dim=16, global_head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"],
            **text,
        ),
        vision_config={"patch_size": PATCH // 2, "pooling_kernel_size": 2, **vision},
        tie_word_embeddings=False,
        **_ids(tok, "boi_token", "eoi_token", "image_token"),
        **(more if more is not None else _ids(tok, "boa_token", "audio_token") | {"eoa_token_index": tok.eoa_token_id}),
    )  # fmt: skip
    made = finish(lambda: getattr(transformers, f"{kind}{model}")(config), tok)
    for name, parameter in made.named_parameters():
        if name.endswith("position_embedding_table"):  # ones, until weights are loaded: they would drown the picture
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    made.generation_config.suppress_tokens = [tok.image_token_id, tok.audio_token_id, processor.video_token_id]
    return made, processor


_GEMMA4_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64,
}  # fmt: skip


def gemma4() -> tuple[Any, Any]:
    """(images, patches, height * width * channels), not normalised; padding has position -1 and follows the patches."""
    return _gemma4("Gemma4", _GEMMA4_VISION, hidden_size_per_layer_input=8)


def gemma4_unified() -> tuple[Any, Any]:
    """The same with larger patches and no vision tower at all: a projection is all there is."""
    return _gemma4(
        "Gemma4Unified", {"mm_embed_dim": 32, "mm_posemb_size": 64, "output_proj_dims": 32}, maker="Gemma4Unified"
    )  # fmt: skip


def diffusion_gemma() -> tuple[Any, Any]:
    """Gemma 4's pictures; a block of the answer is denoised at a time, by a `generate` that is not transformers' common one."""
    vision = {"model_type": "gemma4_vision", **_GEMMA4_VISION}
    text = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    model, processor = _gemma4("DiffusionGemma", vision, model="ForBlockDiffusion", more={"canvas_length": 8}, **text)
    model.generation_config.return_dict_in_generate = False
    return model, processor


def kimi_k25() -> tuple[Any, Any]:
    """Each patch is a small picture (patches, channels, height, width); black margins fill the last patches."""
    import transformers

    tok = tokenizer(
        image_token="<|media_pad|>", video_token="<|kimi_k25_video_placeholder|>", vision_start_token="<|media_begin|>",
        vision_end_token="<|media_end|>",
    )  # fmt: skip
    processor = transformers.Kimi_K25Processor(
        transformers.Kimi_K25ImageProcessor(patch_size=PATCH, max_patches=64, **NORMALISED),
        tok,
        transformers.Kimi_K25VideoProcessor(patch_size=PATCH),
    )
    config = transformers.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **text_config(tok, first_k_dense_replace=1, **_EXPERTS, **_LATENT)},
        vision_config=_TRANSFORMER | {"pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=32,
        tie_word_embeddings=False,
        **_ids(tok, "image_token", "video_token", "vision_start_token", "vision_end_token"),
    )
    return finish(lambda: transformers.Kimi_K25ForConditionalGeneration(config), tok), processor


def minimax_m3_vl() -> tuple[Any, Any]:
    """Patches as Qwen-VL's, in front of experts; the processor sets the marks around a picture itself."""
    import transformers

    made = transformers.MiniMaxM3VLProcessor
    tok = tokenizer(made.IMAGE_TOKEN, made.VIDEO_TOKEN, made.VISION_START_TOKEN, made.VISION_END_TOKEN)
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    processor = made(
        transformers.MiniMaxM3VLImageProcessor(size=_AREA, **patches, **NORMALISED),
        tok,
        transformers.MiniMaxM3VLVideoProcessor(**patches),
    )
    config = transformers.MiniMaxM3VLConfig(
        text_config=text_config(
            tok, head_dim=16, rotary_dim=8, num_local_experts=4, num_experts_per_tok=2, dense_intermediate_size=64,
            shared_intermediate_size=32, intermediate_size=32, mlp_layer_types=["dense", "sparse"], index_n_heads=2,
            index_head_dim=16, layer_types=["full_attention", "full_attention"],
        ),
        vision_config=_TRANSFORMER | {"image_size": 2 * SIDE},
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        projector_hidden_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    return finish(lambda: transformers.MiniMaxM3SparseForConditionalGeneration(config), tok), processor


_DELTA_NET = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


def _minicpm(kind: str, maker: str | None = None, **settings: Any) -> tuple[Any, Any]:
    """All pictures of a request in one strip (1, channels, patch, patches * patch)."""
    import transformers

    tok = tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>", image_start_token="<image>", image_end_token="</image>",
        slice_start_token="<slice>", slice_end_token="</slice>", image_id_start_token="<image_id>",
        image_id_end_token="</image_id>",
    )  # fmt: skip
    maker = maker or kind
    slices = {"patch_size": PATCH, "scale_resolution": 2 * SIDE, "max_slice_nums": 4}
    processor = getattr(transformers, f"{kind}Processor")(
        getattr(transformers, f"{maker}ImageProcessor")(**slices, **NORMALISED),
        getattr(transformers, f"{maker}VideoProcessor")(**slices),
        tok,
    )
    sections = _mrope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5)
    config = getattr(transformers, f"{kind}Config")(
        text_config={"model_type": "qwen3_5_text", **text_config(tok, **_DELTA_NET, **sections)},
        vision_config=_TRANSFORMER | {"image_size": 2 * SIDE},
        insert_layer_id=0,
        tie_word_embeddings=False,
        **_ids(tok, "image_token", "video_token"),
        **settings,
    )
    if kind == "MiniCPMV4_7":
        names = ("image_start", "image_end", "slice_start", "slice_end")
        for name in names:
            setattr(config, f"{name}_id", getattr(tok, f"{name}_token_id"))
        config.newline_id = tok("\n", add_special_tokens=False)["input_ids"][-1]
    return finish(lambda: getattr(transformers, f"{kind}ForConditionalGeneration")(config), tok), processor


def minicpmv4_6() -> tuple[Any, Any]:
    """One strip a request; its first row alone is read, whatever the batch."""
    return _minicpm("MiniCPMV4_6")


def minicpmv4_7() -> tuple[Any, Any]:
    """The same, with positions of time, height and width."""
    return _minicpm("MiniCPMV4_7", "MiniCPMV4_6")


def minicpm_ocr() -> tuple[Any, Any]:
    """The same with four times as many tokens a picture."""
    return _minicpm("MiniCPMOcr")


def cosmos3_edge() -> tuple[Any, Any]:
    """Patches of one frame whose channel comes last."""
    import transformers

    tok = tokenizer(**_QWEN_NAMES)
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 1}
    processor = transformers.Cosmos3EdgeProcessor(
        transformers.Cosmos3EdgeImageProcessor(size=_AREA, **patches, **NORMALISED),
        tok,
        transformers.Qwen3VLVideoProcessor(**patches),
    )
    config = transformers.Cosmos3EdgeConfig(
        text_config=text_config(tok, head_dim=16, **_mrope(2, 3, 3)),
        vision_config=_TRANSFORMER | {"num_patches": 64},
        projector_hidden_size=64,
        tie_word_embeddings=False,
        **_ids(tok, *_QWEN_NAMES),
    )
    return finish(lambda: transformers.Cosmos3EdgeForConditionalGeneration(config), tok), processor


def _with_token_types(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """The token types are made only where they are asked for, and the model refuses pictures without."""
    texts = [f"<s>USER: {_QWEN * len(pictures)}\n{text} ASSISTANT:" for pictures, text in rows]
    flat = [picture for pictures, _ in rows for picture in pictures]
    made = processor(
        images=flat or None, text=texts, padding=True, return_tensors="pt", return_mm_token_type_ids=True
    )  # fmt: skip
    return dict(made)


def cosmos3_omni() -> tuple[Any, Any]:
    """Qwen3-VL's tower and language model; the processor is Qwen3-VL's."""
    import transformers

    tok = tokenizer(**_QWEN_NAMES)
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(size=_AREA, **patches, **NORMALISED),
        tok,
        transformers.Qwen3VLVideoProcessor(**patches),
    )
    vision = {
        "depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "hidden_size": 32, "out_hidden_size": 32,
        "intermediate_size": 64, "temporal_patch_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Cosmos3OmniConfig(
        text_config={"model_type": "qwen3_vl_text", **text_config(tok, head_dim=16, **_mrope(2, 3, 3))},
        vision_config=vision,
        tie_word_embeddings=False,
        **_ids(tok, *_QWEN_NAMES),
    )
    return finish(lambda: transformers.Cosmos3OmniForConditionalGeneration(config), tok), processor


def glm5_next() -> tuple[Any, Any]:
    """GLM-V's patches; a black margin fills the last ones. Recurrent layers, residual streams and experts."""
    import transformers

    tok = tokenizer(
        "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
        image_token="<|image|>", video_token="<|video|>",
    )  # fmt: skip
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    processor = transformers.Glm5NextProcessor(
        transformers.Glm5NextImageProcessor(min_image_tokens=4, max_image_tokens=16, **patches, **NORMALISED),
        tok,
        transformers.Glm5NextVideoProcessor(**patches),
    )
    vision = {
        "depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "hidden_size": 32, "out_hidden_size": 32,
        "intermediate_size": 64, "temporal_patch_size": 2, "image_size": SIDE, "projection_intermediate_size": 64,
    }  # fmt: skip
    text = text_config(
        tok, layer_types=["linear_attention", "indexed_attention"], mlp_layer_types=["dense", "sparse"],
        linear_head_dim=16, linear_num_heads=2, hc_mult=2, index_head_dim=16, index_n_heads=2, index_topk=64,
        **_EXPERTS, **_LATENT | {"qk_rope_head_dim": 0, "qk_nope_head_dim": 16},
    )  # fmt: skip
    marks = {"image_start": "<|begin_of_image|>", "image_end": "<|end_of_image|>", "video_start": "<|begin_of_video|>",
             "video_end": "<|end_of_video|>"}  # fmt: skip
    config = transformers.Glm5NextConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **_ids(tok, "image_token", "video_token"),
        **{f"{name}_token_id": tok.convert_tokens_to_ids(mark) for name, mark in marks.items()},
    )
    return finish(lambda: transformers.Glm5NextForConditionalGeneration(config), tok), processor


_STRIP = "<|image_pad|>"
_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"

KINDS: tuple[Architecture, ...] = (
    Architecture("dots3_note", dots3_note, "<|img|><|imgpad|><|endofimg|>"),
    Architecture("ernie4_5_vl_moe", ernie4_5_vl_moe, "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    Architecture("video_llama_3", video_llama_3, "<|image_pad|>"),
    Architecture("paddleocr_vl", paddleocr_vl, "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"),
    Architecture("hunyuan_vl", hunyuan_vl, "<im_start><image><im_end>"),
    Architecture("lfm2_vl", lfm2_vl, "<image>", nested=True),
    Architecture("gemma4", gemma4, "<|image|>", nested=True),
    Architecture("gemma4_unified", gemma4_unified, "<|image|>", nested=True),
    Architecture("diffusion_gemma", diffusion_gemma, "<|image|>", nested=True),
    Architecture("kimi_k25", kimi_k25, "<|media_begin|><|media_pad|><|media_end|>"),
    Architecture("minimax_m3_vl", minimax_m3_vl, "]<]image[>["),
    Architecture("minicpmv4_6", minicpmv4_6, _STRIP),
    Architecture("minicpmv4_7", minicpmv4_7, _STRIP),
    Architecture("minicpm_ocr", minicpm_ocr, _STRIP),
    Architecture("cosmos3_edge", cosmos3_edge, _QWEN, ask=_with_token_types),
    Architecture("cosmos3_omni", cosmos3_omni, _QWEN),
    Architecture("glm5_next", glm5_next, "<|begin_of_image|><|image|><|end_of_image|>"),
)
