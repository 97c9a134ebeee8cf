"""Models that hear: a second of a tone stands where another model's picture would.

The prober is made for pictures, so `ask` turns each picture of a row into a tone of its own (its mean colour gives the
pitches), of a length that goes with the picture's width: a row's sounds differ as its pictures do. A clip may stand in a
picture's place as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from tiny_models.architecture import Architecture, Row, finish, text_config, tokenizer

MELS = 16
_WHISPER = {"feature_size": MELS, "chunk_length": 2}
_ENCODER = {
    "num_mel_bins": MELS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
_D_MODEL = {
    "num_mel_bins": MELS, "d_model": 32, "encoder_ffn_dim": 64, "encoder_layers": 2, "encoder_attention_heads": 2,
}  # fmt: skip
_TEMPLATE = "<s>USER: {sounds}\n{text} ASSISTANT:"


def tone(picture: Image.Image | np.ndarray, rate: int) -> np.ndarray:
    """About a second, three sines; float32 within [-1, 1]."""
    if isinstance(picture, np.ndarray):
        return picture
    colour = np.asarray(picture, np.float64).reshape(-1, 3).mean(0)
    seconds = np.arange(int(rate * (0.8 + 0.2 * picture.width / 150))) / rate
    sines = [np.sin(2 * np.pi * (200 + 10 * value) * seconds) for value in colour]
    return (0.25 * np.sum(sines, 0)).astype(np.float32)


def hears(sound: str, rate: int = 16000) -> Callable[[Any, Sequence[Row]], dict[str, Any]]:
    """How rows become inputs where `sound` stands for one sound in the prompt."""

    def ask(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
        texts = [_TEMPLATE.format(sounds=sound * len(pictures), text=text) for pictures, text in rows]
        sounds = [tone(picture, rate) for pictures, _ in rows for picture in pictures]
        given = {
            "text_kwargs": {"padding": True, "return_tensors": "pt"},
            "audio_kwargs": {"sampling_rate": rate, "return_tensors": "pt"},
        }
        return dict(processor(text=texts, audio=sounds or None, **given))

    return ask


def qwen2_audio(scale: float = 12.0) -> tuple[Any, Any]:
    """Whisper's log-mel windows, always of full length, with a mask of frames. scale: the larger, the more it makes of noise, and the
    less a gradient is worth to an attack."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tok = tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(**_WHISPER), tok)
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "max_source_positions": 100, **_D_MODEL},
        text_config={"model_type": "qwen2", **text_config(tok)},
        audio_token_index=tok.convert_tokens_to_ids("<|AUDIO|>"),
    )
    return finish(lambda: Qwen2AudioForConditionalGeneration(config), tok, scale), processor


def glmasr() -> tuple[Any, Any]:
    """Log-mel windows of full length; a long sound is cut into several of them, one after the other."""
    from transformers import (
        GlmAsrConfig,
        GlmAsrForConditionalGeneration,
        GlmAsrProcessor,
        WhisperFeatureExtractor,
    )

    tok = tokenizer("<|pad|>", "<|begin_of_audio|>", "<|end_of_audio|>")
    processor = GlmAsrProcessor(WhisperFeatureExtractor(**_WHISPER), tok, max_audio_len=8)
    config = GlmAsrConfig(
        audio_config={"model_type": "glmasr_encoder", **_ENCODER, "intermediate_size": 128},
        text_config={"model_type": "llama", **text_config(tok)},
        audio_token_id=tok.convert_tokens_to_ids("<|pad|>"),
        tie_word_embeddings=False,
    )
    return finish(lambda: GlmAsrForConditionalGeneration(config), tok, scale=16.0), processor


