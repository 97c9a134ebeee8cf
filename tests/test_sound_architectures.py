"""Sounds of every architecture: noise on the waveform, answers as of separate calls through the processor itself."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models.sounds import KINDS
from tiny_models.subject import COPIES, SETTINGS, Subject

from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.inputs.carried import CLIPS
from lmms_smoothguard.inputs.media import find_media
from lmms_smoothguard.noise import NoiseSource, WaveformNoise

WHOLE = {"voxtral", "glmasr", "moss_transcribe_diarize", "audioflamingo3", "qwen3_asr"}
"""Models that hear all of a sound longer than the window of their extractor, of two seconds here."""


def sound(seed: int, seconds: float, rate: int = 16000) -> np.ndarray:
    """Three sines and a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    waves = sum(np.sin(2 * np.pi * pitch * time) for pitch in rng.uniform(200, 3000, 3))
    return (0.2 * waves + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


@functools.cache
def built(name: str) -> Subject:
    if name == "granite_speech":
        try:
            pytest.importorskip("torchaudio")
        except RuntimeError as error:  # of another CUDA than torch's
            pytest.skip(str(error))
    return Subject(name)


def rate_of(name: str) -> int:
    return 24000 if name in ("vibevoice_asr", "kyutai_speech_to_text") else 16000


def unpadded(answers, padding: int):
    """Random weights may say the padding token last, where nobody can tell it from padding."""
    return [
        [answer[: max((n for n, token in enumerate(answer, 1) if token != padding), default=0)] for answer in row]
        for row in answers
    ]


def cases():
    for kind in KINDS:
        rate = rate_of(kind.name)
        one, two, three = sound(1, 1.0, rate), sound(2, 0.7, rate), sound(3, 1.3, rate)
        yield pytest.param(kind.name, [((one,), "What is it?")], id=f"{kind.name}-one")
        if kind.several:
            yield pytest.param(kind.name, [((two, three), "Describe it.")], id=f"{kind.name}-two")
        if kind.name in WHOLE:
            long = sound(4, 2.5, rate)
            yield pytest.param(kind.name, [((long,), "What is it?"), ((one,), "What is it?")], id=f"{kind.name}-long")
        if kind.name == "kyutai_speech_to_text":
            continue
        other = "Describe it." if kind.several else "What is it?"
        yield pytest.param(kind.name, [((one,), "What is it?"), ((three,), other)], id=f"{kind.name}-batch")


@pytest.mark.parametrize(("name", "rows"), cases())
def test_defended_answers_are_those_of_separate_calls(name, rows):
    subject = built(name)
    defended = [verdict.candidates for verdict in subject.defended(subject.inputs(*rows))]
    padding = subject.processor.tokenizer.pad_token_id
    assert unpadded(defended, padding) == unpadded(subject.separate_rows(rows), padding)
    assert any(len(set(candidates)) > 1 for candidates in defended), "all copies answer alike: nothing was tested"


# -- pictures and sounds in one request --------------------------------------------------------------------------------


def ask_omni(processor, picture: Image.Image, clip: np.ndarray):
    text = "<|vision_start|><|image_pad|><|vision_end|><|audio_start|><|audio_pad|><|audio_end|> What is it?"
    return processor(text=[text], images=[picture], audio=[clip], padding=True, return_tensors="pt")


@pytest.mark.parametrize("name", ["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"])
def test_pictures_and_sounds_of_one_request_are_both_noised(name):
    subject = Subject(name)
    model, processor = subject.model, subject.processor
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((112, 112))
    inputs = ask_omni(processor, picture, sound(1, 1.0))
    config = SmoothGuardConfig(sigma=0.5, audio_sigma=0.7, num_samples=COPIES)
    out = model.generate(**inputs, **SETTINGS, smoothguard=config, return_dict_in_generate=True)
    media = find_media(inputs, model.config)
    pixels = NoiseSource(media.images, sigma=0.5, statistics=None, seed=0)
    waves = WaveformNoise(media.sounds, sigma=0.7, snr=None, seed=0)
    expected = subject.answers(inputs)
    for number in range(1, COPIES):
        again = ask_omni(processor, picture, waves.clips(number)[0])
        assert not torch.equal(again["input_features"], inputs["input_features"])
        expected += subject.answers({**again, "pixel_values": pixels.copy(number)})
    assert list(out.smoothguard[0].candidates) == expected
    assert len(set(expected)) > 1


def test_sounds_alone_make_a_difference_to_an_omni_model():
    """Else the test above could pass on its pictures alone."""
    subject = Subject("qwen2_5_omni_thinker")
    model, processor = subject.model, subject.processor
    picture = Image.new("RGB", (112, 112), (90, 150, 176))
    logits = [
        model(**{k: v for k, v in ask_omni(processor, picture, sound(seed, 1.0)).items() if k != CLIPS}).logits[0, -1]
        for seed in (1, 2)
    ]
    assert not torch.allclose(*logits)
