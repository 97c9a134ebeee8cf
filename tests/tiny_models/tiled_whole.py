"""Models that take channels first, one whole picture a row or each picture whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiny_models.architecture import NORMALISED, SIDE, SQUARE, VISION, Architecture, Row, text_config, tokenizer
from tiny_models.tiled_common import CROP, made


def _opt(tok: Any) -> dict[str, Any]:
    unknown = ("intermediate_size", "num_key_value_heads")
    return {
        "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 512,
        **{name: value for name, value in text_config(tok).items() if name not in unknown},
    }  # fmt: skip


_QFORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def blip_2() -> tuple[Any, Any]:
    """A Q-Former that does not read the question, in front of an OPT; `generate` is the model's own."""
    from transformers import Blip2Processor, BlipImageProcessor

    tok = tokenizer("<image>")
    processor = Blip2Processor(BlipImageProcessor(size=SQUARE, **NORMALISED), tok, num_query_tokens=4)
    model = made(
        "Blip2", tok, 12.0, vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={"vocab_size": len(tok), **_QFORMER}, text_config=_opt(tok), num_query_tokens=4,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return model, processor


def instructblipvideo() -> tuple[Any, Any]:
    """Four frames a row; a picture is shown four times."""
    from transformers import InstructBlipVideoProcessor, InstructBlipVideoVideoProcessor

    tok = tokenizer("<video>")
    processor = InstructBlipVideoProcessor(
        InstructBlipVideoVideoProcessor(size=SQUARE, **NORMALISED), tok, tokenizer(), num_query_tokens=4
    )
    model = made(
        "InstructBlipVideo", tok, 12.0, vision_config={**VISION, "initializer_range": 0.02},
        qformer_config={"vocab_size": len(tok), "pad_token_id": tok.pad_token_id, **_QFORMER}, text_config=_opt(tok),
        num_query_tokens=4, video_token_index=tok.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    return model, processor


def _ask_frames(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    videos = [list(pictures) * 4 for pictures, _ in rows]
    return dict(processor(images=videos, text=[text for _, text in rows], padding=True, return_tensors="pt"))


def blip() -> tuple[Any, Any]:
    """Cross-attention of a BERT decoder; `generate` is the model's own and drops the prompt's last token."""
    from transformers import BlipImageProcessor, BlipProcessor

    tok = tokenizer()
    tok.padding_side = "right"
    processor = BlipProcessor(BlipImageProcessor(size=SQUARE, **NORMALISED), tok)
    text = {name: value for name, value in text_config(tok).items() if name != "num_key_value_heads"}
    model = made(
        "Blip", tok, vision_config={**VISION, "initializer_range": 0.02},
        text_config={**text, "sep_token_id": tok.eos_token_id},
    )  # fmt: skip
    return model, processor


def git() -> tuple[Any, Any]:
    """The picture's features stand in front of the prompt, without a token for them."""
    from transformers import CLIPImageProcessor, GitProcessor

    tok = tokenizer()
    processor = GitProcessor(CLIPImageProcessor(**CROP), tok)
    text = {name: value for name, value in text_config(tok).items() if name != "num_key_value_heads"}
    return made("Git", tok, model="GitForCausalLM", vision_config=VISION, **text), processor


def chameleon() -> tuple[Any, Any]:
    """Every picture becomes words of a codebook: no gradient comes back; the processor rescales by 0.0078, not 1 / 255."""
    from transformers import ChameleonImageProcessor, ChameleonProcessor

    codes = ["IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z" for code in range(64)]
    tok = tokenizer("<image>", "<racm3:break>", "<eoss>", *codes)
    tok.add_special_tokens({"sep_token": "<reserved08706>"})
    processor = ChameleonProcessor(ChameleonImageProcessor(**CROP), tok, image_seq_length=(SIDE // 8) ** 2)
    names = ["<image>", "<racm3:break>", "<eoss>", *codes]
    model = made(
        "Chameleon", tok, **text_config(tok), vocabulary_map={name: tok.convert_tokens_to_ids(name) for name in names},
        vq_config={
            "embed_dim": 8, "num_embeddings": 64, "latent_channels": 8, "resolution": SIDE, "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
        },
    )  # fmt: skip
    return model, processor


def emu3() -> tuple[Any, Any]:
    """As Chameleon; pictures of their own sizes, padded to the largest of the batch, image_sizes beside them."""
    from transformers import Emu3ImageProcessor, Emu3Processor

    codes = [f"<|visual token {code:06d}|>" for code in range(64)]
    tok = tokenizer(
        "<|extra_200|>", *codes, image_token="<image>", boi_token="<|image start|>", eoi_token="<|image end|>",
        image_wrapper_token="<|image token|>", eof_token="<|extra_201|>",
    )  # fmt: skip
    processor = Emu3Processor(Emu3ImageProcessor(min_pixels=SIDE**2, max_pixels=4 * SIDE**2, **NORMALISED), tok)
    names = ["<image>", "<|extra_200|>", *codes]
    model = made(
        "Emu3", tok, text_config=text_config(tok),
        vocabulary_map={name: tok.convert_tokens_to_ids(name) for name in names},
        vq_config={
            "codebook_size": 64, "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
            "hidden_size": 32, "attn_resolutions": [],
        },
    )  # fmt: skip
    return model, processor


def idefics() -> tuple[Any, Any]:
    """All of a row's pictures in one entry, all-zero ones fill up; seen through gated cross-attention."""
    from transformers import IdeficsImageProcessor, IdeficsProcessor

    tok = tokenizer("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    processor = IdeficsProcessor(IdeficsImageProcessor(image_size=SIDE, **NORMALISED), tok)
    model = made(
        "Idefics", tok, 12.0, "IdeficsForVisionText2Text", **text_config(tok),
        vision_config={**VISION, "embed_dim": 32}, use_resampler=True, alpha_initializer="ones",
        perceiver_config={
            "use_resampler": True, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
            "resampler_head_dim": 16,
        },
    )  # fmt: skip
    return model, processor


def _ask_interleaved(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    prompts = [["USER:", *pictures, f"{text} ASSISTANT:"] for pictures, text in rows]
    return dict(processor(text=prompts, padding=True, return_tensors="pt"))


def kosmos_2() -> tuple[Any, Any]:
    """One picture, in front; a mask, not a token, tells where."""
    from transformers import CLIPImageProcessor, Kosmos2Processor

    tok = tokenizer()
    processor = Kosmos2Processor(CLIPImageProcessor(**CROP), tok, num_patch_index_tokens=4)
    model = made(
        "Kosmos2", tok, 15.0, vision_config=VISION,
        text_config={
            "vocab_size": len(tok), "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 2,
            "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id,
            "tie_word_embeddings": False,
        },
        latent_query_num=64, tie_word_embeddings=False,
    )  # fmt: skip
    model.image_to_text_projection.latent_query.data.mul_(0.01)  # or they look at nothing but themselves
    return model, processor


def kosmos_2_5() -> tuple[Any, Any]:
    """Patches of their own sizes behind their row and column, in flattened_patches; each picture by its own mean and std."""
    from transformers import Kosmos2_5ImageProcessor, Kosmos2_5Processor

    tok = tokenizer(boi_token="<image>", eoi_token="</image>", image_token="<s>")
    tok.padding_side = "right"
    processor = Kosmos2_5Processor(Kosmos2_5ImageProcessor(max_patches=16), tok, num_image_tokens=4)
    model = made(
        "Kosmos2_5", tok,
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_num_patches": 16,
        },
        text_config={
            "vocab_size": len(tok), "embed_dim": 32, "layers": 2, "ffn_dim": 64, "attention_heads": 2,
            "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id,
            "tie_word_embeddings": False,
        },
        latent_query_num=4, tie_word_embeddings=False,
    )  # fmt: skip
    return model, processor


def _ask_kosmos_2_5(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    pictures = [picture for pictures, _ in rows for picture in pictures]
    return dict(processor(images=pictures, text=[f"<ocr>{text}" for _, text in rows], max_patches=16))


def florence2() -> tuple[Any, Any]:
    """DaViT, one picture in front of a BART's encoder; one token for 32 x 32 pixels and one for their mean."""
    from transformers import CLIPImageProcessor, Florence2Processor

    side, tok = 128, tokenizer(image_token="<image>")
    image_processor = CLIPImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, image_seq_length=(side // 32) ** 2 + 1, **NORMALISED
    )
    processor = Florence2Processor(image_processor, tok)
    widths = {"embed_dim": [8, 16, 32, 32], "num_heads": [1, 1, 2, 2], "num_groups": [1, 1, 2, 2]}
    layers = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 64))
    }
    model = made(
        "Florence2", tok, vision_config={**widths, "depths": [1, 1, 1, 1], "window_size": 4, "projection_dim": 32},
        text_config={
            "model_type": "bart", "vocab_size": len(tok), "d_model": 32, **layers, "max_position_embeddings": 512,
            "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id,
            "decoder_start_token_id": tok.eos_token_id, "forced_eos_token_id": None, "tie_word_embeddings": False,
        },
        image_token_id=tok.image_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    model.generation_config.decoder_start_token_id = tok.eos_token_id
    return model, processor


WHOLE: tuple[Architecture, ...] = (
    Architecture("blip-2", blip_2, "", several=False, mixed=False, template="{images}{text}"),
    Architecture("instructblipvideo", instructblipvideo, "", several=False, mixed=False, ask=_ask_frames),
    Architecture("blip", blip, "", several=False, mixed=False, template="<s>{images}{text}</s>"),
    Architecture("git", git, "", several=False, mixed=False, template="<s>{images}{text}"),
    Architecture("chameleon", chameleon, "<image>"),
    Architecture("emu3", emu3, "<image>"),
    Architecture("idefics", idefics, "", ask=_ask_interleaved),
    Architecture("kosmos-2", kosmos_2, "", several=False, mixed=False, template="<grounding>{images}{text}"),
    Architecture("kosmos-2.5", kosmos_2_5, "", several=False, mixed=False, ask=_ask_kosmos_2_5),
    Architecture("florence2", florence2, "", several=False, mixed=False, template="{images}{text}"),
)
