"""Models whose pixels come as crops beside the picture, frames first, or as unpacked patches."""

from __future__ import annotations

from typing import Any

from tiny_models.architecture import NORMALISED, PATCH, SIDE, Architecture, finish, text_config, tokenizer

_TRANSFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "patch_size": PATCH}  # fmt: skip


def step3p7() -> tuple[Any, Any]:
    """The whole picture in one tensor, its crops in another (pixel_values_local), fewer or none for small pictures."""
    import transformers

    tok = tokenizer("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
    whole = 2 * SIDE
    processor = transformers.Step3p7Processor(
        transformers.Step3p7ImageProcessor(
            size={"height": whole, "width": whole}, patch_size=SIDE, max_image_size=2 * whole, **NORMALISED
        ),
        tok,
    )
    text = text_config(
        tok, head_dim=16, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, share_expert_dim=32,
        mlp_layer_types=["dense", "sparse"], layer_types=["sliding_attention", "full_attention"], sliding_window=24,
    )  # fmt: skip
    config = transformers.Step3p7Config(
        text_config=text,
        vision_config={**_TRANSFORMER, "mlp_ratio": 2.0, "image_size": whole, "max_position_embeddings": 64},
        image_token_id=processor.image_token_id,
        tie_word_embeddings=False,
    )
    return finish(lambda: transformers.Step3p7ForConditionalGeneration(config), tok), processor


_MUSE_TOKENS = (
    "<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>",
    "<|vid_end|>", "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>",
)  # fmt: skip


def _muse(kind: str, parts: dict[str, Any], text: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """The types share the image processor and the tower; `parts` are more parts of the processor."""
    import transformers

    tok = tokenizer(*_MUSE_TOKENS)
    patches = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    processor = getattr(transformers, f"{kind}Processor")(
        image_processor=transformers.MuseGlimmerImageProcessor(max_image_tokens=16, **patches, **NORMALISED),
        video_processor=transformers.MuseGlimmerVideoProcessor(**patches),
        tokenizer=tok,
        **parts,
    )
    vision = _TRANSFORMER | {"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text_config(tok, head_dim=16, sliding_window=24, **text),
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        out_hidden_size=128,
        projector_hidden_size=32,
        tie_word_embeddings=False,
        **settings,
    )
    return finish(lambda: getattr(transformers, f"{kind}ForConditionalGeneration")(config), tok), processor


def muse_glimmer() -> tuple[Any, Any]:
    """Patches in rows of the whole picture, their frames outside their channels."""
    return _muse("MuseGlimmer", {}, {})


def muse_spark() -> tuple[Any, Any]:
    """The same with experts, and ears."""
    import transformers

    text = {"moe_intermediate_size": 32, "moe_hidden_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    audio = {"hidden_sizes": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "out_hidden_size": 32}
    ears = {"feature_extractor": transformers.MuseSparkFeatureExtractor()}
    return _muse(
        "MuseSpark", ears, text, audio_config=audio, audio_token_id=tokenizer(*_MUSE_TOKENS).vocab["<|audio|>"]
    )


_INKLING_TEXT = {
    "head_dim": 16, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "sliding_window_size": 24, "d_rel": 4, "rel_extent": 64, "layer_types": ["hybrid_sliding", "hybrid"],
    "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def inkling_mm_model() -> tuple[Any, Any]:
    """Patches (patches, frames, height, width, channels) of a picture that is not resized, one token each; a margin below 0
    fills the last ones, and nothing but the prompt says how many patches a picture has."""
    import transformers

    tok = tokenizer("<|content_image|>", "<|content_audio_input|>", image_token="<|image|>", audio_token="<|audio|>")
    processor = transformers.InklingProcessor(
        transformers.InklingFeatureExtractor(),
        transformers.InklingImageProcessor(size={"height": 40, "width": 40}, **NORMALISED),
        tok,
    )
    text = text_config(tok, mlp_layer_types=["dense", "sparse"], logits_mup_width_multiplier=1.0, **_INKLING_TEXT)
    config = transformers.InklingConfig(
        text_config=text,
        vision_config={"text_hidden_size": 32, "patch_size": 40, "n_layers": 4},
        audio_config={"text_hidden_size": 32},
        image_token_id=tok.image_token_id,
        audio_token_id=tok.audio_token_id,
        image_bos_token_id=processor.image_bos_token_id,
        audio_bos_token_id=processor.audio_bos_token_id,
        tie_word_embeddings=False,
    )
    return finish(lambda: transformers.InklingForConditionalGeneration(config), tok, scale=12.0), processor


def inkling2() -> tuple[Any, Any]:
    """Patches (patches, height, width, channels) of a picture that is not resized, each merged of four; a margin below 0
    fills the last ones."""
    import transformers

    tok = tokenizer(image_token="<|image|>")
    processor = transformers.Inkling2Processor(
        transformers.Inkling2ImageProcessor(size={"height": 40, "width": 40}, **NORMALISED), tok
    )
    text = text_config(tok, **_INKLING_TEXT | {"n_layers_per_attn_res_block": 1})
    del text["intermediate_size"]
    config = transformers.Inkling2Config(
        text_config=text | {"unpadded_vocab_size": len(tok)},
        vision_config=_TRANSFORMER | {"patch_size": 20, "projection_hidden_dim": 32, "text_hidden_size": 32},
        image_token_id=tok.image_token_id,
        tie_word_embeddings=False,
    )
    return finish(lambda: transformers.Inkling2ForConditionalGeneration(config), tok), processor


KINDS: tuple[Architecture, ...] = (
    Architecture("step3p7", step3p7, "<im_patch>"),
    Architecture("muse_glimmer", muse_glimmer, "<|patch|>"),
    Architecture("muse_spark", muse_spark, "<|patch|>"),
    Architecture("inkling_mm_model", inkling_mm_model, "<|content_image|><|image|>"),
    Architecture("inkling2", inkling2, "<|image|>"),
)
