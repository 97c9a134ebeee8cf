"""What a universal change of sounds is learnt on: clips that a corpus names, or others that its pairs share out."""

from __future__ import annotations

import csv
import json
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("soundfile")

from lmms_smoothguard.attacks.corpus import load_corpus
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.universal_clips import load_clips, pairs_with_clips
from lmms_smoothguard.errors import AttackError, ConfigError, SmoothGuardError
from lmms_smoothguard.sounds import Sound, read_clip

RATE = 16000


def clip(seed, rate=RATE, samples=4000):
    noise = 0.1 * np.random.default_rng(seed).standard_normal(samples)
    return Sound.from_pcm(Sound(noise.astype(np.float32), rate).pcm, rate)


def row(word, **more):
    return {"instruction": f"Say {word}.", "response": f"{word}.", **more}


def jsonl(place, rows):
    place.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(place)


def pcm(wav):
    return read_clip(wav).mono().pcm


def settings(**fields):
    return AttackSettings.parse("universal", {"eps": 0.01, **fields})


# -- clips in the corpus -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "array"])
def test_a_corpus_names_clips_of_its_own(kind, tmp_path):
    (tmp_path / "clips").mkdir()
    clips = [clip(1), clip(2, rate=8000)]
    for number, one in enumerate(clips):
        (tmp_path / "clips" / f"{number}.wav").write_bytes(one.wav)
    rows = [row(word, audio=f"clips/{number}.wav") for number, word in enumerate(("red", "blue"))]
    file = tmp_path / f"corpus.{'jsonl' if kind == 'array' else kind}"
    if kind == "csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        cells = [{"bytes": one.wav, "path": None} for one in clips]
        parquet.write_table(
            pyarrow.Table.from_pylist([r | {"audio": c} for r, c in zip(rows, cells, strict=True)]), file
        )
    else:
        if kind == "array":
            rows = [
                r | {"audio": {"array": one.samples.tolist(), "sampling_rate": one.rate}}
                for r, one in zip(rows, clips, strict=True)
            ]
        jsonl(file, rows)
    pairs = load_corpus(str(file))
    assert [pair[:2] for pair in pairs] == [("Say red.", "red."), ("Say blue.", "blue.")]
    for pair, one in zip(pairs, clips, strict=True):
        found = read_clip(pair.audio).mono()
        assert found.rate == one.rate and np.array_equal(found.pcm, one.pcm)
    assert pairs_with_clips(settings(corpus=str(file))) == pairs


