"""Questions about sound clips: what is found, what is refused, what a model's processor makes of them, what an attack leaves."""

from __future__ import annotations

import io
import json
import logging

import numpy as np
import pytest
import soundfile
import torch
from tiny_models import sounds as hearing_models
from tiny_models.packed import qwen2_5_omni
from typer.testing import CliRunner

from lmms_smoothguard.attacks.sound_clips import TOO_FAINT
from lmms_smoothguard.cli import app
from lmms_smoothguard.errors import AttackError, ConfigError, SmoothGuardError
from lmms_smoothguard.evaluation.questions import Question, load_questions
from lmms_smoothguard.harness.questions import find_questions
from lmms_smoothguard.hearing import drops_the_end
from lmms_smoothguard.sounds import PCM, Sound, read_clip
from lmms_smoothguard.subject import Reply, Subject

datasets = pytest.importorskip("datasets")
ASK = "What do you hear?"
RATE = 16000


@pytest.fixture(autouse=True)
def own_arrow_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


def tone(pitch=440.0, seconds=0.5, rate=RATE, level=0.3):
    """A sine in whole steps of 16-bit PCM."""
    wave = level * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)
    return Sound.from_pcm(np.rint(wave * PCM).astype(np.int16), rate)


def encoded(samples, rate, kind="WAV", **options):
    written = io.BytesIO()
    soundfile.write(written, samples, rate, format=kind, **options)
    return written.getvalue()


@pytest.fixture
def clips(tmp_path):
    """Three tones of pitches of their own, as files beside each other."""
    made = [tone(300 * (number + 1)) for number in range(3)]
    for number, clip in enumerate(made):
        (tmp_path / f"{number}.wav").write_bytes(clip.wav)
    return made


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def heard(question):
    return [(sound.rate, sound.samples.tolist()) for sound in question.sounds]


# -- what is found -----------------------------------------------------------------------------------------------------


def test_a_folder_is_asked_one_question_about_every_sound_in_it(tmp_path, clips):
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    for name, kind in (("b.wav", "WAV"), ("a.flac", "FLAC"), ("sub/c.OGG", "OGG"), ("d.mp3", "MP3")):
        (folder / name).write_bytes(encoded(clips[0].samples, RATE, kind))
    (folder / ".hidden.wav").write_bytes(b"no sound")
    (folder / "notes.txt").write_text("no sound")
    found = load_questions(str(folder), question="Describe")
    assert found.ids == ("a.flac", "b.wav", "d.mp3", "sub/c.OGG")
    assert [(question.text, question.images) for question in found] == [("Describe", ())] * 4
    assert heard(found[0]) == heard(found[1]) == [(RATE, clips[0].samples.tolist())]
    assert found.digests[0] != found.digests[1]  # their ids differ
    for lossy in (found[2].sounds[0], found[3].sounds[0]):
        assert lossy.rate == RATE and lossy.seconds == pytest.approx(0.5, abs=0.1)


def test_a_folder_of_pictures_and_sounds_does_not_say_which_belong_together(tmp_path, clips, images):
    images[0].save(tmp_path / "x.png")
    with pytest.raises(
        ConfigError, match=r"pictures and sounds in it, such as x\.png and 0\.wav; expected a folder of one"
    ):
        load_questions(str(tmp_path), question=ASK)


def data_set(features, **cells):
    """With features that name their type, as a hub's; `datasets` itself encodes sounds with torchcodec alone."""
    import pyarrow as pa

    schema = datasets.Features(features).arrow_schema
    return datasets.Dataset(pa.table(cells, schema=schema))


def column(kind, clips, name="audio"):
    """A data set of questions with a column of sounds, as people keep them."""
    files = [clip.wav for clip in clips]
    words = {"question": ["A?", "B?", "C?"], "answer": ["a", "b", "c"]}
    if kind == "Audio":
        text = datasets.Value("string")
        cells = [{"bytes": data, "path": None} for data in files]
        return data_set({name: datasets.Audio(RATE), "question": text, "answer": text}, **{name: cells}, **words)
    cells = {
        "paths": [f"{number}.wav" for number in range(3)],
        "bytes": files,
        "arrays": [{"array": clip.samples.tolist(), "sampling_rate": clip.rate} for clip in clips],
        "lists": [[f"{number}.wav", "0.wav"] for number in range(3)],
    }[kind]
    return datasets.Dataset.from_dict({name: cells, **words})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Audio", "audio"), ("bytes", "sound"), ("arrays", "audio"), ("paths", "audio_path"), ("lists", "audios"),
        ("lists", "sounds"),
    ],
)  # fmt: skip
def test_a_column_of_sounds_is_found_and_read_whatever_is_in_its_cells(tmp_path, clips, kind, name):
    column(kind, clips, name).to_parquet(tmp_path / "t.parquet")
    found = load_questions(str(tmp_path / "t.parquet"))
    assert [(question.text, question.label, question.images) for question in found] == [
        ("A?", "a", ()), ("B?", "b", ()), ("C?", "c", ()),
    ]  # fmt: skip
    expected = [[clip, clips[0]] if kind == "lists" else [clip] for clip in clips]
    assert [heard(question) for question in found] == [[(s.rate, s.samples.tolist()) for s in row] for row in expected]


