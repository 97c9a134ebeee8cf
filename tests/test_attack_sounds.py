"""Attacks on sounds: waveforms within their budget, through the model's own features, stored as the WAV that is scored."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_models import sounds as models

from lmms_smoothguard.attacks.base import value_and_gradients
from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.model_state import rows_apart
from lmms_smoothguard.attacks.objective import AnswerLoss, Threat
from lmms_smoothguard.attacks.pgd import PGD
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.sound_clips import in_16_bits, sound_slots
from lmms_smoothguard.attacks.sound_rendering import SoundRenderer
from lmms_smoothguard.attacks.universal import with_change
from lmms_smoothguard.attacks.universal_sounds import SoundLesson, UniversalSoundCrafter
from lmms_smoothguard.choice import choose
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import AttackError, ConfigError
from lmms_smoothguard.sounds import Sound, read_clip

pytest.importorskip("soundfile")

RATE, WINDOW = 16000, 32000
LOUD = 0.0005


def clip(seed, samples=20000, gain=1.0):
    """A tone in faint noise, in 16 bits."""
    rng = np.random.default_rng(seed)
    wave = 0.2 * np.sin(2 * np.pi * rng.uniform(200, 2000) * np.arange(samples) / RATE) + 0.02 * rng.normal(
        size=samples
    )
    return Sound.from_pcm(Sound((gain * wave).astype(np.float32), RATE).pcm, RATE)


@pytest.fixture(scope="module")
def hearing():
    return models.qwen2_audio()


@pytest.fixture
def heard(hearing):
    """What the ordinary path makes of sounds and a question."""
    _, processor = hearing

    def make(sounds, text="What is this?"):
        prompt = f"<s>USER: {'<|audio_bos|><|AUDIO|><|audio_eos|>' * len(sounds)}\n{text} ASSISTANT:"
        waves = [sound.samples for sound in sounds]
        return dict(processor(text=[prompt], audio=waves, sampling_rate=RATE, return_tensors="pt"))

    return make


@pytest.fixture
def logits(hearing, heard):
    """At the answer's first token, through the ordinary path."""

    def make(sounds):
        with torch.no_grad():
            return hearing[0](**heard(sounds)).logits[0, -1]

    return make


@pytest.fixture
def job(heard, logits):
    """Away from the model's own first word."""

    def make(*sounds, **settings):
        answer = (int(logits(sounds).argmax()),)
        return Job(AttackSettings.parse({"eps": LOUD, "steps": 3}, settings), (), heard(sounds), answer, sounds)

    return make


@pytest.fixture
def margin(logits):
    """By how much another token beats the answer."""

    def make(job, sounds):
        found = logits(sounds).clone()
        right = float(found[job.answer[0]])
        found[job.answer[0]] = -torch.inf
        return float(found.max()) - right

    return make


@pytest.fixture
def crafter(hearing, tmp_path):
    def make(defense=None, batch_size=32, where="crafted", processor=None):
        cache = AttackCache(tmp_path / where)
        return Crafter(hearing[0], processor or hearing[1], cache, defense, batch_size, quiet=True)

    return make


def renderer_of(hearing):
    return SoundRenderer(hearing[1], torch.device("cpu"), torch.float32)


def threat_of(hearing, job, **extra):
    renderer, clean = renderer_of(hearing), sound_slots([job.sounds], torch.device("cpu"))
    renderer.check(clean, job.inputs, renderer.key)
    prompt = {key: value for key, value in job.inputs.items() if key != renderer.key}
    return Threat(hearing[0], hearing[1], renderer, clean, [prompt], [job.answer], **extra)


def changes(entry, job):
    """In steps of 16 bits, a clip each."""
    return [new.pcm.astype(int) - old.pcm.astype(int) for new, old in zip(entry.sounds, job.sounds, strict=True)]


# -- features and gradients --------------------------------------------------------------------------------------------