def qwen3_asr() -> tuple[Any, Any]:
    """Log-mel frames padded to the longest of the batch and to whole seconds, with a mask."""
    from transformers import (
        Qwen3ASRConfig,
        Qwen3ASRFeatureExtractor,
        Qwen3ASRForConditionalGeneration,
        Qwen3ASRProcessor,
    )

    tok = tokenizer(audio_token="<|audio_pad|>", audio_bos_token="<|audio_start|>", audio_eos_token="<|audio_end|>")
    processor = Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(feature_size=MELS, chunk_length=2), tok)
    config = Qwen3ASRConfig(
        audio_config={
            "model_type": "qwen3_asr_encoder", "output_dim": 32, "downsample_hidden_size": 8, **_D_MODEL,
        },
        text_config={"model_type": "qwen3", **text_config(tok, head_dim=16)},
        audio_token_id=tok.audio_token_id,
        timestamp_token_id=tok.unk_token_id, pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    return finish(lambda: Qwen3ASRForConditionalGeneration(config), tok, scale=20.0), processor


def vibevoice_asr() -> tuple[Any, Any]:
    """The waveform itself, of set loudness, in whole tokens of 3200 samples."""
    from transformers import (
        VibeVoiceAcousticTokenizerFeatureExtractor,
        VibeVoiceAsrConfig,
        VibeVoiceAsrForConditionalGeneration,
        VibeVoiceAsrProcessor,
    )

    names = ("<|box_start|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|AUDIO_DURATION|>")
    tok = tokenizer(*names)
    sound, start, end, _ = tok.convert_tokens_to_ids(list(names))
    processor = VibeVoiceAsrProcessor(VibeVoiceAcousticTokenizerFeatureExtractor(), tok)
    encoder = {
        "model_type": "vibevoice_acoustic_tokenizer_encoder",
        "num_filters": 1,
        "depths": [1] * 7,
        "hidden_size": 32,
        "layer_scale_init_value": 0.5,
    }
    config = VibeVoiceAsrConfig(
        acoustic_tokenizer_encoder_config=encoder,
        semantic_tokenizer_encoder_config=encoder,
        text_config={"model_type": "qwen2", **text_config(tok)},
        audio_token_id=sound, audio_bos_token_id=start, audio_eos_token_id=end,
        tie_word_embeddings=False,
    )  # fmt: skip
    return finish(lambda: VibeVoiceAsrForConditionalGeneration(config), tok), processor


def _vibevoice_inputs(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Without the noise that the model draws in every call: it answers no two of them alike, and nothing could be compared."""
    return hears("<|box_start|>", 24000)(processor, rows) | {"sample": False}


def moss_transcribe_diarize() -> tuple[Any, Any]:
    """Log-mel windows of full length, several a long sound; a mask of raw samples tells which belong together."""
    from transformers import (
        MossTranscribeDiarizeConfig,
        MossTranscribeDiarizeFeatureExtractor,
        MossTranscribeDiarizeForConditionalGeneration,
        MossTranscribeDiarizeProcessor,
    )

    tok = tokenizer("<|audio_pad|>", "<|audio_start|>", "<|audio_end|>")
    processor = MossTranscribeDiarizeProcessor(MossTranscribeDiarizeFeatureExtractor(MELS, chunk_length=2), tok)
    config = MossTranscribeDiarizeConfig(
        audio_config={**_ENCODER, "max_source_positions": 100},
        text_config={"model_type": "qwen3", **text_config(tok, head_dim=16)},
        audio_token_id=tok.convert_tokens_to_ids("<|audio_pad|>"),
        audio_chunk_size=32000,
        tie_word_embeddings=False,
    )
    return finish(lambda: MossTranscribeDiarizeForConditionalGeneration(config), tok, scale=16.0), processor


def nemo_speechlm() -> tuple[Any, Any]:
    """Log-mel frames in front of channels; a second encoder tells the speakers apart, and a state-space model answers."""
    from transformers import (
        Nemotron3_5TranscribeConfig,
        Nemotron3_5TranscribeForConditionalGeneration,
        Nemotron3_5TranscribeProcessor,
        NemotronAsrStreamingFeatureExtractor,
    )

    tok = tokenizer("<|audio|>")
    processor = Nemotron3_5TranscribeProcessor(
        NemotronAsrStreamingFeatureExtractor(feature_size=MELS), tok, tokenizer()
    )
    speakers = {
        "model_type": "nemotron3_diarization",
        "audio_config": _ENCODER,
        "head_config": {"hidden_size": 16, "audio_hidden_size": 32},
    }
    config = Nemotron3_5TranscribeConfig(
        audio_config={"asr_config": _ENCODER, "diarization_config": speakers},
        text_config={
            "model_type": "nemotron_h", **text_config(tok, head_dim=16), "layer_types": ["linear_attention", "full_attention"],
            "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "use_mamba_kernels": False,
        },
        word_timestamp_config={"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 8,
                               "blank_token_id": 7},
        audio_token_id=tok.convert_tokens_to_ids("<|audio|>"),
        tie_word_embeddings=False,
    )  # fmt: skip
    return finish(lambda: Nemotron3_5TranscribeForConditionalGeneration(config), tok, scale=12.0), processor


def kyutai_speech_to_text() -> tuple[Any, Any]:
    """The waveform alone, without a word of text; a codec inside `generate` makes integer tokens of it."""
    from transformers import (
        KyutaiSpeechToTextConfig,
        KyutaiSpeechToTextFeatureExtractor,
        KyutaiSpeechToTextForConditionalGeneration,
        KyutaiSpeechToTextProcessor,
    )

    tok = tokenizer()
    processor = KyutaiSpeechToTextProcessor(KyutaiSpeechToTextFeatureExtractor(), tok)
    text = {key: value for key, value in text_config(tok).items() if key != "intermediate_size"}
    config = KyutaiSpeechToTextConfig(
        **text, ffn_dim=64, num_codebooks=4, codebook_vocab_size=17, audio_bos_token_id=16,
        audio_pad_token_id=text["vocab_size"] + 4 * 17, sliding_window=64,
        codec_config={
            "model_type": "mimi", "hidden_size": 32, "num_filters": 4, "codebook_size": 16, "codebook_dim": 16,
            "num_quantizers": 4, "vector_quantization_hidden_dimension": 16, "upsample_groups": 32,
            "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
        },
    )  # fmt: skip
    model = finish(lambda: KyutaiSpeechToTextForConditionalGeneration(config), tok, scale=3.0)
    with torch.no_grad():
        for parameter in model.codec_model.parameters():
            if parameter.ndim > 1:  # sounds far from all codebooks are coded by rounding
                parameter.div_(3.0)
        generator = torch.Generator().manual_seed(0)
        for name, buffer in model.named_buffers():
            if name.endswith("embed_sum"):  # codebooks of zeros, until weights are loaded
                buffer.normal_(generator=generator)
    return model, processor


def _listens(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    return dict(processor(audio=[tone(picture, 24000) for pictures, _ in rows for picture in pictures]))


def voxtral() -> tuple[Any, Any]:
    """Log-mel windows of full length, one behind the other, without a mask; token 24 stands for sound."""
    from transformers import (
        VoxtralConfig,
        VoxtralForConditionalGeneration,
        VoxtralProcessor,
        WhisperFeatureExtractor,
    )

    tok = tokenizer()
    processor = VoxtralProcessor(WhisperFeatureExtractor(**_WHISPER), tok)
    config = VoxtralConfig(
        audio_config={
            "model_type": "voxtral_encoder", **_ENCODER, "intermediate_size": 128, "max_source_positions": 100,
        },
        text_config={"model_type": "llama", **text_config(tok, head_dim=16)},
        audio_token_id=processor.audio_token_id,
    )  # fmt: skip
    return finish(lambda: VoxtralForConditionalGeneration(config), tok, scale=24.0), processor


class _WritesSoundTokens:
    """What Voxtral's processor asks of mistral-common's tokenizer: text with sound tokens in it, and the sounds beside. A sound has
    25 tokens for each of its windows, of so many samples."""

    def __init__(self, tokenizer: Any, rows: Sequence[Row], sound: str, window: int) -> None:
        self._tokenizer, self._rows, self._sound, self._window = tokenizer, rows, sound, window

    def apply_chat_template(self, conversations: Any, **_: Any) -> dict[str, Any]:
        waves = [[tone(sound, 16000) for sound in sounds] for sounds, _ in self._rows]
        windows = [sum(-(-len(wave) // self._window) for wave in row) for row in waves]
        texts = [
            _TEMPLATE.format(sounds=self._sound * 25 * count, text=text)
            for count, (_, text) in zip(windows, self._rows, strict=True)
        ]
        made = dict(self._tokenizer(texts, padding=True, return_tensors="pt"))
        heard = [wave for row in waves for wave in row]
        return made | ({"audio": heard} if heard else {})


def _voxtral_inputs(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Through `apply_chat_template`, which makes windows of features; `window` is ours, for sounds of two seconds."""
    tok, window = processor.tokenizer, 2 * 16000
    processor.tokenizer = _WritesSoundTokens(tok, rows, processor.audio_token, window)
    settings = {"sampling_rate": 16000, "padding": True, "truncation": False, "pad_to_multiple_of": window}
    try:
        made = processor.apply_chat_template(
            [[{"role": "user", "content": "?"}]],
            processor_kwargs={
                "text_kwargs": {"tokenize": True, "return_dict": True},
                "audio_kwargs": {**settings, "max_source_positions": window // 160},
                "return_tensors": "pt",
            },
        )
    finally:
        processor.tokenizer = tok
    return dict(made)


def audioflamingo3() -> tuple[Any, Any]:
    """Log-mel windows; a long sound is cut into several before they are made of it."""
    from transformers import (
        AudioFlamingo3Config,
        AudioFlamingo3ForConditionalGeneration,
        AudioFlamingo3Processor,
        WhisperFeatureExtractor,
    )

    tok = tokenizer("<sound>")
    processor = AudioFlamingo3Processor(WhisperFeatureExtractor(**_WHISPER), tok, max_audio_len=8)
    config = AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", **_ENCODER, "max_source_positions": 100},
        text_config={"model_type": "qwen2", **text_config(tok)},
        audio_token_id=tok.convert_tokens_to_ids("<sound>"),
    )
    return finish(lambda: AudioFlamingo3ForConditionalGeneration(config), tok, scale=8.0), processor


def granite_speech() -> tuple[Any, Any]:
    """Log-mel frames in pairs, made by torchaudio; the mask is of tokens, not of frames."""
    from transformers import (
        GraniteSpeechConfig,
        GraniteSpeechFeatureExtractor,
        GraniteSpeechForConditionalGeneration,
        GraniteSpeechProcessor,
    )

    tok = tokenizer("<|audio|>")
    extractor = GraniteSpeechFeatureExtractor(n_mels=MELS, projector_window_size=15, projector_downsample_rate=5)
    processor = GraniteSpeechProcessor(extractor, tok)
    config = GraniteSpeechConfig(
        encoder_config={
            "input_dim": 2 * MELS, "num_layers": 2, "hidden_dim": 32, "num_heads": 2, "output_dim": 16, "context_size": 40,
        },
        projector_config={
            "model_type": "blip_2_qformer", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 64, "encoder_hidden_size": 32, "vocab_size": 32, "cross_attention_frequency": 1,
        },
        text_config={"model_type": "granite", **text_config(tok)},
        audio_token_index=tok.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False, tie_word_embeddings=False,
    )  # fmt: skip
    return finish(lambda: GraniteSpeechForConditionalGeneration(config), tok, scale=9.0), processor


KINDS: tuple[Architecture, ...] = (
    Architecture(
        "qwen2_audio", functools.partial(qwen2_audio, 26.0), "", ask=hears("<|audio_bos|><|AUDIO|><|audio_eos|>")
    ),
    Architecture("glmasr", glmasr, "", several=False, mixed=False, ask=hears("<|pad|>")),
    Architecture("qwen3_asr", qwen3_asr, "", several=False, mixed=False, ask=hears("<|audio_pad|>")),
    Architecture("vibevoice_asr", vibevoice_asr, "", ask=_vibevoice_inputs),
    Architecture("moss_transcribe_diarize", moss_transcribe_diarize, "", ask=hears("<|audio_pad|>")),
    Architecture("nemo_speechlm", nemo_speechlm, "", several=False, mixed=False, ask=hears("<|audio|>")),
    Architecture("kyutai_speech_to_text", kyutai_speech_to_text, "", several=False, mixed=False, ask=_listens),
    Architecture("voxtral", voxtral, "", ask=_voxtral_inputs),
    Architecture("audioflamingo3", audioflamingo3, "", several=False, mixed=False, ask=hears("<sound>")),
    Architecture("granite_speech", granite_speech, "", ask=hears("<|audio|>")),
)
