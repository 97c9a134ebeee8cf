"""Processors that carry sounds along: what they give, who takes it, and what is refused."""

from __future__ import annotations

import copy
import functools
import pickle
import re

import numpy as np
import pytest
import torch
from tiny_models import COVERED
from tiny_models.sounds import audioflamingo3, glmasr, hears, moss_transcribe_diarize, qwen2_audio, qwen3_asr
from tiny_models.subject import SETTINGS
from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

import hf_integration
from hf_integration.protecting import hears as takes_sounds
from hf_integration.protecting import is_protected, protect
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.inputs.carried import CLIPS
from lmms_smoothguard.inputs.media import find_images, find_media
from lmms_smoothguard.noise import WaveformNoise, draw_waveform_noise

RATE = 16000
DEFENSE = {"audio_sigma": 0.3, "num_samples": 4}


def clip(seed: int, seconds: float = 1.0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).astype(np.float32)


def ask(processor, clips, **options):
    given = {"sampling_rate": RATE, "padding": True, "return_tensors": "pt"} | options
    text = "<|audio_bos|><|AUDIO|><|audio_eos|>" * len(clips)
    return processor(text=f"<s>USER: {text} What is it? ASSISTANT:", audio=clips or None, **given)


@functools.cache
def built():
    model, processor = qwen2_audio(26.0)
    hf_integration.attach(model, processor)
    return model, processor


@pytest.fixture
def plain():
    model, processor = built()
    return model, copy.deepcopy(processor)


@pytest.fixture
def guarded(plain):
    model, processor = plain
    return model, protect(processor)


def test_features_are_those_of_the_processor_unprotected(plain):
    _, processor = plain
    before = ask(processor, [clip(1), clip(2, 0.5)])
    after = ask(protect(processor), [clip(1), clip(2, 0.5)])
    assert set(after) - set(before) == {CLIPS}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [len(one) for one in after[CLIPS].clips] == [RATE, RATE // 2]


def test_a_protected_processor_is_what_it_was(plain, tmp_path):
    _, processor = plain
    protect(processor)
    assert isinstance(processor, Qwen2AudioProcessor) and isinstance(
        processor.feature_extractor, WhisperFeatureExtractor
    )
    assert type(processor).__name__ == "Qwen2AudioProcessor"
    processor.save_pretrained(tmp_path)
    again = Qwen2AudioProcessor.from_pretrained(tmp_path)
    assert not is_protected(again)
    assert again.to_dict() == built()[1].to_dict() | {"processor_class": "Qwen2AudioProcessor"}
    for made in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):
        assert is_protected(made) and CLIPS in ask(made, [clip(1)])


def test_protecting_twice_changes_nothing(guarded):
    _, processor = guarded
    once = type(processor), type(processor.feature_extractor)
    assert protect(processor) is processor
    assert (type(processor), type(processor.feature_extractor)) == once
    assert len(ask(processor, [clip(1)])[CLIPS]) == 1


def test_other_processors_of_the_class_stay_as_they_are(guarded):
    assert CLIPS not in ask(built()[1], [clip(1)])


def test_text_alone_carries_nothing(guarded):
    model, processor = guarded
    inputs = ask(processor, [])
    assert CLIPS not in inputs
    assert find_media(inputs, model.config) is None


def test_only_processors_of_sounds_are_protected():
    _, processor = COVERED["llava"].build()
    assert not takes_sounds(processor)
    with pytest.raises(ConfigError, match="no feature extractor for sounds"):
        protect(processor)


def test_clips_reach_the_device_and_precision_of_the_model(guarded):
    model, processor = guarded
    inputs = ask(processor, [clip(1)]).to("cpu", torch.bfloat16)
    sounds = find_media(inputs, model.config).sounds
    noisy = WaveformNoise(sounds, sigma=0.1, snr=None, seed=0).copies([1, 2])
    assert [one.dtype for one in noisy] == [torch.bfloat16] * 2
    assert all(one.shape == inputs["input_features"].shape for one in noisy)