def test_gradients_agree_with_finite_differences(hearing, job):
    one = job(clip(1), clip(2, 9000))
    loss = AnswerLoss(threat_of(hearing, one), "ce")
    clean = sound_slots([one.sounds], torch.device("cpu"))
    _, gradients = value_and_gradients(loss, clean, first=True)
    assert [tuple(slot.shape) for slot in gradients] == [(1, 20000), (1, 9000)]  # nothing of the padding
    length = torch.cat([slot.flatten() for slot in gradients]).norm()
    step, directions = 2e-3, [slot / length for slot in gradients]
    with torch.no_grad():
        ahead, behind = (
            loss(tuple(slot + sign * step * way for slot, way in zip(clean, directions, strict=True)))
            for sign in (1, -1)
        )
    assert float(ahead - behind) / (2 * step) == pytest.approx(float(length), rel=0.05)


@pytest.mark.parametrize("build", ["glmasr", "voxtral"])
def test_windows_are_cut_as_the_processor_cuts_them(build):
    """Five seconds in windows of two; in each the loudest differs, which a spectrum of the whole has but one of."""
    (kind,) = (kind for kind in models.KINDS if kind.name == build)
    _, processor = kind.build()
    sound = clip(1, 5 * RATE)
    sound.samples[40000:] *= 1e-3
    asked = kind.inputs(processor, [([sound.samples], "What?")])
    assert len(asked["input_features"]) > 1
    renderer = SoundRenderer(processor, torch.device("cpu"), torch.float32)
    slots = sound_slots([[sound]], torch.device("cpu"))
    (gap,) = renderer.check(slots, asked, "input_features")
    assert gap < 1e-4
    again = renderer((torch.cat(slots * 3),))["input_features"]
    assert torch.allclose(again, asked["input_features"].repeat(3, 1, 1), atol=1e-3)


def test_another_preprocessing_is_noticed(crafter, job):
    one = job(clip(1))
    for name, other in (("louder", clip(1, gain=1.1)), ("later", Sound(np.roll(clip(1).samples, 400), RATE))):
        with pytest.raises(AttackError, match="does not reproduce input_features"):
            crafter().craft([Job(one.settings, (), one.inputs, one.answer, (other,))])
            pytest.fail(name)
    slow = Sound(clip(1).samples, 8000)
    with pytest.raises(AttackError, match="rate of 8000 Hz, and the model hears 16000 Hz"):
        crafter().craft([Job(one.settings, (), one.inputs, one.answer, (slow,))])


def test_other_extractors_are_refused(crafter, job):
    one = job(clip(1))
    (kind,) = (kind for kind in models.KINDS if kind.name == "moss_transcribe_diarize")
    with pytest.raises(AttackError, match="MossTranscribeDiarizeFeatureExtractor have no differentiable copy"):
        crafter(processor=kind.build()[1]).craft([one])


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pgd", "apgd"])
@pytest.mark.parametrize("budget", [
    {"eps": 1 / 32768}, {"eps": LOUD}, {"eps": 0.05, "norm": "l2"}, {"snr": 40, "norm": "l2"},
])  # fmt: skip
def test_the_budget_holds_in_16_bits_clip_by_clip(crafter, job, name, budget):
    sounds = clip(3), clip(4, 9000, gain=0.1)
    one = job(*sounds, name=name, **budget)
    (entry,) = crafter().craft([one])
    for change, sound, told in zip(changes(entry, one), sounds, entry.record["snr_db"], strict=True):
        size, length = np.linalg.norm(change / 32768), np.linalg.norm(sound.samples.astype(float))
        if "snr" in budget:
            assert 40 <= told < 46
        elif "norm" in budget:
            assert 0.3 * 0.05 < size <= 0.05 + 1e-6
        else:
            assert 0 < np.abs(change).max() <= budget["eps"] * 32768 + 1e-6
        assert told == pytest.approx(20 * np.log10(length / size), abs=1e-3)
    assert entry.record["linf"] == pytest.approx(max(np.abs(change).max() for change in changes(entry, one)) / 32768)
    assert entry.record["rate"] == RATE
    assert entry.sounds[0].rate == RATE


