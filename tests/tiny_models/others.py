"""InternVL, Gemma 3, Idefics 3, SmolVLM, Mllama, PaliGemma and InstructBLIP."""

from __future__ import annotations

from typing import Any

import torch

from tiny_models.architecture import NORMALISED, PATCH, SIDE, SQUARE, VISION, finish, text_config, tokenizer

_SPLIT = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def internvl() -> tuple[Any, Any]:
    """Crops of a picture follow each other in one tensor without a tile dimension."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tok = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    tokens = (SIDE // PATCH // 2) ** 2
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4, **NORMALISED),
        tok,
        InternVLVideoProcessor(size=SQUARE),
        image_seq_length=tokens,
    )
    config = InternVLConfig(
        vision_config=VISION,
        text_config={"model_type": "qwen2", **text_config(tok)},
        image_token_id=tok.context_image_token_id,
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    return finish(lambda: InternVLForConditionalGeneration(config), tok), processor


def gemma3() -> tuple[Any, Any]:
    """Attention among the tokens of a picture goes both ways; one layer in two has a sliding window."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    tok = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    processor = Gemma3Processor(Gemma3ImageProcessor(size=SQUARE, **NORMALISED), tok, image_seq_length=4)
    config = Gemma3Config(
        text_config=text_config(
            tok, head_dim=16, query_pre_attn_scalar=16, sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config={"vision_use_head": False, **VISION},
        mm_tokens_per_image=4,
        boi_token_index=tok.boi_token_id, eoi_token_index=tok.eoi_token_id, image_token_index=tok.image_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = finish(lambda: Gemma3ForConditionalGeneration(config), tok)
    projection = model.model.multi_modal_projector.mm_input_projection_weight  # zeros, until weights are loaded
    projection.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return model, processor


def _split_images(kind: str) -> tuple[Any, Any]:
    import transformers

    tok = tokenizer(
        "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>", *_SPLIT
    )  # fmt: skip
    tokens = (SIDE // PATCH // 2) ** 2
    image_processor = getattr(transformers, f"{kind}ImageProcessor")(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, **NORMALISED
    )
    extra = [transformers.SmolVLMVideoProcessor()] if kind == "SmolVLM" else []
    processor = getattr(transformers, f"{kind}Processor")(image_processor, tok, *extra, image_seq_len=tokens)
    config = getattr(transformers, f"{kind}Config")(
        vision_config=VISION,
        text_config={"model_type": "llama", **text_config(tok)},
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
        tie_word_embeddings=False,
    )
    return finish(lambda: getattr(transformers, f"{kind}ForConditionalGeneration")(config), tok), processor


def idefics3() -> tuple[Any, Any]:
    """Split pictures: tiles and the whole; a row's tiles stand behind each other."""
    return _split_images("Idefics3")


def smolvlm() -> tuple[Any, Any]:
    """As Idefics 3, in its own classes."""
    return _split_images("SmolVLM")


def mllama() -> tuple[Any, Any]:
    """Tiles on a canvas, seen through cross-attention."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor

    tok = tokenizer("<|image|>", "<|python_tag|>")
    processor = MllamaProcessor(MllamaImageProcessor(size=SQUARE, max_image_tiles=4, **NORMALISED), tok)
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 2, "image_size": SIDE, "patch_size": PATCH, "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96, "max_num_tiles": 4,
        },
        text_config=text_config(
            tok, num_hidden_layers=3, cross_attention_layers=[1], tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        image_token_index=tok.convert_tokens_to_ids("<|image|>"),
    )  # fmt: skip
    model = finish(lambda: MllamaForConditionalGeneration(config), tok)
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:  # cross-attention starts switched off
            parameter.data.fill_(1.0)
    return model, processor


def paligemma() -> tuple[Any, Any]:
    """Attention within the whole prompt goes both ways."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    tok = tokenizer("<image>")
    image_processor = SiglipImageProcessor(size=SQUARE, **NORMALISED)
    image_processor.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(image_processor, tok)
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32, **VISION},
        text_config={"model_type": "gemma", **text_config(tok, head_dim=16)},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        tie_word_embeddings=False,
    )
    return finish(lambda: PaliGemmaForConditionalGeneration(config), tok), processor


def _instructblip(tok: Any, text: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import (
        BlipImageProcessor,
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipProcessor,
    )

    processor = InstructBlipProcessor(
        BlipImageProcessor(size=SQUARE, **NORMALISED), tok, tokenizer(), num_query_tokens=4
    )
    config = InstructBlipConfig(
        vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={
            "vocab_size": len(tok), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "pad_token_id": tok.pad_token_id,
        },
        text_config=text,
        num_query_tokens=4,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return finish(lambda: InstructBlipForConditionalGeneration(config), tok, scale=12.0), processor


def instructblip() -> tuple[Any, Any]:
    """A Q-Former that reads the question, in front of an OPT; `generate` is the model's own."""
    tok = tokenizer("<image>")
    text = {
        "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512,
        **{k: v for k, v in text_config(tok).items() if k not in ("intermediate_size", "num_key_value_heads")},
    }  # fmt: skip
    return _instructblip(tok, text)


def instructblip_t5() -> tuple[Any, Any]:
    """The same in front of an encoder-decoder."""
    tok = tokenizer("<image>")
    text = {
        "model_type": "t5", "vocab_size": len(tok), "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": tok.pad_token_id, "pad_token_id": tok.pad_token_id, "eos_token_id": tok.eos_token_id,
    }  # fmt: skip
    model, processor = _instructblip(tok, text)
    for settings in (model.generation_config, model.language_model.generation_config):
        settings.decoder_start_token_id = tok.pad_token_id
    return model, processor