def test_a_data_set_on_disk_with_lists_of_sounds(tmp_path, clips):
    cells = [[{"bytes": clip.wav, "path": None} for clip in clips[:2]], [{"bytes": clips[2].wav, "path": None}]]
    features = {"clips": datasets.List(datasets.Audio()), "prompt": datasets.Value("string")}
    data_set(features, clips=cells, prompt=["A?", "B?"]).save_to_disk(tmp_path / "d")
    found = load_questions(str(tmp_path / "d"), columns={"sounds": "clips"})
    assert [len(question.sounds) for question in found] == [2, 1]
    assert heard(found[1]) == [(RATE, clips[2].samples.tolist())]


def test_questions_about_a_picture_a_sound_or_both_in_one_table(tmp_path, clips, images):
    images[0].save(tmp_path / "0.png")
    path = jsonl(
        tmp_path / "t.jsonl",
        {"id": "both", "image": "0.png", "audio": "0.wav", "question": "?"},
        {"id": "seen", "image": "0.png", "audio": None, "question": "?"},
        {"id": "heard", "image": "", "audio": "1.wav", "question": "?"},
    )
    found = load_questions(path)
    assert [(len(question.images), len(question.sounds)) for question in found] == [(1, 1), (1, 0), (0, 1)]
    assert heard(found[2]) == [(RATE, clips[1].samples.tolist())]
    alone = load_questions(path, columns={"sounds": None}, limit=2)
    assert [(len(question.images), question.sounds) for question in alone] == [(1, ()), (1, ())]
    bare = jsonl(tmp_path / "u.jsonl", {"image": "0.png", "audio": "0.wav", "question": "?"}, {"question": "?"})
    with pytest.raises(ConfigError, match=r"1 pictures or sounds that cannot be read: 1 \(neither picture nor sound\)"):
        load_questions(bare)


def test_file_names_are_those_of_sounds_where_there_are_sounds(tmp_path, clips):
    path = jsonl(tmp_path / "t.jsonl", {"file_name": "0.wav", "audio": "0.wav", "question": "?"})
    assert load_questions(path)[0].images == ()


def test_several_channels_are_mixed_down(tmp_path, clips):
    left, right = clips[0].samples, clips[1].samples
    (tmp_path / "s").mkdir()
    (tmp_path / "s/two.wav").write_bytes(encoded(np.stack([left, right], 1), RATE, subtype="PCM_16"))
    (found,) = load_questions(str(tmp_path / "s"), question=ASK)
    assert np.allclose(found.sounds[0].samples, (left + right) / 2)


# -- the revision ------------------------------------------------------------------------------------------------------


def test_digests_of_pictures_are_what_they_were_before_there_were_sounds():
    found = load_questions("tasks/shapes/data/pope.parquet", limit=20)
    assert found.revision == "0f012d4359e3dd2ec2aeee5f3b6027f6098940c939bbc2822a566ff6dc952eb0"