def test_the_same_words_about_two_clips_are_two_pairs_and_about_one_clip_are_not(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.wav").write_bytes(clip(number).wav)
    apart = load_corpus(jsonl(tmp_path / "a.jsonl", [row("red", audio=f"{n}.wav") for n in range(2)]))
    assert len({tuple(pair.content) for pair in apart}) == 2
    with pytest.raises(AttackError, match=r"1 rows more than once, such as \('Say red\.', 'red\.'\) 2 times"):
        load_corpus(jsonl(tmp_path / "b.jsonl", [row("red", audio="0.wav")] * 2))


@pytest.mark.parametrize(
    ("audio", "hint"),
    [
        ("absent.wav", "No such file"),
        ("broken.wav", "cannot be read"),
        ("cut.wav", "cut off"),
        ("empty.wav", "no samples"),
        ({"array": [0.1, float("nan")], "sampling_rate": RATE}, "NaN or infinite"),
        ({"array": [], "sampling_rate": RATE}, "expected samples"),
        ({"array": [0.1, 0.2]}, "no sampling_rate"),
        ("https://example.org/a.wav", "is an address"),
        (7, "is no sound"),
    ],
)
def test_a_clip_that_cannot_be_read_is_named_by_its_row(audio, hint, tmp_path):
    (tmp_path / "whole.wav").write_bytes(clip(0).wav)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    (tmp_path / "cut.wav").write_bytes(clip(0).wav[:-100])
    (tmp_path / "empty.wav").write_bytes(Sound(np.zeros(0, np.float32), RATE).wav)
    file = jsonl(tmp_path / "a.jsonl", [row("red", audio="whole.wav"), row("blue", audio=audio)])
    with pytest.raises(AttackError, match=rf"an audio in row 2 that cannot be read \(.*{hint}"):
        load_corpus(file)


def test_clips_for_some_pairs_alone_are_refused(tmp_path):
    (tmp_path / "whole.wav").write_bytes(clip(0).wav)
    file = jsonl(tmp_path / "a.jsonl", [row("red", audio="whole.wav"), row("blue", audio=None)])
    with pytest.raises(AttackError, match="no audio in row 2, and in others it has; expected a clip in every row"):
        load_corpus(file)


# -- clips beside it ---------------------------------------------------------------------------------------------------


def test_clips_are_a_file_a_folder_or_a_table(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    made = [clip(number) for number in range(3)]
    for number, one in enumerate([*made, made[0]]):
        (folder / f"{number}.wav").write_bytes(one.wav)
    table = jsonl(tmp_path / "table.jsonl", [{"audio": f"folder/{n}.wav", "text": "of no use"} for n in range(4)])
    for source in (str(folder), table):
        found = load_clips(source, 9)
        assert len(found) == 3  # a clip that is there twice is one
        assert all(np.array_equal(pcm(wav), one.pcm) for wav, one in zip(found, made, strict=True))
        assert load_clips(source, 2) == found[:2]
    (only,) = load_clips(str(folder / "1.wav"), 9)
    assert np.array_equal(pcm(only), made[1].pcm)
    assert len(load_clips("sounds/data/caption.parquet", 5)) == 5  # of the installed tasks


def test_clips_that_are_none(tmp_path):
    table = jsonl(tmp_path / "table.jsonl", [{"text": "a"}])
    with pytest.raises(AttackError, match="it has the columns text, none of them of sounds"):
        load_clips(table, 1)
    with pytest.raises(AttackError, match=r"attack clips is 'absent\.wav', and there is no such file"):
        load_clips("absent.wav", 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(AttackError, match=r"neither pictures .* nor sounds"):
        load_clips(str(tmp_path / "folder"), 1)
    (tmp_path / "folder" / "a.wav").write_bytes(clip(0).wav)
    (tmp_path / "folder" / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(AttackError, match=r"clip 2 of attack clips .* cannot be read"):
        load_clips(str(tmp_path / "folder"), 9)
    empty = jsonl(tmp_path / "empty.jsonl", [{"audio": ""}])
    with pytest.raises(AttackError, match="has no clip; expected at least one"):
        load_clips(empty, 1)


@pytest.fixture
def words(tmp_path):
    return jsonl(tmp_path / "words.jsonl", [row(f"word {number}") for number in range(10)])


def test_pairs_share_clips_out_evenly_and_by_the_seed(words, tmp_path):
    (tmp_path / "folder").mkdir()
    for number in range(4):
        (tmp_path / "folder" / f"{number}.wav").write_bytes(clip(number).wav)
    shared = [pairs_with_clips(settings(corpus=words, clips=str(tmp_path / "folder"), seed=seed)) for seed in (0, 0, 1)]
    assert sorted(Counter(pair.audio for pair in shared[0]).values()) == [2, 2, 3, 3]
    assert [pair[:2] for pair in shared[0]] == [pair[:2] for pair in load_corpus(words)]
    assert shared[0] == shared[1] != shared[2]


def test_the_key_says_what_the_clips_are_and_not_where(words, tmp_path):
    from lmms_smoothguard.attacks.craft import settings_parts

    for name, number in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / f"{name}.wav").write_bytes(clip(number).wav)
    same, moved, other = (settings_parts(settings(corpus=words, clips=str(tmp_path / f"{n}.wav"))) for n in "abc")
    assert same == moved != other
    bare = settings_parts(settings(corpus=words))
    assert "clips" not in bare["settings"] and bare["content of clips"] is None


def test_settings_that_say_no_clips_or_too_many(words, tmp_path):
    (tmp_path / "a.wav").write_bytes(clip(0).wav)
    with pytest.raises(AttackError, match=r"names no clips, .* expected attack_clips=<a sound file"):
        pairs_with_clips(settings(corpus=words))
    own = jsonl(tmp_path / "own.jsonl", [row("red", audio="a.wav")])
    with pytest.raises(AttackError, match=r"attack clips is .*a\.wav', and the corpus .* names clips of its own"):
        pairs_with_clips(settings(corpus=own, clips=str(tmp_path / "a.wav")))
    with pytest.raises(ConfigError, match="has no corpus"):
        pairs_with_clips(settings(clips=str(tmp_path / "a.wav")))
    with pytest.raises(ConfigError, match=r"attack base is 'a\.png' and size None, of a picture"):
        pairs_with_clips(settings(corpus=words, base="a.png"))
    with pytest.raises(ConfigError, match=r"attack clips is 'a\.wav', of sounds, and base is None and size 64"):
        settings(clips="a.wav", size=64)
    with pytest.raises(ConfigError, match="attack clips is ' '; expected a sound file"):
        settings(clips=" ")


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"snr": 40}, "snr is 40, of L2 norms"),
        ({"norm": "l2"}, "universal knows linf alone"),
    ],
)
def test_its_budget_is_linf(fields, hint):
    with pytest.raises(SmoothGuardError, match=hint):
        AttackSettings.parse("universal", fields)


def test_pictures_have_no_clips():
    from lmms_smoothguard.attacks.universal import base_picture

    with pytest.raises(ConfigError, match=r"attack clips is 'a\.wav', of sounds"):
        base_picture(settings(clips="a.wav"), None)


def test_a_lesson_of_another_rate_than_the_models_is_refused(words, tmp_path):
    from tiny_models import sounds as models

    from lmms_smoothguard.attacks.cache import AttackCache
    from lmms_smoothguard.attacks.universal_sounds import SoundLesson, UniversalSoundCrafter

    model, processor = models.qwen2_audio()
    one = clip(1)
    prompt = "<s>USER: <|audio_bos|><|AUDIO|><|audio_eos|>\nSay red. ASSISTANT:"
    inputs = dict(processor(text=[prompt], audio=[one.samples], sampling_rate=RATE, return_tensors="pt"))
    crafter = UniversalSoundCrafter(model, processor, AttackCache(tmp_path / "cache"), quiet=True)
    with pytest.raises(AttackError, match="rate of 8000 Hz, and the model hears 16000 Hz"):
        crafter.craft_change(settings(corpus=words), [SoundLesson(inputs, (5,), (Sound(one.samples, 8000),))])


def test_attacking_sample_by_sample_is_not_for_a_universal_change(words, tmp_path):
    from lmms_smoothguard.attacking.asked import AttackRun

    with pytest.raises(ConfigError, match=r"one change for all images or sounds, .* or lmms-eval's attack=universal"):
        AttackRun(model="tiny-audio", data="sounds_pope", out=tmp_path / "out", attack=settings(corpus=words))