# -- who takes it ------------------------------------------------------------------------------------------------------


def test_a_generate_without_the_override_refuses_the_clips(guarded):
    model, processor = guarded
    inputs = ask(processor, [clip(1)])
    hf_integration.disable()
    try:
        with pytest.raises(ValueError, match=CLIPS):
            model.generate(**inputs, **SETTINGS)
    finally:
        hf_integration.enable()


@pytest.mark.parametrize("asked", [{}, {"smoothguard": False}])
def test_without_a_defence_the_answer_is_the_plain_one(plain, asked):
    model, processor = plain
    expected = model.generate(**ask(processor, [clip(1)]), **SETTINGS)
    assert torch.equal(model.generate(**ask(protect(processor), [clip(1)]), **SETTINGS, **asked), expected)


def test_token_level_and_early_stop_take_sounds(guarded):
    model, processor = guarded
    inputs = ask(processor, [clip(1)])
    whole = model.generate(**inputs, **SETTINGS, smoothguard=DEFENSE)
    stopped = model.generate(**inputs, **SETTINGS, smoothguard=DEFENSE | {"early_stop": "exact"})
    assert torch.equal(whole, stopped)
    agreed = model.generate(
        **inputs, **SETTINGS, smoothguard=DEFENSE | {"level": "token"}, return_dict_in_generate=True
    )
    assert agreed.smoothguard[0].num_samples_used == 4


def test_small_batches_of_copies_give_the_answers_of_one_large_one(guarded):
    model, processor = guarded
    inputs = ask(processor, [clip(1)])
    told = {"return_dict_in_generate": True, **SETTINGS}
    whole = model.generate(**inputs, **told, smoothguard=DEFENSE)
    parts = model.generate(**inputs, **told, smoothguard=DEFENSE | {"max_copies_per_batch": 1})
    assert whole.smoothguard[0].candidates == parts.smoothguard[0].candidates


def test_a_rows_noise_hangs_on_no_neighbour(guarded):
    model, processor = guarded
    prompt = "<s>USER: <|audio_bos|><|AUDIO|><|audio_eos|> What is it? ASSISTANT:"
    given = {"sampling_rate": RATE, "padding": True, "return_tensors": "pt"}
    together = processor(text=[prompt, prompt], audio=[clip(1), clip(2)], **given)
    alone = processor(text=[prompt], audio=[clip(2)], **given)
    noise = [
        WaveformNoise(find_media(one, model.config).sounds, sigma=0.1, snr=None, seed=3).clips(1)[-1]
        for one in (together, alone)
    ]
    assert np.array_equal(*noise)


def test_every_sound_of_a_batch_is_of_its_own_row(guarded):
    """Equal sounds share their noise across rows, and not within one: so a row is answered as it is alone."""
    model, processor = guarded
    given = {"sampling_rate": RATE, "padding": True, "return_tensors": "pt"}
    rows = [
        ("Is there a tone?", [clip(1)]),
        ("What is it?", [clip(2), clip(1), clip(1)]),
        ("Describe it.", [clip(1, 0.5), clip(1)]),
    ]

    def asked(*rows):
        sound = "<|audio_bos|><|AUDIO|><|audio_eos|>"
        texts = [f"<s>USER: {sound * len(sounds)} {text} ASSISTANT:" for text, sounds in rows]
        return processor(text=texts, audio=[one for _, sounds in rows for one in sounds], **given)

    def answers(inputs):
        out = model.generate(**inputs, **SETTINGS, smoothguard=DEFENSE, return_dict_in_generate=True)
        return [verdict.candidates for verdict in out.smoothguard]

    together, alone = asked(*rows), [asked(row) for row in rows]
    sounds = find_media(together, model.config).sounds
    assert sounds.rows == (0, 1, 1, 1, 2, 2)
    noisy = [
        WaveformNoise(find_media(one, model.config).sounds, sigma=0.3, snr=None, seed=0).clips(1)
        for one in (together, *alone)
    ]
    assert all(map(np.array_equal, noisy[0], [one for row in noisy[1:] for one in row]))
    first, _, equal, again, _, other = noisy[0]
    assert np.array_equal(first, equal) and np.array_equal(first, other) and not np.array_equal(equal, again)
    found = answers(together)
    assert found == [candidates for one in alone for candidates in answers(one)]
    assert any(len(set(candidates[1:])) > 1 for candidates in found), "all copies answer alike: nothing was tested"


