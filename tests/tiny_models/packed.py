"""Models that take packed patches, and kin of Qwen-VL and GLM-V."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tiny_models import packed_kin, packed_more
from tiny_models.architecture import NORMALISED, PATCH, SIDE, Architecture, Row, finish, text_config, tokenizer

_PATCHES = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
_AREA = {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "hidden_size": 32,
           "intermediate_size": 64}  # fmt: skip
_FRAMED = _VISION | {"out_hidden_size": 32, "temporal_patch_size": 2}
_LEARNT_POSITIONS = _FRAMED | {"num_position_embeddings": 64}
_DELTA_NET = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED_EXPERT = _EXPERTS | {"shared_expert_intermediate_size": 32}

QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
GLM = "<|begin_of_image|><|image|><|end_of_image|>"


def _rope(*sections: int, share: float = 1.0, **more: Any) -> dict[str, Any]:
    """Positions of time, height and width; `share` of each head is rotated."""
    parameters = {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10000.0, **more}
    return {"rope_parameters": parameters | ({"partial_rotary_factor": share} if share < 1 else {})}


def _named(name: str, ending: str) -> Any:
    import transformers

    return getattr(transformers, name + ending)


_QWEN_TOKENS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>", "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "audio_token": "<|audio_pad|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
}  # fmt: skip


_SOUND_TOKENS = (("", ""), ("start_", "bos_"), ("end_", "eos_"))


def _qwen(
    name: str, vision: dict[str, Any], text: dict[str, Any], processor: str = "Qwen3VLProcessor", scale: float = 5.0,
    model: str | None = None, parts: dict[str, Any] | None = None, **config: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """A type with the image processor and the tokens of Qwen-VL; `name` begins those of its classes, `parts` are more
    parts of its processor."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

    tok = tokenizer(**_QWEN_TOKENS)
    made = _named(processor, "")(
        image_processor=Qwen2VLImageProcessor(size=_AREA, **_PATCHES, **NORMALISED),
        tokenizer=tok,
        video_processor=Qwen3VLVideoProcessor(**_PATCHES),
        **(parts or {}),
    )
    if "audio_config" in config:
        config |= {f"audio_{part}token_id": getattr(tok, f"audio_{own}token_id") for part, own in _SOUND_TOKENS}
    settings = _named(name, "Config")(
        text_config=text_config(tok, **text),
        vision_config=vision,
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        vision_start_token_id=tok.vision_start_token_id,
        vision_end_token_id=tok.vision_end_token_id,
        tie_word_embeddings=False,
        **config,
    )
    return finish(lambda: _named(model or f"{name}ForConditionalGeneration", "")(settings), tok, scale), made


def qwen3_vl_moe() -> tuple[Any, Any]:
    """Deepstack as in Qwen3-VL, in front of experts."""
    text = {"head_dim": 16, **_EXPERTS, **_rope(2, 3, 3, mrope_interleaved=True)}
    return _qwen("Qwen3VLMoe", _LEARNT_POSITIONS | {"deepstack_visual_indexes": [0]}, text)


def qwen3_5() -> tuple[Any, Any]:
    """A language model whose layers are recurrent (gated delta net) but for every last one."""
    return _qwen("Qwen3_5", _LEARNT_POSITIONS, _DELTA_NET | _rope(2, 1, 1, share=0.5, mrope_interleaved=True))


def qwen3_5_moe() -> tuple[Any, Any]:
    """The same with experts."""
    text = _DELTA_NET | _SHARED_EXPERT | _rope(2, 1, 1, share=0.5, mrope_interleaved=True)
    return _qwen("Qwen3_5Moe", _LEARNT_POSITIONS, text)


def qwen4_exp() -> tuple[Any, Any]:
    """The same with several residual streams and a token indexer in its attention."""
    text = _DELTA_NET | _SHARED_EXPERT | _rope(2, 1, 1, share=0.5, mrope_interleaved=True)
    indexer = {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 2,
    }  # fmt: skip
    return _qwen("Qwen4Exp", _LEARNT_POSITIONS, text | indexer | {"hc_count": 2, "hc_lowrank": 8}, scale=8.0)


