"""Sounds through lmms-eval: our tasks on generated recordings, attacks on them, and on upstream's own tasks."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lmms_eval")
pytest.importorskip("soundfile")

import sound_miniatures as miniatures
from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.sound_clips import TOO_FAINT
from lmms_smoothguard.errors import AttackError, ConfigError
from lmms_smoothguard.harness.lmms_eval import ears, instances, planning
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path
from lmms_smoothguard.harness.options import Options, take_options
from lmms_smoothguard.harness.recording import PlainPass, recorded
from lmms_smoothguard.inputs.carried import CLIPS
from lmms_smoothguard.sounds import PCM, Sound, sound_of
from lmms_smoothguard.tiny.sounds.clips import LENGTH, RATE

TASKS = {
    "sounds_pope", "sounds_pope_faint", "sounds_caption", "sounds_safety", "sounds_pope_pgd", "sounds_pope_pgd_snr",
    "sounds_pope_eot", "sounds_caption_pgd", "sounds_caption_eot", "sounds_safety_pgd",
    "sounds_safety_universal",
}  # fmt: skip
PICTURE = Image.new("RGB", (8, 8))
EPS = 0.001
EAR = ears.Ear(RATE, LENGTH)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return miniatures.save_model(tmp_path_factory.mktemp("audio"))


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Upstream's scorers write what would be handed in into the working directory."""
    monkeypatch.chdir(tmp_path)


def cell(sound):
    return {"array": sound.samples, "sampling_rate": sound.rate}


def decoder(sound):
    return miniatures.AudioDecoder(sound.wav)


def requested(docs, simple=True, metadata=None):
    """A wrapper and one request a document; a document's `media` are its pictures and sounds, in order."""

    def messages(doc):
        kinds = [("image" if isinstance(item, Image.Image) else "audio", item) for item in doc.get("media", [])]
        parts = [{"type": kind, "url": item} for kind, item in kinds] + [{"type": "text", "text": "?"}]
        return [{"role": "user", "content": parts}]

    wrapper = SimpleNamespace(is_simple=simple, task_dict={"made": {"test": docs}})
    own = (lambda doc: list(doc.get("media", []))) if simple else messages
    parts = ({}, own) if simple else (own, {})
    fields = {"task": "made", "repeats": 1, **(metadata or {})}
    return wrapper, [
        Instance("generate_until", ("?", *parts, n, "made", "test"), 0, {**fields, "doc_id": n})
        for n in range(len(docs))
    ]


def options(**attack):
    return Options(None, attack, None, 1)


def plan(docs, *, ear=EAR, metadata=None, **attack):
    wrapper, requests = requested(docs, metadata=metadata)
    return planning.plan(wrapper, requests, options(**attack), ear)


PGD = {"name": "pgd", "eps": EPS}


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize("form", [cell, decoder])
def test_sounds_are_found_and_exchanged_in_their_places(simple, form):
    first, second, other = miniatures.recordings(3)
    wrapper, (request,) = requested([{"media": [form(first), PICTURE, form(second)]}], simple)
    found = instances.sounds_of(wrapper, request)
    assert [sound.rate for sound in found] == [RATE, RATE]
    for sound, own in zip(found, (first, second), strict=True):
        assert np.array_equal(sound.samples, own.samples)
    assert instances.images_of(wrapper, request) == [PICTURE]
    assert instances.count_media(wrapper, request) == 3

    changed = SimpleNamespace(args=instances.with_sounds(wrapper, request, [other, first]))
    after = instances.sounds_of(wrapper, changed)
    assert np.array_equal(after[0].samples, other.samples) and np.array_equal(after[1].samples, first.samples)
    assert instances.images_of(wrapper, changed) == [PICTURE]
    assert np.array_equal(instances.sounds_of(wrapper, request)[0].samples, first.samples)  # the request is as it was
    if simple:
        given = changed.args[2](wrapper.task_dict["made"]["test"][0])
        assert given[1] is PICTURE and set(given[0]) == {"array", "sampling_rate"}


# -- what is planned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_a_sound_is_attacked_at_the_models_rate(rate):
    (sound,) = miniatures.recordings(1, rate)
    ((one,), _) = plan([{"media": [cell(sound)]}], **PGD)
    (there,) = one.sounds
    assert there.rate == RATE and one.images == ()
    assert np.abs(there.samples - sound.at(RATE).samples).max() <= 0.5001 / PCM
    assert np.array_equal(there.samples * PCM, np.rint(there.samples * PCM))  # as what is crafted from it can be