def test_the_revision_is_of_samples_and_rate_not_of_how_they_are_stored(tmp_path, clips):
    def revision(name, data):
        (tmp_path / name).write_bytes(data)
        return load_questions(jsonl(tmp_path / "t.jsonl", {"audio": name, "question": "?"})).revision

    samples = clips[0].samples
    first = revision("a.wav", clips[0].wav)
    assert revision("a.flac", encoded(samples, RATE, "FLAC", subtype="PCM_16")) == first
    assert revision("f.wav", encoded(samples, RATE, subtype="FLOAT")) == first
    assert revision("slow.wav", encoded(samples, 8000, subtype="PCM_16")) != first
    changed = clips[0].pcm.copy()
    changed[100] += 1
    assert revision("changed.wav", encoded(changed, RATE, subtype="PCM_16")) != first


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_all_broken_sounds_are_named_before_anything_is_asked(tmp_path, clips):
    nan = clips[0].samples.copy()
    nan[3] = np.nan
    files = {
        "torn.wav": clips[0].wav[:-100],
        "cut.flac": encoded(clips[0].samples, RATE, "FLAC")[:60],
        "empty.wav": encoded(np.zeros(0), RATE),
        "nan.wav": encoded(nan, RATE, subtype="FLOAT"),
        "hour.wav": encoded(np.zeros(3601 * 100, np.int16), 100, subtype="PCM_16"),
        "text.wav": b"no sound at all",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    named = ["0.wav", *files, "gone.wav", "https://x.y/z.wav", None]
    path = jsonl(tmp_path / "t.jsonl", *({"id": n, "audio": name, "question": "?"} for n, name in enumerate(named)))
    with pytest.raises(ConfigError) as refused:
        load_questions(path)
    said = str(refused.value)
    assert "9 pictures or sounds" in said and "at most 600 seconds" in said
    for part in (
        "1 (a sound is cut off", "2 (a sound", "3 (a sound has no samples", "4 (a sound has samples that are NaN",
        "5 (a sound is longer than 600 seconds", "6 (a sound cannot be read", "7 ([Errno 2]", "8 (https://x.y/z.wav is an address",
        "9 (no sound)",
    ):  # fmt: skip
        assert part in said, part
    assert "0 (" not in said


def test_clipped_sounds_are_read_with_one_warning(tmp_path, clips, caplog):
    loud = np.clip(4 * tone(level=0.9).samples, -1, 1)
    for name in ("loud", "louder"):
        (tmp_path / f"{name}.wav").write_bytes(encoded(loud, RATE, subtype="PCM_16"))
    rows = [{"id": name, "audio": f"{name}.wav", "question": "?"} for name in ("loud", "0", "louder")]
    with caplog.at_level(logging.WARNING):
        found = load_questions(jsonl(tmp_path / "t.jsonl", *rows))
    (record,) = [r for r in caplog.records if r.name.startswith("lmms_smoothguard")]
    assert "2 questions with sounds that look clipped" in record.getMessage()
    assert record.getMessage().endswith(": loud, louder")
    assert len(found[0].sounds) == 1


def test_a_command_for_pictures_refuses_sounds(tmp_path, clips, images):
    images[0].save(tmp_path / "0.png")
    path = jsonl(tmp_path / "t.jsonl", {"id": "x", "audio": "0.wav", "image": "0.png", "question": "?"})
    with pytest.raises(ConfigError, match=r"questions about sounds: x; expected pictures alone, for a sweep"):
        load_questions(path).refuse_sounds("a sweep")
    load_questions(path, columns={"sounds": None}).refuse_sounds("a sweep")
    done = CliRunner().invoke(app, ["certify", "tiny-llava", path, "--out", str(tmp_path / "out")])
    assert "questions about sounds: x" in str(done.exception) + done.output


def test_a_table_without_either_kind_says_how_to_name_one(tmp_path):
    with pytest.raises(ConfigError, match=r"no column of pictures.*nor one of sounds: audio, or columns=\{'sounds'"):
        load_questions(jsonl(tmp_path / "t.jsonl", {"clip": "0.wav", "question": "?"}))


# -- a task ------------------------------------------------------------------------------------------------------------


def test_a_task_of_lmms_eval_with_sounds_as_its_own_functions_give_them(tmp_path, clips, monkeypatch):
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks import TaskManager

    from lmms_smoothguard.harness.lmms_eval import questions as tasks

    column("Audio", clips).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "utils.py").write_text(
        "import datasets\n\ndef undecoded(docs):\n    return docs.cast_column('audio', datasets.Audio(decode=False))\n\n"
        "def media(doc):\n    return [doc['audio']]\n\ndef text(doc):\n    return doc['question']\n"
    )
    (tmp_path / "clips.yaml").write_text(
        f"task: clips_mini\ndataset_path: parquet\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/t.parquet\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.media\nprocess_docs: !function utils.undecoded\n"
        "doc_to_text: !function utils.text\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    manager = TaskManager("ERROR", include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(tasks, "_manager_of", lambda name: manager)
    found = find_questions("clips_mini", limit=2)
    assert [(question.text, question.label, question.images) for question in found] == [
        ("A?", "a", ()),
        ("B?", "b", ()),
    ]
    assert heard(found[1]) == [(RATE, clips[1].samples.tolist())]


# -- a model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """A tiny model of random weights by its builder, loaded from a directory as a user's would be."""
    known = {}

    def make(build):
        if build not in known:
            where = tmp_path_factory.mktemp("models") / build.__name__
            model, processor = build()
            model.save_pretrained(where)
            processor.save_pretrained(where)
            known[build] = Subject(str(where), device="cpu", dtype="float32")
        return known[build]

    return make


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_audio", "Qwen2AudioForConditionalGeneration"),
        ("audioflamingo3", "AudioFlamingo3ForConditionalGeneration"),
        ("glmasr", "GlmAsrForConditionalGeneration"),
        ("moss_transcribe_diarize", "MossTranscribeDiarizeForConditionalGeneration"),
    ],
)
def test_models_that_hear_are_loaded_asked_and_answer(subjects, name, expected):
    subject = subjects(getattr(hearing_models, name))
    assert type(subject.model).__name__ == expected
    question = Question("q", (), ASK, sounds=(tone(rate=44100, seconds=1.0),))
    (sound,) = subject.sounds(question)
    assert sound.rate == subject.processor.feature_extractor.sampling_rate
    assert abs(sound.seconds - 1.0) < 0.001
    made = subject.inputs(question)
    assert made["input_ids"].shape[0] == 1
    assert subject.processor.audio_token_id in made["input_ids"][0].tolist()
    tensors = {key: value for key, value in made.items() if isinstance(value, torch.Tensor)}
    length = made["input_ids"].shape[1]
    own = subject.model.generate(**tensors, max_new_tokens=4, do_sample=False, smoothguard=False)[0, length:].tolist()
    ids = subject.answer(made, 4).ids
    assert ids == tuple(own[: len(ids)]) and len(ids) >= 1
    other = subject.inputs(Question("q", (), ASK, sounds=(tone(900, 1.0),)))
    key = next(key for key in ("input_features", "input_values") if key in made)
    assert not torch.equal(made[key], other[key])