@pytest.mark.parametrize("seed", range(8))
def test_rounding_stays_inside_and_keeps_most_of_a_faint_change(seed):
    torch.manual_seed(seed)
    clean = in_16_bits((torch.randn(3, 5000) * 10 ** -(seed / 2),))[0]
    for settings in (
        AttackSettings(eps=LOUD), AttackSettings(eps=0.01, norm="l2"), AttackSettings(snr=30.0, norm="l2"),
    ):  # fmt: skip
        attack = PGD(settings)
        found = attack.to_whole_steps(attack.project(clean + torch.randn(clean.shape), clean), clean)
        assert ((found * 32768) % 1 == 0).all()
        assert found.min() >= -1 and found.max() <= 32767 / 32768
        assert in_16_bits((found,))[0].equal(found)
        attack.distances_within((found,), (clean,))
        if settings.norm == "l2" and clean.abs().max() < 0.9:
            room = torch.as_tensor(attack.radius(clean)).flatten().expand(3)
            kept = (found - clean).norm(dim=1) / room
            assert (kept[room * 32768 > 70] > 0.7).all()  # 70 steps over 5000 samples: one each


def test_full_scale_is_not_passed(crafter, job):
    pcm = np.tile(np.array([32767, -32768, 30000, -30000], np.int16), 4000)
    one = job(Sound.from_pcm(pcm, RATE), eps=0.01, random_start=False, steps=2)
    (entry,) = crafter().craft([one])
    moved = entry.sounds[0].pcm.astype(int) - pcm
    assert np.abs(moved[2::4]).max() > 50
    assert moved[::4].max() <= 0 and moved[1::4].min() >= 0
    assert moved[::4].min() < 0 < moved[1::4].max()


def test_samples_finer_than_16_bits_are_rounded_first(crafter, heard, job):
    rough = clip(5, 12000)
    fine = Sound(rough.samples + np.float32(0.4 / 32768), RATE)
    one = job(rough, eps=0.0)
    (entry,) = crafter().craft([Job(one.settings, (), heard([fine]), one.answer, (fine,))])
    assert (entry.sounds[0].pcm == rough.pcm).all()
    assert 1e-6 < entry.record["rendering_gap"] < 0.02
    assert entry.record["snr_db"] == [None]


def test_silence_has_no_room_under_snr(crafter, job):
    silent = Sound(np.zeros(9000, np.float32), RATE)
    alone, beside = job(silent, snr=20, norm="l2"), job(clip(1), silent, snr=20, norm="l2")
    first, second = crafter().craft([alone, beside])
    assert not first.sounds[0].pcm.any() and not second.sounds[1].pcm.any()
    assert (second.sounds[0].pcm != clip(1).pcm).any()
    assert second.record["snr_db"][0] >= 20 and second.record["snr_db"][1] is None


# -- what it does to the model -----------------------------------------------------------------------------------------


def test_pgd_leads_away_and_random_noise_of_the_same_size_does_not(crafter, job, margin):
    """Through the ordinary path, from the bytes of the WAV files."""
    listed = [job(clip(seed), steps=12) for seed in range(4)]
    rng = np.random.default_rng(0)
    for one, entry in zip(listed, crafter().craft(listed), strict=True):
        signs = rng.choice([-16, 16], one.sounds[0].pcm.shape)
        noisy = Sound.from_pcm((one.sounds[0].pcm + signs).astype(np.int16), RATE)
        before, noise = margin(one, one.sounds), margin(one, [noisy])
        after = margin(one, [read_clip(sound.wav).mono() for sound in entry.sounds])
        assert after - before > 0.05
        assert after - before > 5 * abs(noise - before)
        assert entry.record["objective"][0] < entry.record["objective"][-1]