# -- the noise ---------------------------------------------------------------------------------------------------------


def sounds_of(guarded, *clips):
    model, processor = guarded
    return find_media(ask(processor, list(clips)), model.config).sounds


def test_noise_has_the_amplitude_asked_for(guarded):
    noise = WaveformNoise(sounds_of(guarded, clip(1)), sigma=0.05, snr=None, seed=0)
    offsets = np.stack([noise.clips(number)[0] - clip(1) for number in range(1, 9)])
    assert offsets.std() == pytest.approx(0.05, rel=0.01)
    assert abs(np.corrcoef(offsets)[np.triu_indices(8, 1)]).max() < 0.05, "copies share their noise"


def test_noise_stands_the_asked_decibels_below_each_clip(guarded):
    quiet, loud = clip(1), 3 * clip(2)
    noise = WaveformNoise(sounds_of(guarded, quiet, loud), sigma=9.0, snr=20.0, seed=0)
    for clean, noisy in zip((quiet, loud), noise.clips(1), strict=True):
        ratio = np.mean(clean**2) / np.mean((noisy - clean) ** 2)
        assert 10 * np.log10(ratio) == pytest.approx(20, abs=0.2)


def test_equal_clips_of_a_row_have_noise_of_their_own(guarded):
    first, second = WaveformNoise(sounds_of(guarded, clip(1), clip(1)), sigma=0.1, snr=None, seed=0).clips(1)
    assert not np.array_equal(first, second)


def test_an_attackers_draws_are_of_the_same_noise(guarded):
    clips = torch.from_numpy(np.stack([clip(1), clip(2)])).requires_grad_()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    noisy = draw_waveform_noise(clips, generators, SmoothGuardConfig(audio_sigma=0.05))
    assert float((noisy - clips).detach().std()) == pytest.approx(0.05, rel=0.02)
    noisy.sum().backward()
    assert torch.equal(clips.grad, torch.ones_like(clips))


# -- what is refused ---------------------------------------------------------------------------------------------------


def verdicts(model, inputs):
    return model.generate(**inputs, **SETTINGS, smoothguard=DEFENSE, return_dict_in_generate=True).smoothguard


def refused(guarded, inputs, words, **asked):
    model, _ = guarded
    with pytest.raises(UndefendableError, match=words):
        model.generate(**inputs, **SETTINGS, smoothguard=DEFENSE | asked)


def test_features_without_their_clips_are_refused(guarded):
    inputs = dict(ask(guarded[1], [clip(1)]))
    del inputs[CLIPS]
    refused(guarded, inputs, r"hf_integration.protect\(processor\)")


def test_features_of_other_clips_are_refused(guarded):
    inputs = ask(guarded[1], [clip(1)])
    inputs["input_features"] = ask(guarded[1], [clip(2)])["input_features"]
    refused(guarded, inputs, "not what its clips gave")