def test_what_a_processor_makes_of_a_sound_is_what_it_makes_of_it_alone(subjects):
    subject = subjects(hearing_models.qwen2_audio)
    sounds = (tone(), tone(900, 1.0))
    made = subject.inputs(Question("q", (), ASK, sounds=sounds))
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nAudio 2: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
        f"{ASK}<|im_end|>\n<|im_start|>assistant\n"
    )
    direct = hearing_models.qwen2_audio()[1](
        text=[text], audio=[sound.samples for sound in sounds], sampling_rate=RATE, return_tensors="pt"
    )
    for key in ("input_ids", "attention_mask", "input_features", "feature_attention_mask"):
        assert torch.equal(made[key].double(), direct[key].double()), key
    assert made["input_features"].shape[0] == 2


def test_the_embedded_models_template_is_how_it_was_trained(tmp_path):
    from lmms_smoothguard.tiny.sounds.model import build_model, build_processor, prompt

    processor = build_processor()
    build_model(processor, 0).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    subject = Subject(str(tmp_path), device="cpu")
    clip = tone(seconds=2.0)
    made = subject.inputs(Question("q", (), "Is there a low tone?", sounds=(clip,)))
    direct = build_processor()(
        text=[prompt("Is there a low tone?")], audio=[clip.samples], sampling_rate=RATE, return_tensors="pt"
    )
    assert torch.equal(made["input_ids"], direct["input_ids"])
    assert torch.equal(made["input_features"], direct["input_features"].to(subject.model.dtype))
    assert subject.processing()["processor"] is not None


def test_a_sound_at_another_rate_is_resampled_for_the_model(subjects):
    subject = subjects(hearing_models.qwen2_audio)
    made = [
        subject.inputs(Question("q", (), ASK, sounds=(tone(440, 1.0, rate),)))["input_features"].flatten()
        for rate in (RATE, 48000, 22050)
    ]
    same = [float(torch.corrcoef(torch.stack([made[0], other]))[0, 1]) for other in made[1:]]
    wrong = Sound(tone(440, 0.5, 48000).samples, RATE)  # thrice as slow
    other = subject.inputs(Question("q", (), ASK, sounds=(wrong,)))["input_features"].flatten()
    assert min(same) > 0.9 > float(torch.corrcoef(torch.stack([made[0], other]))[0, 1])


def test_a_sound_beyond_the_window_is_refused_where_its_end_would_be_dropped(subjects):
    subject = subjects(hearing_models.qwen2_audio)  # two seconds
    fits = Question("q", (), ASK, sounds=(tone(seconds=2.0),))
    assert subject.inputs(fits)["input_features"].shape[0] == 1
    for seconds, said in ((2.25, "2.25"), (60.0, "60")):
        long = Question("q", (), ASK, sounds=(tone(), tone(seconds=seconds)))
        with pytest.raises(
            ConfigError, match=rf"sound 2 of question 'q' lasts {said} seconds, of which .* first 2 seconds"
        ):
            subject.inputs(long)