def test_at_the_models_own_rate_a_recording_stays_as_it_is():
    (sound,) = miniatures.recordings(1)
    ((one,), _) = plan([{"media": [cell(sound)]}], **PGD)
    assert np.array_equal(one.sounds[0].samples, sound.samples)


def test_a_sound_that_the_wrapper_would_cut_is_refused():
    whole, longer = (Sound(np.full(LENGTH + more, 0.1, np.float32), RATE) for more in (0, 1))
    assert len(plan([{"media": [cell(whole)]}], **PGD)[0]) == 1
    with pytest.raises(AttackError, match=r"made\[0\], sound 2 is 2.00 seconds long, and the model hears 2 at a time"):
        plan([{"media": [cell(whole), cell(longer)]}], **PGD)
    assert len(plan([{"media": [cell(longer)]}], ear=ears.Ear(RATE, None), **PGD)[0]) == 1


def test_a_model_that_does_not_hear_is_refused():
    (sound,) = miniatures.recordings(1)
    assert ears.Ear.of(SimpleNamespace(image_processor=object())) is None
    with pytest.raises(AttackError, match=r"made\[0\], sound 1: the model's processor shows no feature extractor"):
        plan([{"media": [cell(sound)]}], ear=None, **PGD)


def test_attacks_on_pictures_and_budgets_of_pictures_are_refused():
    (sound,) = miniatures.recordings(1)
    docs = [{"media": [cell(sound)]}]
    with pytest.raises(ConfigError, match="'square' changes pictures, and the request has sounds"):
        plan(docs, name="square")
    with pytest.raises(ConfigError, match="made for pictures; expected one for sounds"):
        plan(docs, name="pgd")
    with pytest.raises(ConfigError, match="a budget of sounds, and the request has pictures"):
        plan([{"media": [PICTURE]}], name="pgd", norm="l2", snr=40)


def test_a_broken_sound_is_named():
    broken = {"array": np.array([0.0, np.nan], np.float32), "sampling_rate": RATE}
    with pytest.raises(AttackError, match=r"media of made\[0\] cannot be read \(.*NaN or infinite.*whole sounds"):
        plan([{"media": [broken]}], **PGD)
    with pytest.raises(AttackError, match=r"no sampling_rate"):
        plan([{"media": [{"array": np.zeros(4, np.float32)}]}], **PGD)
    with pytest.raises(AttackError, match=r"made\[0\] has media, but no picture or sound in memory"):
        plan([{"media": ["a.wav"]}], **PGD)


def test_of_a_picture_and_a_sound_the_picture_is_attacked():
    (sound,) = miniatures.recordings(1)
    ((one,), _) = plan([{"media": [cell(sound), PICTURE]}], name="pgd")
    assert one.images == (PICTURE,) and one.sounds == ()


# -- what is recorded --------------------------------------------------------------------------------------------------


class Hears:
    generation_config = SimpleNamespace(eos_token_id=0)
    asked = 0

    def generate(self, smoothguard, **kwargs):
        type(self).asked += 1
        return torch.cat([kwargs["input_ids"], torch.tensor([[self.asked]])], dim=1)


def test_features_tell_clean_answers_apart_and_the_clips_beside_them_do_not(tmp_path, monkeypatch):
    from lmms_smoothguard.inputs.carried import CarriedClips, Extraction

    monkeypatch.setattr(Hears, "asked", 0)
    hears, cache, ids = Hears(), AttackCache(tmp_path), torch.tensor([[5]])
    quiet, loud = torch.zeros(1, 64, 160), torch.ones(1, 64, 160)

    def answer(features, clip=None):
        more = {}
        if clip is not None:
            call = Extraction((clip,), {}, features)
            more[CLIPS] = CarriedClips(object(), "input_features", (call,), "input_features", features)
        with recorded(hears, "print", cache) as seen:
            hears.generate(input_ids=ids, input_features=features, **more)
        assert set(seen.inputs) == {"input_ids", "input_features"}
        return seen.answer, seen.clips

    clips = [np.full(4, value, np.float32) for value in (0.1, 0.2)]
    assert answer(quiet) == ((1,), None)
    found = [answer(quiet, clip) for clip in clips]
    assert [one[0] for one in found] == [(1,), (1,)]  # the features tell
    assert all(np.array_equal(one[1][0], clip) for one, clip in zip(found, clips, strict=True))
    assert answer(loud, clips[0])[0] == (2,)
    with (
        pytest.raises(AttackError, match="expected input_ids and pixel_values or input_features by name"),
        recorded(hears, "print", cache),
    ):
        hears.generate(input_ids=ids, input_values=quiet)


