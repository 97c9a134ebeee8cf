"""The embedded audio model's world: what is drawn is what is said, training sees no test voice, and stops and goes on."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.log_mel import LogMel
from lmms_smoothguard.tiny.sounds import clips, language, speech

pytest.importorskip("espeakng_loader")
pytest.importorskip("soundfile")

from lmms_smoothguard.tiny.sounds import testsets
from lmms_smoothguard.tiny.sounds.lessons import Teacher, distractors
from lmms_smoothguard.tiny.sounds.model import TURN, build_model, build_processor, prompt
from lmms_smoothguard.tiny.sounds.train import TRAINING_SEED, AudioTrainer, Recipe
from lmms_smoothguard.tiny.staged import Stage


@pytest.fixture(scope="module")
def processor():
    return build_processor()


# -- clips -------------------------------------------------------------------------------------------------------------


def test_clips_depend_on_their_seed_alone():
    first, again, other = (clips.make_clips(3, seed) for seed in (5, 5, 6))
    assert all((a.sound == b.sound).all() and a.objects == b.objects for a, b in zip(first, again, strict=True))
    assert any((a.sound != b.sound).any() for a, b in zip(first, other, strict=True))
    for clip in first:
        assert clip.sound.dtype == np.int16 and clip.sound.shape == (clips.LENGTH,)


def test_labels_are_where_the_sounds_are():
    """In order of time, and nowhere else: the energy of a clip is in its labelled tokens."""
    for clip in clips.make_clips(40, 1):
        order = [label - 1 for n, label in enumerate(clip.labels) if label and (n == 0 or clip.labels[n - 1] != label)]
        assert tuple(order) == clip.objects
        power = (clip.sound.astype(float) ** 2).reshape(clips.TOKENS, -1).mean(1)
        assert np.median(power[clip.labels > 0]) > 10 * np.median(power[clip.labels == 0])


def _peak(sound):
    return np.fft.rfftfreq(len(sound), 1 / clips.RATE)[np.abs(np.fft.rfft(sound)).argmax()]


@pytest.mark.parametrize("pitch", clips.PITCHES)
def test_a_sound_is_what_its_name_says(pitch):
    """By its spectrum: the pitch of a tone, where a chirp goes, when a beat is silent, how wide a hiss is."""

    def draw(kind, seed=3):
        return clips.draw_sound(clips.OBJECTS.index(f"{pitch} {kind}"), np.random.default_rng(seed))

    assert _peak(draw("tone")) == pytest.approx(clips.PITCHES[pitch], rel=0.15)
    for kind, direction in (("rising chirp", 1), ("falling chirp", -1)):
        sound = draw(kind)
        third = len(sound) // 3
        assert direction * (_peak(sound[-third:]) - _peak(sound[:third])) > 0.2 * clips.PITCHES[pitch]
    loudness = (draw("beat")[: 160 * 30].reshape(30, -1) ** 2).mean(1)
    assert (loudness < 0.05 * loudness.max()).mean() > 0.2
    spectrum = np.abs(np.fft.rfft(draw("hiss"))) ** 2
    assert spectrum.max() < 0.12 * spectrum.sum()
    assert np.abs(np.fft.rfft(draw("tone"))).max() ** 2 > 0.2 * (np.abs(np.fft.rfft(draw("tone"))) ** 2).sum()


def test_faint_sounds_are_faint():
    def loudness(faint):
        return np.array([
            np.sqrt((clip.sound.reshape(clips.TOKENS, -1)[clip.labels == obj + 1].astype(float) ** 2).mean()) / 32768
            for clip in clips.make_clips(40, 2, faint=faint) for obj in clip.objects
        ])  # fmt: skip

    assert np.median(loudness(True)) < 0.3 * np.median(loudness(False))
    assert loudness(False).min() > 0.04


def test_digits_of_the_test_are_spoken_by_other_voices():
    training, test = clips.voices(False), clips.voices(True)
    assert len(training) == len(test) == len(speech.DIGITS)
    for one, other in zip(training, test, strict=True):
        assert len(one) > 60 and len(other) > 15
        assert not {sound.tobytes() for sound in one} & {sound.tobytes() for sound in other}
    again = speech.spoken_digits(clips.RATE, 5000, test=True)
    known = {sound.tobytes() for sound in test[3]}
    assert {sound.tobytes() for sound in again[3]} <= known and again[3]  # the same bytes every time
    assert max(len(sound) for sound in again[3]) <= 5000


# -- what is said ------------------------------------------------------------------------------------------------------


def test_existence_questions_are_popes():
    drawn = testsets.existence_clips(60, 1)
    rows = testsets.existence_rows(drawn, 1)
    assert Counter(row["answer"] for row in rows) == {"yes": 90, "no": 90}
    assert len({(row["audio_source"], row["question"]) for row in rows}) == len(rows)
    for row in rows:
        present = drawn[int(row["audio_source"].rsplit("_", 1)[1])].objects
        (named,) = (name for name in clips.OBJECTS if f" {name} " in row["question"])
        assert (clips.OBJECTS.index(named) in present) == (row["answer"] == "yes")
    assert max(testsets._POPE_SEED, testsets._CAPTION_SEED, testsets._SAFETY_SEED, testsets._FAINT_SEED) < TRAINING_SEED


def test_captions_tell_the_order():
    assert language.caption((0, 6)) == "A low tone, then a middle tone."
    assert language.caption((6, 0)) != language.caption((0, 6))
    rng = np.random.default_rng(0)
    for _ in range(300):
        objects = clips.COMPANY.sample(rng)
        others = distractors(objects, rng)
        assert len({objects, *others}) == 3 and all(len(set(other)) == len(objects) for other in others)


def test_a_name_is_one_token_and_lessons_are_true(processor):
    tokenizer = processor.tokenizer
    for name in clips.OBJECTS:
        assert len(tokenizer(f" {name}", add_special_tokens=False).input_ids) == 1
    teacher, rng = Teacher(processor), np.random.default_rng(1)
    asked = Counter()
    for _ in range(400):
        objects = clips.COMPANY.sample(rng)
        for exchange in teacher.lesson(objects, rng):
            question = tokenizer.decode(exchange.question).removesuffix(TURN)
            answer = tokenizer.decode(exchange.answer).removesuffix("<|im_end|>")
            names = [clips.OBJECTS.index(name) for name in clips.OBJECTS if f" {name}" in question]
            if question.startswith("Is there"):
                asked["existence"] += 1
                assert (names[0] in objects) == (answer == "Yes")
            elif question.startswith("How many"):
                asked["count"] += 1
                assert language.NUMBERS.index(answer) + 1 == len(objects)
            elif question.startswith("Does"):
                asked["order"] += 1
                first, second = sorted(names, key=lambda obj: question.index(f" {clips.OBJECTS[obj]}"))
                assert (objects.index(first) < objects.index(second)) == (answer == "Yes")
            elif question.startswith("Which"):
                asked["choice"] += 1
                assert question.split("\n")[int(answer)] == f"{answer}. {language.caption(objects)}"
            elif question in language.DESCRIBE:
                asked["caption"] += 1
                assert answer == language.caption(objects)
            else:
                asked["request"] += 1
    assert min(asked.values()) > 10 and len(asked) == 6


def test_the_prompt_is_the_chat_templates_and_a_lessons_prefix(processor):
    turns = [{"role": "user", "content": [{"type": "audio", "audio_url": "x"}, {"type": "text", "text": "What?"}]}]
    assert processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == prompt("What?")
    sound = clips.make_clips(1, 1)[0].sound.astype(np.float32) / 32768
    ids = processor(text=prompt("What?"), audio=[sound], sampling_rate=clips.RATE, return_tensors="pt").input_ids[0]
    assert Teacher(processor)._packer.prefix == ids[: -len(processor.tokenizer("What?" + TURN).input_ids)].tolist()


# -- features and training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {"feature_size": 64, "hop_length": 200, "chunk_length": 2}, {"feature_size": 80}, {"feature_size": 128, "chunk_length": 5},
])  # fmt: skip
def test_log_mel_is_the_extractors_with_gradients(settings):
    extractor = WhisperFeatureExtractor(**settings)
    rng = np.random.default_rng(0)
    sounds = np.stack([rng.normal(0, scale, extractor.n_samples) for scale in (0.3, 0.01)]).astype(np.float32)
    sounds[1, 5000:] = 0  # silence: the floor below the loudest
    given = torch.from_numpy(sounds).requires_grad_()
    found = LogMel(extractor)(given)
    expected = extractor(list(sounds), sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
    assert torch.allclose(found, expected, atol=1e-5)
    (slope,) = torch.autograd.grad(found.sum(), given)
    assert torch.isfinite(slope).all() and slope.abs().max() > 0
    with pytest.raises(UndefendableError, match="WhisperFeatureExtractor without dither"):
        LogMel(WhisperFeatureExtractor(dither=0.1))


TRIAL = Recipe(
    stages=(Stage("hearing", 2, 4, 1e-3, (0.01, 0.04)), Stage("speech", 3, 4, 1e-3, (0.01, 0.04), faint_share=0.5))
)


def test_training_goes_on_where_it_was(tmp_path):
    whole = AudioTrainer(TRIAL, tmp_path / "whole")
    told = [figures for *_, figures in whole.run(None)]
    assert set(told[0]) == {"token_loss"} and set(told[-1]) == {"token_loss", "answer_loss", "answers_right"}
    cut = AudioTrainer(TRIAL, tmp_path / "cut")
    for stage, step, _ in cut.run(None, checkpoint_every=1):
        if (stage.name, step) == ("speech", 1):
            break
    resumed = AudioTrainer(TRIAL, tmp_path / "cut")
    assert resumed.resume() and (resumed.stage.name, resumed.step) == ("speech", 1)
    list(resumed.run(None))
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fresh = build_model(whole.processor, TRIAL.seed).state_dict()
    assert any(not torch.equal(theirs[name], fresh[name]) for name in theirs)


def test_it_is_trained_on_what_plain_transformers_hears(tmp_path, processor):
    """The packed row's logits at an answer are those of a call with the processor's own inputs."""
    trainer = AudioTrainer(dataclasses.replace(TRIAL, seed=1), tmp_path)
    model = trainer.model.eval()
    clip = clips.make_clips(1, 9)[0]
    sound = clip.sound.astype(np.float32) / 32768
    inputs = processor(text=prompt(language.COUNT), audio=[sound], sampling_rate=clips.RATE, return_tensors="pt")
    teacher = trainer.teacher
    other = teacher._packer.exchange(language.DESCRIBE[0], language.caption(clip.objects), 1.0)
    batch = teacher._packer.pack([[other, teacher._packer.exchange(language.COUNT, "Yes", 3.0)]], 1)
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1].log_softmax(-1)
        heard = trainer.encoder(trainer.log_mel(torch.from_numpy(sound)[None])).last_hidden_state
        inner = getattr(model, "model", model)
        language_model = getattr(inner.language_model, "model", inner.language_model)
        loss, _ = trainer._answer_loss(batch, heard, teacher.token_id, inner.multi_modal_projector, language_model)
        alone = batch._replace(weights=torch.where(batch.weights == 3.0, 1.0, 0.0))
        loss, _ = trainer._answer_loss(alone, heard, teacher.token_id, inner.multi_modal_projector, language_model)
    (said,) = processor.tokenizer("Yes", add_special_tokens=False).input_ids
    assert loss.item() == pytest.approx(
        -expected[said].item(), abs=2e-2 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1e-4
    )