@pytest.mark.parametrize("name", ["glmasr", "audioflamingo3"])
def test_processors_that_cut_into_windows_hear_the_whole_of_it_up_to_their_own_limit(subjects, name):
    subject = subjects(getattr(hearing_models, name))  # windows of two seconds, four of them at most
    windows = [
        subject.inputs(Question("q", (), ASK, sounds=(tone(seconds=seconds),)))["input_features"].shape[0]
        for seconds in (1.0, 2.5, 7.9)
    ]
    assert windows == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"lasts 8.05 seconds, of which .* first 8 seconds"):
        subject.inputs(Question("q", (), ASK, sounds=(tone(seconds=8.05),)))


@pytest.mark.parametrize(
    ("name", "dropped"),
    [("qwen2_audio", True), ("voxtral", False), ("moss_transcribe_diarize", False), ("qwen3_asr", False)],
)
def test_whether_the_end_of_a_long_sound_is_heard_is_seen_from_the_features(name, dropped):
    kind = next(kind for kind in hearing_models.KINDS if kind.name == name)
    _, processor = kind.build()

    def make(sound):
        return kind.inputs(processor, [([sound.samples], ASK)])

    assert drops_the_end(processor, tone(seconds=1.0), make) is False
    assert drops_the_end(processor, tone(seconds=2.3), make) is dropped
    frames = [make(tone(seconds=seconds))["input_features"].numel() for seconds in (1.9, 3.9)]
    assert (frames[0] == frames[1]) is dropped


def test_of_an_omni_model_the_thinker_answers_about_pictures_and_sounds(subjects, images):
    subject = subjects(qwen2_5_omni)
    assert type(subject.model).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    picture, sound = images[0].resize((56, 56)), tone(seconds=1.0)
    asked = {
        "both": Question("q", (picture,), ASK, sounds=(sound,)),
        "seen": Question("q", (picture,), ASK),
        "heard": Question("q", (), ASK, sounds=(sound,)),
    }
    found = {
        name: {key for key in subject.inputs(question) if key in ("pixel_values", "input_features")}
        for name, question in asked.items()
    }
    assert found == {"both": {"pixel_values", "input_features"}, "seen": {"pixel_values"}, "heard": {"input_features"}}
    assert len(subject.answer(subject.inputs(asked["both"]), 3).ids) >= 1


def test_what_a_model_cannot_take_is_refused(subjects, images):
    subject = subjects(hearing_models.qwen2_audio)
    with pytest.raises(
        ConfigError, match=r"'q' has <\|AUDIO\|> in its text; expected the text alone, sounds are put before"
    ):
        subject.inputs(Question("q", (), "<|AUDIO|>?", sounds=(tone(),)))
    with pytest.raises(
        ConfigError, match=r"made no pixels of question 'q'; expected a chat template that takes pictures"
    ):
        subject.inputs(Question("q", (images[0],), ASK))
    sighted = Subject("tiny-llava", device="cpu")
    with pytest.raises(ConfigError, match=r"'q' has sounds, and tiny-llava has a LlavaProcessor, which takes none"):
        sighted.inputs(Question("q", (), ASK, sounds=(tone(),)))
    template, subject.processor.chat_template = (
        subject.processor.chat_template,
        "{{ messages[0]['content'][1]['text'] }}",
    )
    try:
        with pytest.raises(ConfigError, match=r"cannot take question 'q'.*chat template that has sounds in it"):
            subject.inputs(Question("q", (), ASK, sounds=(tone(),)))
    finally:
        subject.processor.chat_template = template


# -- an attack ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The embedded audio model before its training."""
    from lmms_smoothguard.tiny.sounds.model import build_model, build_processor

    where, processor = tmp_path_factory.mktemp("models") / "untrained", build_processor()
    model = build_model(processor, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)  # so that its answers hang on what it hears
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return Subject(str(where), device="cpu")