def test_a_wrapper_that_changes_its_sounds_is_refused():
    class Wrapper:
        """Whatever its processor is given."""

    (sound,) = miniatures.recordings(1)
    halves = tuple(np.array_split(sound.samples, 2))
    plain = PlainPass(inputs={"input_features": torch.zeros(1)}, clips=halves)
    with pytest.raises(
        AttackError,
        match=r"Wrapper gave its processor sounds of 6400, 6400 samples for made\[0\], whose own have 12800",
    ):
        ears.check_heard(Wrapper(), "made[0]", [sound], plain)
    plain.clips = (sound.samples,)
    ears.check_heard(Wrapper(), "made[0]", [sound], plain)
    plain.inputs = {"pixel_values": torch.zeros(1)}
    with pytest.raises(AttackError, match=r"Wrapper gave generate\(\) no input_features"):
        ears.check_heard(Wrapper(), "made[0]", [sound], plain)


# -- our tasks ---------------------------------------------------------------------------------------------------------


def config(task):
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(str(tasks_path() / "sounds" / f"{task}.yaml"))


def test_every_task_is_found():
    from lmms_eval.tasks import TaskManager

    found = set(TaskManager("ERROR", include_defaults=False, include_path=str(tasks_path())).all_tasks)
    assert found >= TASKS
    assert {file.stem for file in (tasks_path() / "sounds").glob("*.yaml")} == TASKS


@pytest.mark.parametrize("task", sorted(TASKS))
def test_a_task_reads_its_sounds_without_torchcodec(task, monkeypatch):
    """And asks, scores and reports as its twin on pictures does."""
    import datasets

    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False)
    made = config(task)
    (file,) = made["dataset_kwargs"]["data_files"].values()
    assert f"{tasks_path() / 'sounds' / 'data'}" in str(file)
    docs = datasets.load_dataset("parquet", data_files={"test": file}, split="test")
    doc = docs[3]
    ((given),) = made["doc_to_visual"](doc)
    assert given["sampling_rate"] == RATE and given["array"].shape == (LENGTH,) and given["array"].dtype == np.float32
    assert np.array_equal(given["array"] * PCM, np.rint(given["array"] * PCM))
    assert 0.01 < np.abs(given["array"]).max() <= 1
    assert made["doc_to_text"](doc) == doc["question"]
    assert doc.get(made["doc_to_target"])
    assert made["tag"] == "smoothguard_tiny_audio"
    asked = made["metadata"].get("attack")
    assert (asked is None) == (task.count("_") == 1 or task.endswith("faint"))
    if asked is not None:
        settings = Options(None, {}, None, 1).attack_on({"attack": asked}).settings
        assert settings.eot == (8 if task.endswith("eot") else 0)
        assert (settings.snr is None) == (settings.norm == "linf")
        assert {metric["metric"] for metric in made["metric_list"]} >= {"asr", "asr_low", "asr_count", "recovery"}


@pytest.mark.slow
def test_the_data_are_what_the_generator_makes(tmp_path):
    """Byte for byte, where eSpeak NG and libsndfile are of the same version."""
    pytest.importorskip("espeakng_loader")
    from lmms_smoothguard.tiny.sounds import testsets

    testsets.write(tmp_path)
    files = sorted((tasks_path() / "sounds" / "data").glob("*.parquet"))
    assert [file.name for file in files] == sorted(file.name for file in tmp_path.glob("*.parquet"))
    for file in files:
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_captions_are_scored_by_the_names_of_sounds():
    utils = importlib.import_module("lmms_smoothguard.tasks.sounds.utils")
    doc = {"caption": "A low tone, then a spoken three.", "objects": "low tone, spoken three"}
    assert utils.caption_results(doc, ["a low tone, then a spoken three"]) == {"caption_exact": 1, "object_f1": 1}
    found = utils.caption_results(doc, ["A low tone, then a crackle."])
    assert found == {"caption_exact": 0, "object_f1": 0.5}