def test_the_file_is_the_sound_that_was_crafted(hearing, crafter, job, margin, tmp_path):
    one = job(clip(6), clip(7, 9000))
    (entry,) = crafter().craft([one])
    files = sorted(tmp_path.rglob("*.wav"))
    assert [file.name for file in files] == [f"{entry.key}-0.wav", f"{entry.key}-1.wav"]
    stored = [read_clip(file.read_bytes()).mono() for file in files]
    with torch.no_grad():
        crafted = AnswerLoss(threat_of(hearing, one), "margin")(sound_slots([stored], torch.device("cpu")))
    assert float(crafted) == pytest.approx(margin(one, stored), abs=1e-3)
    assert all((new.pcm == old.pcm).all() for new, old in zip(stored, entry.sounds, strict=True))


def test_gradients_of_a_row_are_the_same_bits_in_any_batch(hearing, job):
    listed = [job(clip(seed)) for seed in range(3)]
    alone = [threat_of(hearing, one) for one in listed]
    joined = {"prompts": [one.prompts[0] for one in alone], "answers": [one.answers[0] for one in alone]}
    together = dataclasses.replace(alone[0], **joined)
    clean = sound_slots([one.sounds for one in listed], torch.device("cpu"))
    with rows_apart(hearing[0]):
        _, (gradients,) = value_and_gradients(AnswerLoss(together, "ce"), clean)
        for threat, slot, row in zip(alone, clean[0], gradients, strict=True):
            _, (expected,) = value_and_gradients(AnswerLoss(threat, "ce"), (slot[None],))
            assert row.equal(expected[0])
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


def test_a_sound_is_a_function_of_its_job_alone(crafter, job):
    listed = [job(clip(seed), steps=4) for seed in range(3)] + [job(clip(9), clip(seed, 9000)) for seed in (3, 4)]
    together = crafter().craft(listed)
    for one, entry in zip(listed, together, strict=True):
        (alone,) = crafter(where="alone", batch_size=1).craft([one])
        assert alone.key == entry.key
        assert all((new.pcm == old.pcm).all() for new, old in zip(alone.sounds, entry.sounds, strict=True))


def test_restarts_and_momentum(crafter, job, margin):
    one, four = (job(clip(2), restarts=count, momentum=0.9) for count in (1, 4))
    single, best = (crafter().craft([each])[0] for each in (one, four))
    assert margin(four, best.sounds) >= margin(one, single.sounds) - 1e-4


# -- EOT ---------------------------------------------------------------------------------------------------------------


def test_eot_goes_through_the_defences_noise_with_draws_of_its_own(crafter, job):
    one = job(clip(1), eot=2, eps=0.002)
    weak, strong = choose({"audio_sigma": 0.001}), choose({"audio_sigma": 0.2})
    entries = [crafter(defense=defense).craft([one])[0] for defense in (weak, strong)]
    known = {"defense": "smoothguard", "audio_sigma": 0.001, "audio_snr": None, "code": None}
    assert entries[0].record["randomness"] == known
    assert (entries[0].sounds[0].pcm != entries[1].sounds[0].pcm).any()
    reseeded = crafter(defense=choose(SmoothGuardConfig(audio_sigma=0.2, seed=99)), where="again").craft([one])[0]
    assert (
        reseeded.sounds[0].pcm == entries[1].sounds[0].pcm
    ).all()  # the evaluation's seed is nothing to the attacker
    assert reseeded.key == entries[1].key
    other = crafter(defense=strong).craft([job(clip(1), eot=2, eps=0.002, seed=1)])[0]
    assert (other.sounds[0].pcm != entries[1].sounds[0].pcm).any()


