"""Models that take something else: patches of documents, words with their places, proteins, sound."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_models import sounds
from tiny_models.architecture import (
    NORMALISED,
    PATCH,
    SIDE,
    SQUARE,
    VISION,
    Architecture,
    Row,
    finish,
    text_config,
    tokenizer,
)


def fuyu() -> tuple[Any, Any]:
    """Patches of all pictures in one tensor without a word on their sizes, the channel last in a patch; no encoder."""
    from tokenizers import AddedToken, Regex, normalizers
    from transformers import FuyuConfig, FuyuForCausalLM, FuyuImageProcessor, FuyuProcessor

    tok = tokenizer()
    # Fuyu's own tokenizer puts a blank in front, which the processor takes away as the first token.
    tok._tokenizer.normalizer = normalizers.Replace(Regex(r"^\|SPEAKER\|(?=\|)"), " |SPEAKER|")
    tok.add_tokens([AddedToken(name, normalized=True) for name in ("|SPEAKER|", "|NEWLINE|", "<0x04>")])
    processor = FuyuProcessor(
        FuyuImageProcessor(
            size={"height": 2 * SIDE, "width": 2 * SIDE}, patch_size={"height": PATCH, "width": PATCH}, **NORMALISED
        ),
        tok,
    )
    config = FuyuConfig(
        text_config={"model_type": "persimmon", **text_config(tok)},
        image_size=2 * SIDE,
        patch_size=PATCH,
        image_token_id=processor.image_token_id,
    )
    return finish(lambda: FuyuForCausalLM(config), tok), processor


def _fuyu_inputs(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """`pixel_values`, which the default (`image_patches`) is about to become."""
    pictures, texts = [list(pictures) for pictures, _ in rows], [text for _, text in rows]
    return dict(processor(images=pictures, text=texts, return_legacy_image_output=False, return_tensors="pt"))


def pix2struct() -> tuple[Any, Any]:
    """Flattened patches behind their row and column numbers; each picture normalised by its own mean and std."""
    from transformers import (
        Pix2StructConfig,
        Pix2StructForConditionalGeneration,
        Pix2StructImageProcessor,
        Pix2StructProcessor,
    )

    tok = tokenizer()
    image_processor = Pix2StructImageProcessor(max_patches=24, patch_size={"height": PATCH, "width": PATCH})
    processor = Pix2StructProcessor(image_processor, tok)
    sizes = {"hidden_size": 32, "d_kv": 16, "d_ff": 64}
    config = Pix2StructConfig(
        text_config={
            "vocab_size": len(tok), **sizes, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": tok.bos_token_id,
            "pad_token_id": tok.pad_token_id, "eos_token_id": tok.eos_token_id,
        },
        vision_config={
            **sizes, "num_hidden_layers": 2, "num_attention_heads": 2, "seq_len": 64,
            "patch_embed_hidden_size": 3 * PATCH**2,
        },
    )  # fmt: skip
    return _answers(finish(lambda: Pix2StructForConditionalGeneration(config), tok), tok), processor


def _answers(model: Any, tok: Any) -> Any:
    """An encoder-decoder whose answers begin with the beginning."""
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = tok.bos_token_id
    model.generation_config.forced_eos_token_id = None
    return model


def _pictures_only(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Models that read out what they see and are asked nothing."""
    return dict(processor(images=[picture for pictures, _ in rows for picture in pictures], return_tensors="pt"))


def _patches_only(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    pictures = [picture for pictures, _ in rows for picture in pictures]
    return dict(processor(images=pictures, return_tensors="pt", max_patches=24))


def vision_encoder_decoder() -> tuple[Any, Any]:
    """TrOCR: a ViT in front of a decoder; no prompt at all."""
    from transformers import TrOCRProcessor, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTImageProcessor

    tok = tokenizer()
    processor = TrOCRProcessor(ViTImageProcessor(size=SQUARE, **NORMALISED), tok)
    config = VisionEncoderDecoderConfig(
        encoder={"model_type": "vit", **VISION},
        decoder={
            "model_type": "trocr", "vocab_size": len(tok), "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64,
            "decoder_attention_heads": 2, "is_decoder": True, "add_cross_attention": True,
            "pad_token_id": tok.pad_token_id, "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id,
        },
        pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    return _answers(finish(lambda: VisionEncoderDecoderModel(config=config), tok), tok), processor


def pp_formulanet() -> tuple[Any, Any]:
    """A formula, its margins cut off, in the middle of a black square; no prompt at all."""
    from transformers import (
        PPFormulaNetConfig,
        PPFormulaNetForConditionalGeneration,
        PPFormulaNetImageProcessor,
        PPFormulaNetProcessor,
    )

    tok = tokenizer()
    side = 2 * SIDE
    processor = PPFormulaNetProcessor(
        PPFormulaNetImageProcessor(size={"height": side, "width": side}, **NORMALISED), tok
    )
    config = PPFormulaNetConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 64, "image_size": side,
            "patch_size": PATCH, "window_size": 4, "global_attn_indexes": [1], "output_channels": 16,
            "post_conv_in_channels": 16, "post_conv_mid_channels": 16, "post_conv_out_channels": 32,
            "decoder_hidden_size": 32, "initializer_range": 0.02,
        },
        text_config={
            "vocab_size": len(tok), "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "decoder_layers": 2,
            "decoder_ffn_dim": 64, "decoder_attention_heads": 2, "max_position_embeddings": 64,
            "pad_token_id": tok.pad_token_id, "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id,
            "decoder_start_token_id": tok.bos_token_id, "forced_eos_token_id": None,
        },
    )  # fmt: skip
    return _answers(finish(lambda: PPFormulaNetForConditionalGeneration(config), tok), tok), processor