@pytest.fixture
def attack(untrained, monkeypatch):
    """The command, in this process, on that model; raises what it raises."""
    import lmms_smoothguard.subject as module

    monkeypatch.setattr(module, "Subject", lambda *_, **__: untrained)

    def run(data, out, *options, steps=3):
        command = [
            "attack",
            untrained.name,
            str(data),
            "--out",
            str(out),
            "--steps",
            str(steps),
            "--max-new-tokens",
            "4",
        ]
        done = CliRunner().invoke(app, [*command, *map(str, options)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        made = datasets.load_dataset("parquet", data_files=str(out / "attacks.parquet"), split="train")
        plain = datasets.Audio(decode=False)
        kinds = {"audio": plain, "audios": datasets.List(plain)}
        for name in kinds.keys() & set(made.column_names):
            made = made.cast_column(name, kinds[name])
        return list(made)

    return run


@pytest.fixture
def data(tmp_path, clips):
    """Three questions about a sound each, of which one is at another rate and twice as long."""
    (tmp_path / "2.wav").write_bytes(tone(900, 1.0, 8000).wav)
    rows = [{"id": f"q/{n}", "audio": f"{n}.wav", "question": ASK} for n in range(3)]
    return jsonl(tmp_path / "t.jsonl", *rows)


DEFENDED = ("--defense", "smoothguard", "--num-samples", "4", "--defense-set", "audio_sigma=0.05")


def test_a_run_s_table_says_what_its_sounds_do(tmp_path, attack, data, untrained):
    found = attack(data, tmp_path / "out", "--eps", "0.01", *DEFENDED, steps=8)
    questions = load_questions(data)
    assert [row["id"] for row in found] == list(questions.ids)
    for row, question in zip(found, questions, strict=True):
        (file,) = row["sound_files"]
        data_ = (tmp_path / "out" / file).read_bytes()
        assert row["audio"] == {"bytes": data_, "path": None}
        made = read_clip(data_).mono()
        (clean,) = untrained.sounds(question)
        assert (made.rate, len(made.samples)) == (RATE, len(clean.samples))
        change = made.pcm.astype(int) - clean.pcm.astype(int)
        assert 0 < abs(change).max() <= 0.01 * PCM + 1 and row["linf"] == pytest.approx(abs(change).max() / PCM)
        power = 10 * np.log10((clean.pcm.astype(float) ** 2).sum() / (change.astype(float) ** 2).sum())
        assert row["snr_db"] == [pytest.approx(power, abs=0.01)]
        asked = Question("x", (), question.text, sounds=(made,))
        direct = untrained.answer(untrained.inputs(asked), 4).text
        assert row["adversarial_answer"] == direct
        assert row["clean_answer"] == untrained.answer(untrained.inputs(question), 4).text
        assert (row["rule"], row["success"]) == ("changed", direct.casefold() != row["clean_answer"].casefold())
        assert row["defended_num_samples_used"] == 4
        assert row["objective"][-1] > row["objective"][0] and len(row["objective"]) == 8
        assert "image" not in row and "image_files" not in row
    assert any(row["success"] for row in found)
    assert "# Adversarial sounds" in (tmp_path / "out/README.md").read_text()


def test_the_directory_is_data_of_a_later_run_and_a_damaged_sound_is_made_again(tmp_path, attack, data):
    first = attack(data, tmp_path / "out", "--eps", "0.01")
    kept = (tmp_path / "out/sounds/q%2F0.wav").stat().st_mtime_ns
    (tmp_path / "out/sounds/q%2F1.wav").write_bytes(b"torn")
    assert attack(data, tmp_path / "out", "--eps", "0.01") == first
    assert (tmp_path / "out/sounds/q%2F0.wav").stat().st_mtime_ns == kept
    again = load_questions(str(tmp_path / "out"))
    assert [heard(question) for question in again] == [
        [(RATE, read_clip(row["audio"]["bytes"]).mono().samples.tolist())] for row in first
    ]
    assert again.ids == ("q/0", "q/1", "q/2")
    (whole,) = datasets.load_dataset(str(tmp_path / "out")).values()
    assert isinstance(whole.features["audio"], datasets.Audio)


def test_a_budget_in_decibels_is_each_clip_s_own(tmp_path, attack, untrained):
    for name, level in (("loud", 0.5), ("soft", 0.01)):
        (tmp_path / f"{name}.wav").write_bytes(tone(level=level).wav)
    path = jsonl(tmp_path / "t.jsonl", *({"audio": f"{name}.wav", "question": ASK} for name in ("loud", "soft")))
    loud, soft = attack(path, tmp_path / "out", "--norm", "l2", "--snr", "30", steps=8)
    for row in (loud, soft):
        assert row["attack_snr"] == 30.0 and "attack_eps" not in row
        assert 29.9 < row["snr_db"][0] < 45
    assert loud["l2"] > 10 * soft["l2"]


def test_what_a_sound_is_no_longer_as_it_was_stored_is_said(tmp_path, attack, clips):
    folder = tmp_path / "clips"
    folder.mkdir()
    two = np.stack([clips[0].samples, clips[1].samples], 1)
    (folder / "plain.wav").write_bytes(clips[0].wav)
    (folder / "mine.flac").write_bytes(encoded(two, 44100, "FLAC", subtype="PCM_16"))
    (folder / "mine.wav").write_bytes(encoded(tone(level=1.3).samples * 1.3, RATE, subtype="FLOAT"))
    found = attack(folder, tmp_path / "out", "--question", ASK, "--eps", "30dB", steps=1)
    assert {row["id"]: row["sound_notes"] for row in found} == {
        "mine.flac": ["2 channels mixed down to their mean, resampled from 44100 to 16000 Hz"],
        "mine.wav": ["clipped to full scale"],
        "plain.wav": [""],
    }
    assert [row["sound_files"] for row in found] == [
        ["sounds/mine.flac.wav"],
        ["sounds/mine.wav"],
        ["sounds/plain.wav"],
    ]
    card = (tmp_path / "out/README.md").read_text()
    assert "- sounds resampled from 44100 to 16000 Hz: in 1 of 3 samples (`sound_notes` says which)" in card
    assert card.count("`sound_notes` says which") == 3


@pytest.mark.parametrize("kind", ["file", "array"])
def test_a_sound_blown_up_is_refused_by_name(tmp_path, clips, kind):
    loud = 14 * tone(level=1.0).samples
    (tmp_path / "loud.wav").write_bytes(encoded(loud, RATE, subtype="FLOAT"))
    cell = "loud.wav" if kind == "file" else {"array": loud.tolist(), "sampling_rate": RATE}
    rows = {"id": ["quiet", "big"], "question": [ASK] * 2}
    quiet = "0.wav" if kind == "file" else {"array": clips[0].samples.tolist(), "sampling_rate": RATE}
    datasets.Dataset.from_dict({"audio": [quiet, cell], **rows}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(
        ConfigError, match=r"1 pictures or sounds .*: big \(a sound reaches 14; expected samples of full scale 1"
    ):
        load_questions(str(tmp_path / "t.parquet"))


def test_a_sound_that_the_model_cannot_be_asked_about_costs_no_others(tmp_path, attack, clips):
    """200 samples give no token of the prompt."""
    (tmp_path / "short.wav").write_bytes(Sound(clips[0].samples[:200], RATE).wav)
    rows = [{"id": name, "audio": f"{name}.wav", "question": ASK} for name in ("0", "short", "2")]
    data = jsonl(tmp_path / "t.jsonl", *rows)
    with pytest.raises(
        AttackError,
        match=r"1 samples could not be answered: question 'short' .* 200 samples .* at least 1201 .*another --out",
    ):
        attack(data, tmp_path / "out", "--eps", "0.01")
    assert sorted(file.name for file in (tmp_path / "out/samples").iterdir()) == ["0.json", "2.json"]
    assert sorted(file.name for file in (tmp_path / "out/sounds").iterdir()) == ["0.wav", "2.wav"]
    with pytest.raises(SmoothGuardError, match="question 'short'"):
        attack(jsonl(tmp_path / "t.jsonl", rows[1]), tmp_path / "alone", "--eps", "0.01")


def test_several_sounds_of_one_question_are_attacked_together(tmp_path, attack, clips):
    rows = [
        {"id": "two", "audios": ["0.wav", "1.wav"], "question": ASK},
        {"id": "one", "audios": ["2.wav"], "question": ASK},
    ]
    found = attack(jsonl(tmp_path / "t.jsonl", *rows), tmp_path / "out", "--eps", "0.01", "--target", "Yes")
    assert [row["sound_files"] for row in found] == [["sounds/two.wav", "sounds/two+1.wav"], ["sounds/one.wav"]]
    assert [(row["attacked"], len(row["snr_db"])) for row in found] == [(True, 2), (True, 1)]
    again = load_questions(str(tmp_path / "out"))
    changed = [
        abs(sound.pcm.astype(int) - clip.pcm.astype(int)).max()
        for question, own in zip(again, (clips[:2], clips[2:]), strict=True)
        for sound, clip in zip(question.sounds, own, strict=True)
    ]
    assert len(changed) == 3 and all(0 < steps <= 328 for steps in changed)


def test_a_sample_without_a_clean_answer_keeps_its_own_sound(tmp_path, attack, clips, monkeypatch):
    monkeypatch.setattr(Subject, "answer", lambda *_: Reply("", ()))
    path = jsonl(tmp_path / "t.jsonl", {"audio": "1.wav", "question": ASK})
    (row,) = attack(path, tmp_path / "out", "--eps", "0.01")
    assert (row["attacked"], row["snr_db"], row["linf"]) == (False, [None], 0.0)
    assert row["audio"]["bytes"] == clips[1].wav


def test_what_cannot_be_attacked_is_refused_before_anything_is_answered(
    tmp_path, attack, data, clips, images, untrained
):
    with pytest.raises(ConfigError, match=r"eps is 0\.01569, which pictures have by default.*--eps 0\.0005"):
        attack(data, tmp_path / "a")
    images[0].save(tmp_path / "0.png")
    both = jsonl(tmp_path / "both.jsonl", {"image": "0.png", "audio": "0.wav", "question": ASK})
    with pytest.raises(ConfigError, match=r"'0' has pictures and sounds; .*--column images=none"):
        attack(both, tmp_path / "b", "--eps", "0.01")
    assert not list((tmp_path / "a").glob("samples/*")) and not list((tmp_path / "b").glob("samples/*"))
    assert len(attack(both, tmp_path / "c", "--eps", "0.01", "--column", "images=none")) == 1


def test_silence_is_left_out_of_an_attack_in_decibels(tmp_path, attack, clips):
    """No change of it is any number of decibels below it, so none that fails says anything."""
    almost = np.zeros(RATE // 2, np.int16)
    almost[:20] = 1  # its change would be of less than one step
    (tmp_path / "silent.wav").write_bytes(Sound.from_pcm(np.zeros(RATE // 2, np.int16), RATE).wav)
    (tmp_path / "almost.wav").write_bytes(Sound.from_pcm(almost, RATE).wav)
    listed = {"silent": ["silent"], "almost": ["almost", "silent"], "two": ["silent", "1"], "one": ["0"]}
    rows = [
        {"id": name, "audios": [f"{file}.wav" for file in files], "question": ASK} for name, files in listed.items()
    ]
    data = jsonl(tmp_path / "t.jsonl", *rows)
    found = {row["id"]: row for row in attack(data, tmp_path / "out", "--norm", "l2", "--snr", "40")}
    for name in ("silent", "almost"):
        row = found[name]
        assert (row["attacked"], row["counted"], row["success"], row["reason"]) == (False, False, None, TOO_FAINT)
        assert row["linf"] == 0.0 and row["clean_answer"] == row["adversarial_answer"]
    for name in ("two", "one"):
        assert (found[name]["attacked"], found[name]["counted"], found[name]["reason"]) == (True, True, None)
        assert found[name]["l2"] > 0 and found[name]["success"] is not None
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["not_attackable"] == ["silent", "almost"] and summary["not_attackable_for"] == {TOO_FAINT: 2}
    assert summary["rates"]["changed"]["asr"]["count"] == 2
    assert (
        "- not attackable, for sounds too faint for the attack's snr: 2 of 4"
        in (tmp_path / "out/README.md").read_text()
    )
    every = attack(data, tmp_path / "loud", "--eps", "0.01", steps=1)  # a budget that is not each clip's own
    assert all(row["attacked"] and row["linf"] > 0 for row in every)


class Loaded(Exception):
    """A model was asked for."""


@pytest.mark.parametrize("option", ["--sigma=0.1", "--noise-space=pixel", "--defense-set=sigma=0.1"])
def test_noise_of_pictures_is_refused_where_there_are_sounds_alone(tmp_path, clips, images, monkeypatch, option):
    import lmms_smoothguard.subject as module

    def load(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr(module, "Subject", load)
    images[0].save(tmp_path / "0.png")
    sound, picture = ({"audio": "0.wav", "question": ASK}, {"image": "0.png", "question": ASK})
    heard_alone, mixed = jsonl(tmp_path / "s.jsonl", sound), jsonl(tmp_path / "m.jsonl", sound, picture)

    def run(data, *options):
        command = ["attack", "tiny-audio", data, "--out", str(tmp_path / "out"), "--eps", "0.001"]
        CliRunner().invoke(app, [*command, "--defense", "smoothguard", *options], catch_exceptions=False)

    field = "noise-space is pixel" if "space" in option else r"sigma is 0\.1"
    with pytest.raises(ConfigError, match=rf"--{field}, of noise on pictures, .*--defense-set audio_sigma=0\.02"):
        run(heard_alone, option)
    with pytest.raises(Loaded):
        run(mixed, option)
    with pytest.raises(Loaded):
        run(heard_alone, "--defense-set", "audio_sigma=0.1")
