"""A small real Qwen2-Audio: its processor and its untrained model."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from lmms_smoothguard.tiny import language as images
from lmms_smoothguard.tiny.sounds import language
from lmms_smoothguard.tiny.sounds.clips import OBJECTS, RATE, SECONDS, TOKENS

if TYPE_CHECKING:
    from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_AUDIO, _BEGIN, _STOP = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
_HOP = 200  # samples: 12.5 ms, 160 frames a clip, a token for every four of them
_CHAT_TEMPLATE = (
    "{% set sounds = namespace(count=0) %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'audio' %}{% set sounds.count = sounds.count + 1 %}"
    "Audio {{ sounds.count }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN, END = f"{_END}\n{_START}assistant\n", _END
"""What stands between question and answer, and what ends an answer."""


def _corpus() -> list[str]:
    pairs = list(itertools.combinations(range(len(OBJECTS)), 2))
    said = [
        language.existence_question(obj) + suffix for obj in range(len(OBJECTS)) for suffix in ("", images.POPE_SUFFIX)
    ]
    said += [f"{wording}\n{language.caption(pair)}" for wording in language.DESCRIBE for pair in pairs]
    said += [language.order_question(*pair) for pair in pairs]
    said += [language.choice_question([language.caption(pair), language.caption(pair[::-1])]) for pair in pairs]
    said += [
        f"{images.request(verb, thing, form)}\n{images.compliance(verb, thing)} {images.REFUSAL}"
        for verb in images.FORBIDDEN_VERBS + images.PERMITTED_VERBS
        for thing in images.THINGS
        for form in range(len(images.REQUESTS))
    ]
    answers = " ".join(("Yes", "No", *language.NUMBERS))
    return [*(f"user\nAudio 1: \n{text}\nassistant\n" for text in said), f"{language.COUNT}\n{answers} 1 2 3"]


def build_processor() -> Qwen2AudioProcessor:
    """Byte-level BPE on the project's own sentences, one token for a sound's whole name; log-mel of 2 s at 16 kHz, 64 mels."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [_PAD, _START, _END, _AUDIO, _BEGIN, _STOP]
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=_PAD,
        eos_token=_END,
        additional_special_tokens=[*special[3:], _START],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(f" {name}", normalized=False, special=False) for name in OBJECTS])
    extractor = WhisperFeatureExtractor(
        feature_size=64, sampling_rate=RATE, hop_length=_HOP, chunk_length=SECONDS, n_fft=400
    )
    extractor.mel_filters = np.asarray(extractor.mel_filters)
    return Qwen2AudioProcessor(extractor, tokenizer, chat_template=_CHAT_TEMPLATE)


def build_model(processor: Qwen2AudioProcessor, seed: int) -> Qwen2AudioForConditionalGeneration:
    """The untrained model, 2.2 M parameters, weights drawn from `seed`."""
    import torch
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    tokenizer = processor.tokenizer
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": processor.feature_extractor.feature_size,
            "max_source_positions": 2 * TOKENS,
            "d_model": 160,
            "encoder_layers": 4,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 480,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "encoder_layerdrop": 0.0,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": -(-len(tokenizer) // 8) * 8,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids(_AUDIO),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2AudioForConditionalGeneration(config)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation.do_sample = False
    return model


def prompt(text: str) -> str:
    """What the processor's chat template makes of one user turn with one clip."""
    return f"{_START}user\nAudio 1: {_BEGIN}{_AUDIO}{_STOP}\n{text}{TURN}"