# -- through lmms-eval -------------------------------------------------------------------------------------------------


def test_an_attack_through_upstreams_wrapper_stays_in_its_budget_and_is_what_is_heard(model, monkeypatch):
    calls = miniatures.heard(monkeypatch)
    found = miniatures.run(model, None, ["sounds_pope_pgd"], limit=2, defense="none", attack_steps=3)
    for sample, info in zip(
        found["samples"]["sounds_pope_pgd"], miniatures.infos(found, "sounds_pope_pgd"), strict=True
    ):
        assert 0 < info["attack_linf"] <= EPS + 1e-6
        assert info["attack_rendering_gap"] < 1e-3
        assert info["clean_answer"] and info["attack_key"]
        clean = sound_of(docs_of("pope")[sample["doc_id"]]["audio"]).samples
        near = [clip for clip in calls if clip.shape == clean.shape and 0 < np.abs(clip - clean).max() <= EPS + 1e-6]
        assert near, "the adversarial sound never reached the processor"
        assert np.array_equal(near[-1] * PCM, np.rint(near[-1] * PCM))
        assert np.abs(near[-1] - clean).max() == pytest.approx(info["attack_linf"], abs=1e-7)
    summary = found["smoothguard_attacks"]["sounds_pope_pgd"]
    assert summary["attacked"] == 2 and summary["left_out"] == {}
    assert "asr_count,none" in found["results"]["sounds_pope_pgd"]


def docs_of(name):
    import datasets

    file = str(tasks_path() / "sounds" / "data" / f"{name}.parquet")
    return datasets.load_dataset("parquet", data_files={"test": file}, split="test")


def test_a_budget_in_decibels(model):
    found = miniatures.run(model, None, ["sounds_pope_pgd_snr"], limit=1, defense="none", attack_steps=12)
    (info,) = miniatures.infos(found, "sounds_pope_pgd_snr")
    clean = sound_of(docs_of("pope")[0]["audio"]).samples
    radius = np.linalg.norm(clean.astype(np.float64)) * 10 ** (-40 / 20)
    assert 0.5 * radius < info["attack_l2"] <= radius * 1.001


def test_an_attack_is_crafted_once_and_its_wav_is_kept(model, tmp_path, monkeypatch):
    from lmms_smoothguard.attacks.pgd import PGD as Attack

    arguments = {"limit": 2, "attack_steps": 2, "attack_cache": tmp_path / "kept"}
    first = miniatures.run(model, None, ["sounds_caption_pgd"], defense="none", **arguments)
    keys = [info["attack_key"] for info in miniatures.infos(first, "sounds_caption_pgd")]
    assert len(set(keys)) == 2
    for key in keys:
        (file,) = (tmp_path / "kept").rglob(f"{key}-*.wav")
        assert sound_of(file.read_bytes()).rate == RATE
    monkeypatch.setattr(Attack, "run", lambda *a, **k: pytest.fail("crafted again"))
    again = miniatures.run(model, None, ["sounds_caption_pgd"], defense="none", **arguments)
    assert [info["attack_key"] for info in miniatures.infos(again, "sounds_caption_pgd")] == keys