def test_noise_is_drawn_before_the_features_and_shared_by_restarts(hearing, crafter, job):
    one = job(clip(1), clip(2, 9000), eot=2)
    defended = crafter(defense=choose({"audio_sigma": 0.05}))
    chance = defended._chance(one.settings, ["key"], None, sounds=True)
    clean = sound_slots([one.sounds], torch.device("cpu"))
    twice = chance["jitter"](tuple(torch.cat([slot, slot]) for slot in clean))
    again = chance["jitter"](clean)
    for slot, noisy, later in zip(clean, twice, again, strict=True):
        assert noisy[0].equal(noisy[1])
        assert float((noisy[0] - slot[0]).std()) == pytest.approx(0.05, rel=0.05)
        assert not later[0].equal(noisy[0])
    inputs, draws = threat_of(hearing, one, **chance).rendered(clean)
    first, second = (draw["input_features"] for draw in draws)
    assert not first.equal(second)
    bare, same = threat_of(hearing, one, **chance).rendered(clean, noisy=False)
    assert torch.allclose(bare["input_features"], one.inputs["input_features"], atol=1e-4) and len(same) == 1
    assert inputs["input_features"].equal(first)


def test_eot_needs_a_defence_of_sounds(crafter, job, monkeypatch):
    from lmms_smoothguard import plugins

    with pytest.raises(AttackError, match="attack_eot is 4"):
        crafter().craft([job(clip(1), eot=4)])
    load = plugins.load
    own = load("defenses", "smoothguard")
    deaf = own._replace(randomness=own.randomness._replace(sound=None))
    monkeypatch.setattr(plugins, "load", lambda kind, *rest: deaf if kind == "defenses" else load(kind, *rest))
    with pytest.raises(AttackError, match="defense=smoothguard shows none on sounds"):
        crafter(defense=choose({})).craft([job(clip(1), eot=4)])


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_nothing_is_crafted_twice_and_what_is_damaged_is_made_again(crafter, job, tmp_path, monkeypatch, caplog):
    one = job(clip(1))
    (first,) = crafter().craft([one])
    run = PGD.run
    monkeypatch.setattr(PGD, "run", lambda *a, **k: pytest.fail("crafted again"))
    (again,) = crafter().craft([one])
    assert again.images == () and again.record == first.record and again.sounds[0].rate == RATE
    assert again.sounds[0].samples.tobytes() == first.sounds[0].samples.tobytes()
    monkeypatch.setattr(PGD, "run", run)
    (file,) = tmp_path.rglob("*.wav")
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + b"xy")
    (made,) = crafter().craft([one])
    assert "is not the sound that was written" in caplog.text
    assert file.read_bytes() == whole and (made.sounds[0].pcm == first.sounds[0].pcm).all()
    record = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert record["images"] == [] and len(record["sounds"]) == 1


def test_any_change_of_what_matters_is_another_entry(crafter, job, heard):
    one, maker = job(clip(1)), crafter(defense=choose({}))
    keys = {maker._key(one), maker._key(job(clip(2))), maker._key(job(clip(1), eps=0.001))}
    keys.add(maker._key(Job(one.settings, (), one.inputs, (5,), one.sounds)))
    keys.add(maker._key(Job(one.settings, (), heard([clip(1)], "And this?"), one.answer, one.sounds)))
    keys.add(maker._key(job(clip(1), norm="l2", snr=40)))
    keys |= {crafter(defense=choose({"audio_sigma": sigma}))._key(job(clip(1), eot=1)) for sigma in (0.01, 0.02)}
    assert len(keys) == 8
    same = crafter(defense=choose({"audio_sigma": 0.02, "sigma": 0.3, "seed": 5}))
    assert same._key(job(clip(1), eot=1)) in keys  # nothing of pictures, nor of a seed


# -- settings and refusals ---------------------------------------------------------------------------------------------