def udop() -> tuple[Any, Any]:
    """A page whose words come with their places, which are mixed into the patches under them."""
    from transformers import (
        LayoutLMv3ImageProcessor,
        UdopConfig,
        UdopForConditionalGeneration,
        UdopProcessor,
        UdopTokenizer,
    )

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    tok = UdopTokenizer(vocab=vocabulary, padding_side="left")
    processor = UdopProcessor(LayoutLMv3ImageProcessor(size=SQUARE, apply_ocr=False, **NORMALISED), tok)
    config = UdopConfig(
        vocab_size=len(tok), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, image_size=SIDE, patch_size=PATCH,
        pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, decoder_start_token_id=tok.pad_token_id,
    )  # fmt: skip
    model = finish(lambda: UdopForConditionalGeneration(config), tok)
    model.generation_config.decoder_start_token_id = tok.pad_token_id
    return model, processor


def _udop_inputs(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """The question, and two words that stand on every page."""
    words = [["Total", "42"] for _ in rows]
    boxes = [[[100, 100, 400, 300], [600, 600, 900, 800]] for _ in rows]
    return dict(
        processor(
            images=[picture for pictures, _ in rows for picture in pictures], text=[text for _, text in rows],
            text_pair=words, boxes=boxes, padding=True, return_tensors="pt",
        )
    )  # fmt: skip


_AMINO, _FOLDS = "ACDEFGHIKLMNPQRSTVWY", "acdefghiklmnpqrstvwy#"


def evolla() -> tuple[Any, Any]:
    """A protein, as the integer tokens of its residues and folds, seen through cross-attention; no pixels."""
    from transformers import EsmTokenizer, EvollaConfig, EvollaForProteinText2Text, EvollaProcessor

    tok = tokenizer("<|reserved_special_token_0|>")
    tok.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    pairs = [amino + fold for amino in _AMINO + "#" for fold in _FOLDS]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vocab.txt"
        path.write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", *pairs]))
        proteins = EsmTokenizer(str(path))
    processor = EvollaProcessor(proteins, tok)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = EvollaConfig(
        protein_encoder_config={**sizes, "vocab_size": 446, "mask_token_id": 4, "pad_token_id": 1},
        **text_config(tok), aligner_num_add_layers=1, aligner_ffn_mult=1, resampler_depth=1, resampler_dim_head=16,
        resampler_heads=2, resampler_num_latents=4, resampler_ff_mult=1,
    )  # fmt: skip
    model = finish(lambda: EvollaForProteinText2Text(config), tok)
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:  # the protein starts switched off
            parameter.data.fill_(1.0)
    return model, processor


def _evolla_inputs(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """One protein of 32 residues a row, by the picture's bytes."""
    proteins = []
    for pictures, _ in rows:
        digest = hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).digest()
        proteins.append({
            "aa_seq": "".join(_AMINO[byte % 20] for byte in digest), "foldseek": "".join(_FOLDS[byte // 13] for byte in digest),
        })  # fmt: skip
    messages = [[{"role": "user", "content": text}] for _, text in rows]
    return dict(processor(proteins=proteins, messages_list=messages))


_ONE = {"several": False, "mixed": False}

KINDS: tuple[Architecture, ...] = (
    *sounds.KINDS,
    Architecture("fuyu", fuyu, "", **_ONE, ask=_fuyu_inputs),
    Architecture("pix2struct", pix2struct, "", **_ONE, ask=_patches_only),
    Architecture("vision-encoder-decoder", vision_encoder_decoder, "", **_ONE, ask=_pictures_only),
    Architecture("pp_formulanet", pp_formulanet, "", **_ONE, ask=_pictures_only),
    Architecture("udop", udop, "", **_ONE, ask=_udop_inputs),
    Architecture("evolla", evolla, "", **_ONE, ask=_evolla_inputs),
)
