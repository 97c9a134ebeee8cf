"""Gemma's kin, and models whose vision tower is timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tiny_models.architecture import NORMALISED, PATCH, SIDE, SQUARE, Architecture, Row, text_config, tokenizer
from tiny_models.tiled_common import SIGLIP, made

_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def _gemma(tok: Any, **more: Any) -> dict[str, Any]:
    return text_config(
        tok, head_dim=16, query_pre_attn_scalar=16, sliding_window=24,
        layer_types=["sliding_attention", "full_attention"], **more,
    )  # fmt: skip


def _projecting(model: Any, projector: Any) -> Any:
    weight = projector.mm_input_projection_weight  # zeros, until weights are loaded
    weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return model


_TURNS = (
    "{% for m in messages %}<s>user\n{% for c in m['content'] %}{% if c['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)


def shieldgemma2() -> tuple[Any, Any]:
    """Gemma 3, asked about a picture by policies: the processor writes a row a picture and policy."""
    from transformers import Gemma3ImageProcessor, ShieldGemma2Processor

    tok = tokenizer(**_TOKENS)
    processor = ShieldGemma2Processor(
        Gemma3ImageProcessor(size=SQUARE, **NORMALISED), tok, chat_template=_TURNS, image_seq_length=4
    )
    model = made(
        "ShieldGemma2", tok, model="Gemma3ForConditionalGeneration", vision_config=SIGLIP,
        text_config={"model_type": "gemma3_text", **_gemma(tok), "tie_word_embeddings": False}, mm_tokens_per_image=4,
        boi_token_index=tok.boi_token_id, eoi_token_index=tok.eoi_token_id, image_token_index=tok.image_token_id,
    )  # fmt: skip
    return _projecting(model, model.model.multi_modal_projector), processor


def _ask_policy(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    (text,) = {text for _, text in rows}
    pictures = [list(pictures) for pictures, _ in rows]
    return dict(processor(images=pictures, custom_policies={"it": text}, policies=["it"], return_tensors="pt"))


def t5gemma2() -> tuple[Any, Any]:
    """Gemma 3's encoder with a decoder of its own, which looks at the prompt through merged attention."""
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    tok = tokenizer(**_TOKENS)
    processor = Gemma3Processor(Gemma3ImageProcessor(size=SQUARE, **NORMALISED), tok, image_seq_length=4)
    model = made(
        "T5Gemma2", tok,
        encoder={
            "text_config": _gemma(tok), "vision_config": SIGLIP, "mm_tokens_per_image": 4,
            "boi_token_index": tok.boi_token_id, "eoi_token_index": tok.eoi_token_id,
            "image_token_index": tok.image_token_id,
        },
        decoder=_gemma(tok), image_token_index=tok.image_token_id,
    )  # fmt: skip
    model.generation_config.decoder_start_token_id = tok.bos_token_id
    return _projecting(model, model.model.encoder.multi_modal_projector), processor


def gemma3n() -> tuple[Any, Any]:
    """MobileNet V5, always 256 tokens a picture; sound has a tower of its own."""
    from transformers import Gemma3nAudioFeatureExtractor, Gemma3nProcessor, SiglipImageProcessor

    tok = tokenizer(
        **_TOKENS, boa_token="<start_of_audio>", eoa_token="<end_of_audio>", audio_token="<audio_soft_token>"
    )
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(), SiglipImageProcessor(size={"height": 128, "width": 128}, **NORMALISED), tok
    )
    model = made(
        "Gemma3n", tok,
        text_config={
            **text_config(tok), "head_dim": 16, "sliding_window": 24, "vocab_size_per_layer_input": len(tok),
            "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0],
        },
        vision_config={"model_args": {"channel_multiplier": 0.1}, "vocab_offset": len(tok), "hidden_size": 2048},
        audio_config={
            "hidden_size": 32, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "vocab_offset": len(tok) + 128,
            "sscp_conv_channel_size": [8, 8],
        },
        boi_token_id=tok.boi_token_id, eoi_token_id=tok.eoi_token_id, image_token_id=tok.image_token_id,
        boa_token_id=tok.boa_token_id, eoa_token_id=tok.eoa_token_id, audio_token_id=tok.audio_token_id,
    )  # fmt: skip
    return model, processor


def _revive(tower: Any) -> None:
    """Weights that keep the size of what passes: convolutions without normalisation would let it vanish."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in tower.named_parameters():
            if name.endswith("gamma"):
                parameter.data.fill_(1.0)
            elif parameter.ndim > 1:
                torch.nn.init.kaiming_normal_(parameter)


def fast_vlm() -> tuple[Any, Any]:
    """FastViT, one token for 64 x 64 pixels."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    tok = tokenizer("<image>")
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 128, "width": 128}, **NORMALISED), tok,
        patch_size=64, vision_feature_select_strategy="full", image_token="<image>",
    )  # fmt: skip
    layers = {"layers": (1, 1, 1, 1, 1), "embed_dims": (8, 16, 32, 64, 64), "inference_mode": True}
    model = made(
        "FastVlm", tok,
        vision_config={
            "model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg",
            "hidden_size": 128, "model_args": layers,
        },
        text_config={"model_type": "qwen2", **text_config(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    _revive(model.model.vision_tower)
    return model, processor


def perception_lm() -> tuple[Any, Any]:
    """The whole and tiles along a dimension of their own; pictures of unequal counts cannot stand beside each other."""
    from transformers import PerceptionLMImageProcessor, PerceptionLMProcessor, PerceptionLMVideoProcessor

    tok = tokenizer(image_token="<|image|>", video_token="<|video|>")
    processor = PerceptionLMProcessor(
        PerceptionLMVideoProcessor(size=SQUARE), PerceptionLMImageProcessor(tile_size=SIDE, max_num_tiles=4, **NORMALISED),
        tok, patch_size=PATCH, pooling_ratio=2,
    )  # fmt: skip
    model = made(
        "PerceptionLM", tok,
        vision_config={
            "model_type": "timm_wrapper", "architecture": "vit_pe_core_tiny_patch16_384", "do_pooling": False,
            "global_pool": "map", "num_features": 32, "initializer_range": 0.02,
            "model_args": {
                "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [SIDE, SIDE], "patch_size": PATCH,
                "ref_feat_shape": [4, 4], "global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1,
            },
        },
        text_config={"model_type": "llama", **text_config(tok)}, vision_use_cls_token=True, projector_pooling_ratio=2,
        image_token_id=tok.image_token_id, video_token_id=tok.video_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


GEMMAS: tuple[Architecture, ...] = (
    Architecture("shieldgemma2", shieldgemma2, "", several=False, mixed=False, ask=_ask_policy),
    Architecture("t5gemma2", t5gemma2, "<start_of_image>", nested=True),
    Architecture("gemma3n", gemma3n, "<image_soft_token>", nested=True),
    Architecture("fast_vlm", fast_vlm, "<image>"),
    Architecture("perception_lm", perception_lm, "<|image|>", several=False, mixed=False),
)