def test_snr_stands_in_eps_place():
    settings = AttackSettings.parse({"norm": "l2", "snr": "40"})
    assert settings.snr == 40 and "eps" not in settings.to_dict()
    assert AttackSettings.parse(settings.to_dict()) == settings
    assert "snr" not in AttackSettings().to_dict()
    # Of two layers the later one says how far; within one there is one.
    assert AttackSettings.parse({"eps": 0.001, "norm": "l2"}, {"snr": 30}).snr == 30
    assert AttackSettings.parse({"norm": "l2", "snr": 30}, {"eps": 0.001}).snr is None


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"snr": 40}, "snr is 40, of L2 norms, and norm 'linf'; expected --norm l2, or attack_norm=l2"),
        ({"snr": 40, "eps": 0.01, "norm": "l2"}, "expected one of them"),
        ({"snr": "loud", "norm": "l2"}, "snr is 'loud'; expected -40 to 120 decibels"),
        ({"snr": True, "norm": "l2"}, "snr is True"),
        ({"snr": 1e6, "norm": "l2"}, "expected -40 to 120"),
        ({"name": "square", "snr": 40, "norm": "l2"}, "attack 'square' changes pictures; .*apgd, pgd, universal"),
    ],
)
def test_bad_budgets_are_named(fields, hint):
    with pytest.raises(ConfigError, match=hint):
        AttackSettings.parse(fields)


def test_a_replaced_budget_is_one_too():
    with pytest.raises(ConfigError, match=r"eps is 0\.01 and snr 40"):
        AttackSettings(eps=0.01, snr=40.0, norm="l2")


@pytest.mark.parametrize("name", ["patch", "square", "feature"])
def test_attacks_of_pictures_refuse_sounds(crafter, job, name):
    one = job(clip(1))
    asked = AttackSettings.parse({"name": name, "eps": 0.1})
    with pytest.raises(ConfigError, match=f"attack '{name}' changes pictures.*expected one of apgd, pgd, universal"):
        crafter().craft([Job(asked, (), one.inputs, one.answer, one.sounds)])


def test_what_only_a_job_can_tell(crafter, job, images, batch):
    one, pixels = job(clip(1)), dict(batch(0))

    def craft(settings, pictures, inputs, sounds):
        crafter().craft([Job(AttackSettings.parse(settings), pictures, inputs, one.answer, sounds)])

    with pytest.raises(ConfigError, match=r"eps is 0\.01569, which pictures have by default .*attack_eps=0\.0005"):
        craft("pgd", (), one.inputs, one.sounds)
    with pytest.raises(ConfigError, match="snr is 40, a budget of sounds, and the request has pictures"):
        craft({"norm": "l2", "snr": 40}, (images[0],), pixels, ())
    with pytest.raises(ConfigError, match=r"eps is 0\.0005, less than one grey level"):
        craft({"eps": LOUD}, (images[0],), pixels, ())
    for pictures, inputs in (((images[0],), one.inputs), ((), {**one.inputs, "pixel_values": pixels["pixel_values"]})):
        with pytest.raises(AttackError, match="has pictures and sounds"):
            craft({"eps": LOUD}, pictures, inputs, one.sounds)
    with pytest.raises(AttackError, match=r"has no input_features \(it has input_ids"):
        craft({"eps": LOUD}, (), {"input_ids": pixels["input_ids"]}, one.sounds)


def test_entries_of_sounds_leave_the_model_alone(hearing, crafter, job, unchanged_random_state):
    model, _ = hearing
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    # A protected processor's clips travel beside the features, and no forward pass knows them.
    one = job(clip(1))
    crafter().craft([Job(one.settings, (), {**one.inputs, "smoothguard_clips": object()}, one.answer, one.sounds)])
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before


# -- one change for all ------------------------------------------------------------------------------------------------

CORPUS = [{"instruction": f"Say {word}.", "response": f"{word}."} for word in ("red", "blue", "two circles")]