def test_a_defence_votes_on_noisy_sounds_clean_and_attacked(model):
    tasks = ["sounds_pope", "sounds_pope_pgd"]
    found = miniatures.run(model, None, tasks, limit=1, num_samples=3, audio_sigma=0.02, attack_steps=2)
    for task in tasks:
        (info,) = miniatures.infos(found, task)
        assert info["defended"] and len(info["candidates"]) == 3
    adaptive = miniatures.run(
        model, None, ["sounds_pope_eot"], limit=1, num_samples=3, audio_sigma=0.02, attack_steps=1, attack_eot=2
    )
    (info,) = miniatures.infos(adaptive, "sounds_pope_eot")
    assert info["attack"]["eot"] == 2 and 0 < info["attack_linf"] <= EPS + 1e-6


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("task", sorted(miniatures.UPSTREAM))
def test_upstreams_own_tasks(task, decoded, model, tmp_path, monkeypatch):
    """Recordings of other rates, as arrays or as decoders: heard at the model's rate, clean and attacked."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # voicebench builds a client when it is imported
    if not decoded:
        miniatures.stand_in_for_torchcodec(monkeypatch)
    sounds = [*miniatures.recordings(1, 44_100), *miniatures.recordings(1, 8_000)]
    name = miniatures.write_task(tmp_path, task, sounds, decoded=decoded)
    calls = miniatures.heard(monkeypatch)
    found = miniatures.run(model, tmp_path, [name], defense="none", attack="pgd", attack_eps=EPS, attack_steps=2)
    assert found["smoothguard_attacks"][name]["attacked"] == 2
    for info, sound in zip(miniatures.infos(found, name), sounds, strict=True):
        assert 0 < info["attack_linf"] <= EPS + 1e-6
        clean = Sound.from_pcm(sound.at(RATE).pcm, RATE).samples
        apart = [np.abs(clip - clean).max() for clip in calls if clip.shape == clean.shape]
        assert min(apart) == 0  # the clean pass
        assert sum(0 < distance <= EPS + 1e-6 for distance in apart) >= 1
    assert "answer_changed,none" in found["results"][name]


def test_silence_is_left_out_of_an_attack_in_decibels(model, tmp_path, monkeypatch):
    miniatures.stand_in_for_torchcodec(monkeypatch)
    sounds = [Sound(np.zeros(LENGTH, np.float32), RATE), *miniatures.recordings(1)]
    name = miniatures.write_task(tmp_path, "clotho_aqa_test", sounds)
    decibels = {"attack": "pgd", "attack_norm": "l2", "attack_snr": 40, "attack_steps": 1}
    found = miniatures.run(model, tmp_path, [name], defense="none", **decibels)
    summary = found["smoothguard_attacks"][name]
    assert (summary["attacked"], summary["left_out"]) == (1, {TOO_FAINT: 1})
    silent, heard = miniatures.infos(found, name)
    assert silent["attack_left_out"] == TOO_FAINT and "attack_l2" not in silent and silent["clean_answer"]
    assert heard["attack_l2"] > 0 and "attack_left_out" not in heard
    assert found["results"][name]["answer_changed_count,none"] == 1


def test_only_a_request_whose_sounds_are_all_silent_is_too_faint():
    (sound,), silence = miniatures.recordings(1), Sound(np.zeros(800, np.float32), RATE)
    docs = [{"media": [cell(silence)]}, {"media": [cell(silence), cell(sound)]}]
    for budget, expected in (({"norm": "l2", "snr": 40}, [True, False]), ({"eps": EPS}, [False, False])):
        assert [one.too_faint for one in plan(docs, name="pgd", **budget)[0]] == expected


@pytest.mark.parametrize(
    ("defense", "media", "said"),
    [
        ({"sigma": 0.2}, ["sound"], "sigma=0.2 given, of noise on pictures, and made has sounds"),
        ({"noise_space": "pixel"}, ["sound"], "noise_space=pixel given"),
        ({"sigma": 0.2}, ["picture"], None),
        ({"sigma": 0.2}, ["sound", "picture"], None),
        ({"sigma": 0.1}, ["sound"], "sigma=0.1 given"),  # the default, said all the same
        ({"sigma": 0.2, "audio_sigma": 0.05}, ["sound"], None),
        ({"sigma": 0.2, "audio_sigma": 0.02}, ["sound"], None),
        ({"sigma": 0.2, "audio_snr": 20}, ["sound"], None),
        ({}, ["sound"], None),
    ],
)
def test_noise_of_pictures_on_a_task_of_sounds_is_said_once(defense, media, said, caplog):
    (sound,) = miniatures.recordings(1)
    docs = [{"media": [cell(sound) if kind == "sound" else PICTURE for kind in media]}] * 2
    wrapper, requests = requested(docs)
    planning.warn_of_noise(wrapper, requests, take_options(dict(defense)))
    warned = [record.getMessage() for record in caplog.records if record.name == planning.__name__]
    assert len(warned) == (said is not None)
    assert said is None or (said in warned[0] and "audio_sigma=0.02" in warned[0])


def test_the_warning_about_noise_is_of_every_run(model, caplog):
    miniatures.run(model, None, ["sounds_pope"], limit=1, num_samples=2, sigma=0.2)
    assert sum("of noise on pictures" in record.getMessage() for record in caplog.records) == 1