_WINDOWS = _FRAMED | {"fullatt_block_indexes": [1], "window_size": SIDE}


def exaone4_5() -> tuple[Any, Any]:
    """Windowed attention as in Qwen2.5-VL, with fewer keys than queries; no positions but those of text."""
    vision = _WINDOWS | {"num_key_value_heads": 1}
    text = {"model_type": "exaone4", "sliding_window": 24, "sliding_window_pattern": 2}
    return _qwen("Exaone4_5_", vision, text, "Exaone4_5_Processor")


def hyperclovax_vision_v2() -> tuple[Any, Any]:
    """Qwen2.5-VL's tower in front of a HyperCLOVA X."""
    vision = {"model_type": "qwen2_5_vl_vision", **_WINDOWS}
    return _qwen("HyperCLOVAXVisionV2", vision, {"model_type": "hyperclovax"}, "HyperCLOVAXVisionV2Processor")


def lfm3_vl() -> tuple[Any, Any]:
    """A tower of short convolutions and attention, in front of the same."""
    vision = {
        "patch_size": PATCH, "temporal_patch_size": 2, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    text = {"model_type": "lfm3", "layer_types": ["conv", "full_attention"]}
    return _qwen("Lfm3Vl", vision, text, "Lfm3VlProcessor", projector_hidden_size=32)


def _ears() -> dict[str, Any]:
    from transformers import WhisperFeatureExtractor

    return {"parts": {"feature_extractor": WhisperFeatureExtractor(feature_size=16)}}


_AUDIO = {"num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32,
          "output_dim": 32}  # fmt: skip


def qwen2_5_omni_thinker() -> tuple[Any, Any]:
    """The half of Qwen2.5-Omni that answers: Qwen2.5-VL's tower."""
    return _qwen(
        "Qwen2_5OmniThinker", _WINDOWS, _rope(2, 3, 3), "Qwen2_5OmniProcessor", audio_config=_AUDIO, **_ears()
    )  # fmt: skip


def qwen3_omni_moe_thinker() -> tuple[Any, Any]:
    """The half of Qwen3-Omni that answers: Qwen3-VL's tower, deepstack and experts."""
    text = {"head_dim": 16, **_EXPERTS, **_rope(2, 3, 3, mrope_interleaved=True)}
    return _qwen(
        "Qwen3OmniMoeThinker", _LEARNT_POSITIONS | {"deepstack_visual_indexes": [0]}, text, "Qwen3OmniMoeProcessor",
        audio_config=_AUDIO | {"downsample_hidden_size": 8}, **_ears(),
    )  # fmt: skip


def qwen2_5_omni() -> tuple[Any, Any]:
    """The thinker and a voice in one model, whose own `generate` calls the thinker's; it needs the voice even for text."""
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    thinker, processor = qwen2_5_omni_thinker()
    talker = {
        "vocab_size": 64, "embedding_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, **_rope(2, 3, 3),
    }  # fmt: skip
    mel = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "emb_dim": 16, "enc_dim": 16,
        "enc_emb_dim": 16, "enc_channels": [16, 16, 48], "enc_kernel_sizes": [5, 3, 1], "enc_dilations": [1, 2, 1],
        "enc_attention_channels": 8, "num_embeds": 65,
    }  # fmt: skip
    sound = {"upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]}
    config = Qwen2_5OmniConfig(
        thinker_config=thinker.config.to_dict(),
        talker_config=talker,
        token2wav_config={"dit_config": mel, "bigvgan_config": sound},
    )
    model = finish(lambda: Qwen2_5OmniForConditionalGeneration(config), processor.tokenizer)
    model.thinker.generation_config = copy.deepcopy(model.generation_config)
    model.speaker_map["Chelsie"] = {}
    return model, processor


def qwen3_omni_moe() -> tuple[Any, Any]:
    """The same for Qwen3-Omni, without its voice."""
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    thinker, processor = qwen3_omni_moe_thinker()
    config = Qwen3OmniMoeConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    model = finish(lambda: Qwen3OmniMoeForConditionalGeneration(config), processor.tokenizer)
    model.thinker.generation_config = copy.deepcopy(model.generation_config)
    return model, processor


def _in_text(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """The whole model answers in sound unless told otherwise, and names its thinker's settings so."""
    made = Architecture("", qwen2_5_omni, QWEN).inputs(processor, rows)
    end = processor.tokenizer.eos_token_id
    return made | {"generation_mode": "text", "thinker_max_new_tokens": 6, "thinker_eos_token_id": end}


def _glm(
    name: str, text: dict[str, Any], vision: dict[str, Any] | None = None, processor: str = "Glm4v",
    model: str | None = None, image_processor: str | None = None, **settings: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """A type with the tokens of GLM-4.1V; a picture is as large as two frames of it."""
    tok = tokenizer(
        "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
        image_token="<|image|>", video_token="<|video|>",
    )  # fmt: skip
    kind = image_processor or processor
    size = {edge: 2 * pixels for edge, pixels in _AREA.items()}
    made = _named(processor, "Processor")(
        _named(kind, "ImageProcessor")(size=size, **_PATCHES, **NORMALISED, **settings),
        tok,
        _named(kind, "VideoProcessor")(**_PATCHES),
    )
    token = tok.convert_tokens_to_ids
    config = _named(name, "Config")(
        text_config=text_config(tok, **text),
        vision_config=_FRAMED | {"image_size": SIDE} | (vision or {}),
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        image_start_token_id=token("<|begin_of_image|>"),
        image_end_token_id=token("<|end_of_image|>"),
        video_start_token_id=token("<|begin_of_video|>"),
        video_end_token_id=token("<|end_of_video|>"),
        tie_word_embeddings=False,
    )
    return finish(lambda: _named(model or name, "ForConditionalGeneration")(config), tok), made


def glm4v() -> tuple[Any, Any]:
    """Learnt positions are interpolated to each picture's grid; patches are merged by a convolution."""
    return _glm("Glm4v", _rope(2, 3, 3))


def glm46v() -> tuple[Any, Any]:
    """GLM-4.1V's model with a processor of its own."""
    return _glm("Glm46V", {"model_type": "glm4v_text", **_rope(2, 3, 3)}, processor="Glm46V")


def glmga() -> tuple[Any, Any]:
    """GLM-4.6V's model with an image processor that rounds sizes to larger factors."""
    text = {"model_type": "glm4v_text", **_rope(2, 3, 3)}
    return _glm("Glmga", text, processor="Glm46V", model="Glm46V", image_processor="Glmga", patch_expand_factor=1)


def glm4v_moe() -> tuple[Any, Any]:
    """GLM-4.1V's tower in front of experts."""
    text = {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16,
        **_rope(2, 1, 1, share=0.5),
    }  # fmt: skip
    return _glm("Glm4vMoe", text)


def glm_ocr() -> tuple[Any, Any]:
    """GLM-4.1V without learnt positions; it has no processor of its own and is used with GLM-4.6V's."""
    return _glm("GlmOcr", _rope(2, 3, 3), processor="Glm46V")


KINDS: tuple[Architecture, ...] = (
    *(
        Architecture(build.__name__, build, QWEN)
        for build in (
            qwen3_vl_moe,
            qwen3_5,
            qwen3_5_moe,
            qwen4_exp,
            exaone4_5,
            hyperclovax_vision_v2,
            lfm3_vl,
            qwen2_5_omni_thinker,
            qwen3_omni_moe_thinker,
        )
    ),
    *(Architecture(build.__name__, build, GLM) for build in (glm4v, glm46v, glmga, glm4v_moe, glm_ocr)),
    Architecture("qwen2_5_omni", qwen2_5_omni, QWEN, ask=_in_text),
    Architecture("qwen3_omni_moe", qwen3_omni_moe, QWEN, ask=_in_text),
    *packed_kin.KINDS,
    *packed_more.KINDS,
)