@pytest.fixture
def change(hearing, heard, tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))

    def make(lengths=(20000, 9000, 20000), defense=None, batch_size=32, where="changes", **fields):
        asked = {"corpus": str(tmp_path / "corpus.json"), "eps": 0.002, "steps": 4, "batch": 3}
        lessons = []
        for seed, (row, length) in enumerate(zip(CORPUS, lengths, strict=True)):
            sounds = (clip(seed, length),)
            ids = hearing[1].tokenizer(row["response"], add_special_tokens=False).input_ids
            lessons.append(SoundLesson(heard(sounds, row["instruction"]), tuple(ids), sounds))
        crafter = UniversalSoundCrafter(*hearing, AttackCache(tmp_path / where), defense, batch_size, quiet=True)
        return crafter.craft_change(AttackSettings.parse("universal", asked | fields), lessons), lessons

    return make


def test_one_change_makes_all_answers_likelier(hearing, heard, change):
    entry, lessons = change(steps=8)
    (made,) = entry.sounds
    assert made.pcm.shape == (WINDOW,) and 0 < np.abs(made.pcm).max() <= 0.002 * 32768
    assert entry.record["loss"][-1] < entry.record["loss"][0]
    assert (entry.record["rate"], entry.record["corpus_size"]) == (RATE, 3)

    def loss(sounds):
        total = 0.0
        for row, lesson, sound in zip(CORPUS, lessons, sounds, strict=True):
            inputs = heard([sound], row["instruction"])
            ids = torch.cat([inputs["input_ids"], torch.tensor([lesson.answer])], dim=1)
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.no_grad():
                logits = hearing[0](**inputs).logits[0, -len(lesson.answer) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(lesson.answer)))
        return total / 3

    clean = [lesson.sounds[0] for lesson in lessons]
    assert loss(clean) == pytest.approx(entry.record["loss"][0], abs=0.1)
    gain = loss(clean) - loss([with_change(sound, made) for sound in clean])
    assert gain > 0.01
    assert entry.record["loss"][0] - entry.record["loss"][-1] > gain / 2  # it is searched on what is heard


def test_a_change_is_cut_and_added_in_whole_steps():
    made = Sound.from_pcm(np.arange(-50, 50, dtype=np.int16), RATE)
    short, long = (Sound.from_pcm(np.full(n, 32700, np.int16), RATE) for n in (80, 130))
    assert (with_change(short, made).pcm == 32700 + np.arange(-50, 30)).all()
    assert (with_change(long, made).pcm[100:] == 32700).all()
    top = Sound.from_pcm(np.full(100, 32760, np.int16), RATE)
    assert with_change(top, made).pcm.max() == 32767
    with pytest.raises(AttackError, match="rate of 8000 Hz, and the change 16000 Hz"):
        with_change(Sound(short.samples, 8000), made)


def test_a_change_is_a_function_of_its_key(change):
    defense = choose({"audio_sigma": 0.01})
    first, _ = change(eot=2, defense=defense)
    again, _ = change(eot=2, defense=defense, batch_size=1, where="apart")
    assert first.key == again.key and first.record["randomness"]["audio_sigma"] == 0.01
    apart = np.abs(first.sounds[0].pcm.astype(int) - again.sounds[0].pcm).mean()
    assert apart < 0.02 * np.abs(first.sounds[0].pcm).mean()  # parts are added up in another order
    assert change()[0].key != first.key


def test_what_a_change_cannot_be_made_from(hearing, change, tmp_path):
    with pytest.raises(ConfigError, match="size 64, of a picture"):
        change(size=64)
    with pytest.raises(ConfigError, match=r"eps is 0\.1255, which pictures have by default"):
        change(eps=32 / 255)
    crafter = UniversalSoundCrafter(*hearing, AttackCache(tmp_path), quiet=True)
    with pytest.raises(AttackError, match="nothing to learn from"):
        crafter.craft_change(AttackSettings.parse("universal"), [])
    with pytest.raises(AttackError, match="a lesson has no sound"):
        crafter.craft_change(AttackSettings.parse("universal"), [SoundLesson({}, (1,))])