def test_clips_without_features_are_refused(guarded):
    inputs = dict(ask(guarded[1], [clip(1)]))
    del inputs["input_features"]
    refused(guarded, inputs, "came without features")


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (np.full(RATE, np.nan, np.float32), "sound 1 holds NaN or Inf, the first at sample 1 of 16000"),
        ((clip(1) * 32768).astype(np.int16), "int16 samples"),
        (np.sign(clip(1)).astype(np.int8), "int8 samples"),
        (clip(1) / np.abs(clip(1)).max() * 2, r"reaches 2; expected samples of full scale 1, .* peaks of at most 1\.5"),
    ],
    ids=["nan", "16-bit", "whole-numbers", "loud"],
)
def test_clips_that_no_noise_can_be_added_to_are_refused(guarded, spoilt, words):
    refused(guarded, ask(guarded[1], [spoilt]), words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_sample_that_is_not_finite_is_named(guarded, value):
    """By its sound's number and its own, from 1."""
    spoilt = clip(2, 0.5)
    spoilt[[1233, 4000]] = value
    inputs = ask(guarded[1], [clip(1), spoilt])
    refused(guarded, inputs, "sound 2 holds NaN or Inf, the first at sample 1234 of 8000; .* Check the recording")


def test_features_that_are_not_finite_though_their_clips_are_are_refused_as_such(guarded):
    inputs = ask(guarded[1], [clip(1)])
    inputs["input_features"][0, 0, 0] = np.nan
    refused(guarded, inputs, "input_features holds NaN or Inf")


def test_peaks_up_to_one_and_a_half_are_let_through(guarded):
    loud = clip(1) / np.abs(clip(1)).max()
    assert verdicts(guarded[0], ask(guarded[1], [1.49 * loud]))
    refused(guarded, ask(guarded[1], [1.51 * loud]), r"reaches 1\.51; .* at most 1\.5")


def test_noise_of_no_amplitude_is_said_of_sounds_and_only_of_them(guarded):
    model, processor = guarded
    inputs = ask(processor, [clip(1)])

    def warnings(**config):
        asked = {"smoothguard": DEFENSE | config, "return_dict_in_generate": True}
        return " ".join(model.generate(**inputs, **SETTINGS, **asked).smoothguard[0].warnings)

    assert "audio_sigma is 0; expected more" in (said := warnings(audio_sigma=0)) and "set audio_sigma=0.02" in said
    assert "defends nothing" not in warnings(audio_sigma=0, audio_snr=10.0)
    assert "defends nothing" not in warnings(sigma=0)


# -- too short to be heard ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 200, 400, 960])
def test_a_sound_too_short_for_the_model_is_refused_with_the_length_that_is_not(guarded, count):
    """The shortest that is taken is the shortest that the model answers: one sample less, and it fails."""
    model, processor = guarded
    inputs = ask(processor, [np.zeros(count, np.float32)])
    with pytest.raises(UndefendableError, match=rf"sound 1 has {count} samples \(") as refused:
        verdicts(model, inputs)
    found = re.search(r"expected at least (\d+) \(([\d.]+) seconds\)", str(refused.value))
    least = int(found[1])
    assert float(found[2]) == pytest.approx(least / RATE)
    assert verdicts(model, ask(processor, [clip(1)[:least]]))
    with pytest.raises(TypeError):
        model.generate(**ask(built()[1], [clip(1)[: least - 1]]), **SETTINGS)


def test_the_short_sound_among_others_is_named(guarded):
    model, processor = guarded
    with pytest.raises(UndefendableError, match=r"sound 2 has 200 samples \(0\.0125 seconds\), .* no audio token"):
        verdicts(model, ask(processor, [clip(1), clip(2)[:200]]))
    assert verdicts(model, ask(processor, [clip(1), clip(2)[:400]]))  # one token suffices beside a sound of more


def test_the_shortest_sound_hangs_on_the_model():
    """MOSS's processor fails; GLM-ASR answers as if there were no sound, and undefended it still may."""
    given = {"sampling_rate": RATE, "return_tensors": "pt"}
    processor = protect(moss_transcribe_diarize()[1])
    with pytest.raises(UndefendableError, match=r"sound 1 has 1 samples.* at least 2 \("):
        processor(text=["<|audio_pad|> What is it?"], audio=[clip(1)[:1]], **given)
    assert CLIPS in processor(text=["<|audio_pad|> What is it?"], audio=[clip(1)[:2]], **given)
    model, processor = glmasr()
    short = protect(processor)(text=["<|pad|> What is it?"], audio=[clip(1)[:960]], **given)
    with pytest.raises(UndefendableError, match=r"sound 1 has 960 samples.* at least 961 \("):
        model.generate(**short, **SETTINGS, smoothguard=DEFENSE)
    assert len(model.generate(**short, **SETTINGS))


def test_an_empty_sound_that_a_processor_fills_up_is_refused_by_the_defence():
    model, processor = qwen3_asr()
    inputs = hears("<|audio_pad|>")(protect(processor), [([np.zeros(0, np.float32)], "What is it?")])
    with pytest.raises(UndefendableError, match="sound 1 is empty"):
        model.generate(**inputs, **SETTINGS, smoothguard=DEFENSE)


def test_silence_has_no_noise_below_its_power(guarded):
    inputs = ask(guarded[1], [np.zeros(RATE, np.float32)])
    refused(guarded, inputs, "silent", audio_snr=20.0)
    guarded[0].generate(**inputs, **SETTINGS, smoothguard=DEFENSE)  # noise of a set amplitude is noise


def test_another_sampling_rate_is_refused(guarded):
    with pytest.raises(ValueError, match="sampling rate"):
        ask(guarded[1], [clip(1)], sampling_rate=44100)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("several", [False, True])
def test_channels_are_refused_with_the_mend_for_their_axis(guarded, axis, several):
    """soundfile has them behind the samples, torchaudio before."""
    stereo = np.stack([clip(1), clip(2)], axis=axis)
    with pytest.raises(UndefendableError, match=rf"sound {several + 1} has the shape .* one channel") as refused:
        ask(guarded[1], [clip(3), stereo] if several else [stereo])
    mixed = stereo.mean(int(re.search(r"sound\.mean\((\d)\)", str(refused.value))[1]))
    assert mixed.shape == (RATE,) and CLIPS in ask(guarded[1], [mixed])


def test_a_clip_written_over_after_the_call_is_the_one_that_was_processed(guarded):
    buffer = clip(1).copy()
    inputs = ask(guarded[1], [buffer])
    buffer[:] = clip(2)
    again = ask(guarded[1], [clip(1)])
    assert np.array_equal(inputs[CLIPS].clips[0], clip(1))
    ours, theirs = (verdicts(guarded[0], one) for one in (inputs, again))
    assert ours[0].candidates == theirs[0].candidates


def test_features_changed_in_place_are_refused(guarded):
    inputs = ask(guarded[1], [clip(1)])
    inputs["input_features"] += 0.5
    refused(guarded, inputs, "not what its clips gave")


def test_inputs_may_be_sent_to_a_device_entry_by_entry(guarded):
    inputs = {name: value.to("cpu") for name, value in ask(guarded[1], [clip(1)]).items()}
    assert len(verdicts(guarded[0], inputs)[0].candidates) == DEFENSE["num_samples"]


def test_outputs_of_two_calls_put_into_one_batch_are_defended_as_one_call_is(guarded):
    """As pipelines put them together: tensors one below the other, everything else in a list."""
    model, processor = guarded
    one, two = ask(processor, [clip(1)]), ask(processor, [clip(2)])
    asked = processor.tokenizer.decode(one["input_ids"][0])
    both = dict(ask(processor, [clip(1), clip(2)]))
    both |= {name: torch.cat([one[name], two[name]]) for name in ("input_ids", "attention_mask")}
    assert asked.count("<|AUDIO|>") * 2 == int((both["input_ids"] == model.config.audio_token_id).sum())
    put = {
        name: [one[name], two[name]] if name == CLIPS else torch.cat([one[name], two[name]]) for name in one
    }  # fmt: skip
    ours, theirs = (verdicts(model, given) for given in (put, both))
    assert [verdict.candidates for verdict in ours] == [verdict.candidates for verdict in theirs]
    put[CLIPS] = put[CLIPS][::-1]
    refused(guarded, put, "not what its clips gave")


def test_outputs_that_are_no_tensors_are_refused_by_what_they_are(guarded):
    refused(guarded, ask(guarded[1], [clip(1)], return_tensors="np"), "return_tensors='pt'")


def test_a_failed_call_leaves_nothing_behind(guarded):
    with pytest.raises(ValueError, match="sampling rate"):
        ask(guarded[1], [clip(1)], sampling_rate=44100)
    assert len(ask(guarded[1], [clip(2)])[CLIPS]) == 1


def test_what_the_model_does_not_hear_gets_no_noise_and_is_said(guarded, caplog):
    carried = ask(guarded[1], [clip(1, 60.0)])[CLIPS]
    assert [len(one) for one in carried.clips] == [2 * RATE]
    assert "60.0 seconds is cut to the 2.0" in caplog.text
    noisy = WaveformNoise(
        find_media(ask(guarded[1], [clip(1, 60.0)]), guarded[0].config).sounds, sigma=0.1, snr=None, seed=0
    )
    assert noisy.copies([1])[0].shape == carried.features.shape


def test_a_long_clip_in_windows_is_noised_in_all_of_them():
    model, processor = audioflamingo3()
    inputs = protect(processor)(
        text=["<s>USER: <sound> What is it? ASSISTANT:"], audio=[clip(1, 5.0)], sampling_rate=RATE, return_tensors="pt"
    )
    sounds = find_media(inputs, model.config).sounds
    noise = WaveformNoise(sounds, sigma=0.1, snr=None, seed=0)
    assert [len(one) for one in noise.clips(1)] == [2 * RATE, 2 * RATE, RATE]
    changed = noise.copies([1])[0] != sounds.values
    assert changed.flatten(1).float().mean(1).min() > 0.3


def test_a_defence_for_pictures_refuses_sounds(guarded):
    inputs = ask(guarded[1], [clip(1)])
    with pytest.raises(UndefendableError, match="acts on pictures alone"):
        find_images(inputs, guarded[0].config)
    with pytest.raises(UndefendableError, match="acts on pictures alone"):
        guarded[0].generate(**inputs, **SETTINGS, smoothguard={"defense": "feature_smoothing"})


def test_a_video_with_its_sound_is_refused(guarded):
    inputs = {**ask(guarded[1], [clip(1)]), "pixel_values_videos": torch.rand(1, 2, 3, 4, 4)}
    refused(guarded, inputs, "is video")


def test_what_the_processor_gives_as_lists_is_refused(guarded):
    _, processor = guarded
    made = processor.feature_extractor([clip(1)], sampling_rate=RATE, return_tensors="np")
    inputs = {**ask(processor, [clip(1)]), "input_features": list(made["input_features"])}
    refused(guarded, inputs, "is a list")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("audio_sigma", -0.1, "audio_sigma is -0.1"),
        ("audio_sigma", 2, "full scale 1"),
        ("audio_sigma", "loud", "expected a number such as 0.02"),
        ("audio_snr", float("nan"), "audio_snr is nan"),
        ("audio_snr", 500, "in dB"),
    ],
)
def test_settings_of_noise_on_sounds_are_checked(field, value, words):
    with pytest.raises(ConfigError, match=words):
        SmoothGuardConfig(**{field: value})


# -- where it is done for the user -------------------------------------------------------------------------------------


def test_a_pipelines_processor_is_protected_and_let_go_with_the_override():
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration, pipeline

    from lmms_smoothguard.tiny import place

    model = Qwen2AudioForConditionalGeneration.from_pretrained(place("tiny-audio"))
    processor = AutoProcessor.from_pretrained(place("tiny-audio"))
    asked = [{"type": "audio", "audio": clip(1)}, {"type": "text", "text": "Is there a spoken three in the recording?"}]
    pipe = pipeline("any-to-any", model=model, processor=processor, device="cpu")

    def answer():
        return pipe(text=[{"role": "user", "content": asked}], max_new_tokens=8)[0]["generated_text"]

    plain = answer()
    model.generation_config.smoothguard = {"audio_sigma": 0.01, "num_samples": 3}
    with hf_integration.observe() as seen:
        answer()
    assert seen.defended == 1
    model.generation_config.smoothguard = None
    hf_integration.disable()
    try:
        assert not is_protected(processor)
        assert answer() == plain
    finally:
        hf_integration.enable()
