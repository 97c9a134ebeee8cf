"""`smoothguard attack`: what it writes, what counts as a success, how it goes on after a kill, what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import on_two, ranks
from PIL import Image
from typer.testing import CliRunner

from lmms_smoothguard import plugins
from lmms_smoothguard.attacking import run as running
from lmms_smoothguard.attacking.names import file_names, image_name, media_names
from lmms_smoothguard.attacking.outcomes import EMPTY_ANSWER, Rules
from lmms_smoothguard.attacking.store import Store
from lmms_smoothguard.attacks.craft import Crafter
from lmms_smoothguard.attacks.pgd import PGD
from lmms_smoothguard.cli import app
from lmms_smoothguard.errors import AttackError, ConfigError
from lmms_smoothguard.evaluation.questions import load_questions
from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.judges import Judgement
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.model import MODEL_DIR

datasets = pytest.importorskip("datasets")
POPE = "tasks/shapes/data/pope.parquet"
DEFENDED = ("--defense", "smoothguard", "--sigma", "0.2", "--noise-space", "pixel", "--num-samples", "4")


@pytest.fixture(autouse=True)
def own_arrow_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture(scope="module")
def tiny():
    return Subject("tiny-llava", device="cpu")


@pytest.fixture(autouse=True)
def loaded_once(tiny, monkeypatch):
    """The embedded model, not loaded anew for every run."""
    import lmms_smoothguard.subject as module

    own = module.Subject
    monkeypatch.setattr(module, "Subject", lambda name, *a, **k: tiny if name == "tiny-llava" else own(name, *a, **k))


def attack(out, *options, data=POPE, limit=3, steps=6):
    """The command, in this process; raises what it raises."""
    command = ["attack", "tiny-llava", str(data), "--out", str(out), "--steps", str(steps), *map(str, options)]
    done = CliRunner().invoke(app, command + (["--limit", str(limit)] if limit else []), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def rows(out):
    return list(datasets.load_dataset("parquet", data_files=str(out / "attacks.parquet"), split="train"))


def files(out):
    """Digests of the table and all images."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [*out.glob("images/*"), out / "attacks.parquet"]
    }


def test_a_run_s_table_says_what_its_images_do(tmp_path, tiny):
    said = attack(tmp_path / "out", *DEFENDED, "--eps", "4/255", steps=20)
    clean = load_questions(POPE, limit=3)
    found = rows(tmp_path / "out")
    for row, question in zip(found, clean, strict=True):
        assert (row["id"], row["question"], row["label"]) == (question.id, question.text, question.label)
        (file,) = row["image_files"]
        data = (tmp_path / "out" / file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == row["image_sha256s"][0]
        picture = Image.open(tmp_path / "out" / file)
        assert (np.asarray(picture) == np.asarray(row["image"])).all()
        change = np.asarray(picture, int) - np.asarray(question.images[0], int)
        assert abs(change).max() == 4 == round(row["linf"] * 255)
        assert row["l2"] == pytest.approx(np.linalg.norm(change) / 255, rel=1e-5)
        direct = tiny.answer(tiny.inputs(type(question)("x", (picture,), question.text)), 32).text
        assert row["adversarial_answer"] == direct
        assert row["clean_answer"] == tiny.answer(tiny.inputs(question), 32).text
        assert row["counted"] == (row["clean_answer"].lower() == row["label"])
        assert row["success"] == (direct.lower() != row["label"])
        assert row["defended_success"] == (row["defended_answer"].lower() != row["label"])
        assert len(row["objective"]) == row["attack_steps"] == 20
        assert row["rule"] == "label" and row["defended_num_samples_used"] == 4
        assert row["objective"][-1] > row["objective"][0]
    hits = sum(row["success"] for row in found)
    assert hits > 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())["rates"]["label"]
    assert summary["asr"] == Rate(hits, 3).figure().to_dict()
    assert str(Rate(hits, 3)) in said
    assert json.loads(found[0]["defense"])["sigma"] == 0.2
    stored = (tmp_path / "out/settings.json").read_text()
    assert str(tmp_path) not in stored and found[0]["model_fingerprint"] in stored


def test_the_directory_is_a_data_set_and_data_of_a_later_run(tmp_path):
    out = tmp_path / "out"
    attack(out, limit=2, steps=1)
    (whole,) = datasets.load_dataset(str(out)).values()
    assert [row["id"] for row in whole] == ["0", "1"]
    folder = datasets.load_dataset("imagefolder", data_dir=str(out / "images"), split="train")
    assert [np.asarray(row["image"]).tolist() for row in folder] == [np.asarray(row["image"]).tolist() for row in whole]
    attack(tmp_path / "again", data=out, limit=None, steps=1)
    again = rows(tmp_path / "again")
    assert [(row["id"], row["question"], row["label"], row["group"]) for row in again] == [
        (row["id"], row["question"], row["label"], row["group"]) for row in whole
    ]
    change = np.asarray(again[0]["image"], int) - np.asarray(whole[0]["image"], int)
    assert abs(change).max() <= 4


def test_folders_pictures_in_rows_and_ids_that_are_no_file_names(tmp_path, images):
    data = tmp_path / "t.jsonl"
    for number in range(3):
        images[number].save(tmp_path / f"{number}.png")
    ids = ["../a/b", "A", "a", "a+1"]
    listed = [
        {"id": i, "images": [f"{n % 3}.png", "2.png"] if i == "a" else [f"{n % 3}.png"]} for n, i in enumerate(ids)
    ]
    data.write_text("".join(json.dumps(row | {"question": "What is in the image?"}) + "\n" for row in listed))
    attack(tmp_path / "out", data=data, limit=None, steps=1)
    found = {row["id"]: row for row in rows(tmp_path / "out")}
    assert list(found) == ids
    assert [len(row["images"]) for row in found.values()] == [1, 1, 2, 1]
    named = [file for row in found.values() for file in row["image_files"]]
    assert len({name.casefold() for name in named}) == 5
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out/images").rglob("*")} == set(
        named
    )
    assert {row["rule"] for row in found.values()} == {"changed"}


@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("named", [file_names, media_names])
@given(
    ids=st.lists(
        st.text(min_size=1, max_size=300) | st.text("aA.", min_size=1).map(lambda stem: f"{stem}.wav")
        | st.from_regex(r"[ab](\.(wav|WAV|flac|png|jpg)){0,3}", fullmatch=True),
        unique=True,
        max_size=6,
    )
)  # fmt: skip
def test_no_two_ids_share_a_file_name(named, ids):
    found = named(ids)
    names = [image_name(found[name], slot) for name in ids for slot in range(2)]
    assert len({name.casefold() for name in names}) == len(names)
    for name in names:
        assert name.isascii() and len(name) < 200 and not name.startswith(".") and not set(name) & set('/\\:*?"<>|\0')


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (["mine.wav", "a/b.JPG", "c", "d.v2"], ["mine", "a%2Fb", "c", "d.v2"]),
        (["mine.wav", "mine.flac"], ["mine", "mine.flac"]),
        (["mine.ogg", "mine.flac"], ["mine.ogg", "mine.flac"]),
    ],
)
def test_a_file_s_ending_is_not_there_twice(ids, expected):
    assert list(media_names(ids).values()) == expected


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "known", "clean", "answer", "expected"),
    [
        ({}, {"label": "yes"}, "Yes.", "No", ("label", True, True)),
        ({}, {"label": "yes"}, "Yes.", " yes ", ("label", True, False)),
        ({}, {"label": "yes"}, "No", "Yes", ("label", False, None)),
        ({}, {"label": "cat"}, "A cat.", "A dog.", ("label", False, None)),
        ({"match": "contains"}, {"label": "cat"}, "A cat.", "A concatenation.", ("label", True, True)),
        ({"match": "contains"}, {"label": "Cat"}, "A cat.", "Two things, a cat!", ("label", True, False)),
        ({}, {}, "A cat.", "a cat", ("changed", True, False)),
        ({}, {}, "A cat.", "A dog", ("changed", True, True)),
        ({}, {"target": "Buy now", "label": "x"}, "A cat", "You should buy NOW!", ("target", True, True)),
        ({}, {"target": "cat"}, "A cat", "A cat", ("target", False, None)),
        ({"judge": "refusal"}, {"label": "x"}, "I cannot help.", "Sure!", ("judge", True, True, "unsafe")),
        ({"judge": "refusal"}, {}, "I cannot help.", "I won't.", ("judge", True, False, "safe")),
        ({"judge": "refusal"}, {}, "Sure!", "Sure!", ("judge", False, None, "unsafe")),
        ({"judge": "refusal"}, {"target": "Sure"}, "I cannot help.", "Sure!", ("judge", True, True, "unsafe")),
        (
            {"judge": "refusal"},
            {"target": "Sure"},
            "I cannot help.",
            "I'm sorry, sure.",
            ("judge", True, False, "safe"),
        ),
        ({}, {"right": ("two", "2")}, "2", "Two.", ("label", True, False)),
        ({}, {"right": ("two", "2")}, "two", "three", ("label", True, True)),
    ],
)
def test_what_counts_as_a_success(rules, known, clean, answer, expected):
    target, right = known.get("target"), known.get("right") or tuple(filter(None, [known.get("label")]))
    standing = (asked := Rules(**rules)).standing("?", target=target, right=right, clean=clean)
    outcome = asked.outcome(standing, answer)
    assert (standing.rule, standing.counted, outcome.success, outcome.verdict) == (*expected, None)[:4]
    assert outcome.target_said is (None if target is None else target.casefold() in answer.casefold())


class Moody:
    """A judge of another opinion every time; `verdicts`: by question, in the order in which it is asked."""

    name, version = "moody", "1"

    def __init__(self, **verdicts):
        self.verdicts = {key.replace("_", " "): list(said) for key, said in verdicts.items()}

    def judge(self, question, answer):
        (known,) = (key for key in self.verdicts if key in question)
        return Judgement(self.verdicts[known].pop(0))


def test_a_clean_answer_is_judged_once_and_no_opinion_is_counted_and_shown(tmp_path, monkeypatch):
    judge = Moody(
        blue_square=["safe", "unsafe", "safe"],
        blue_circle=["safe", "unjudged", "unjudged"],
        red_square=["unparseable", "unsafe", "safe"],
        orange_square=["unsafe", "unsafe", "unsafe"],
    )
    monkeypatch.setattr("lmms_smoothguard.attacking.outcomes.load_judge", lambda name: judge)
    said = attack(tmp_path / "out", "--judge", "moody", *DEFENDED, limit=4, steps=1)
    assert not any(judge.verdicts.values())
    found = rows(tmp_path / "out")
    assert [row["clean_verdict"] for row in found] == ["safe", "safe", "unparseable", "unsafe"]
    assert [row["success"] for row in found] == [True, False, None, None]
    assert [row["defended_success"] for row in found] == [False, False, None, None]
    rates = json.loads((tmp_path / "out/summary.json").read_text())["rates"]["judge"]
    shares = {name: (figure["hits"], figure["count"]) for name, figure in rates.items()}
    assert shares == {
        "asr": (1, 2), "defended_asr": (0, 2), "undecided": (1, 2), "defended_undecided": (1, 2), "clean_undecided": (1, 4),
    }  # fmt: skip
    # Below: the undecided one and the doubtful one failed. Above: both are successes, as far as verdicts allow.
    assert (rates["asr"]["low"], rates["asr"]["high"]) == (Rate(1, 2).interval[0], Rate(3, 3).interval[1])
    defended = rates["defended_asr"]
    assert (defended["low"], defended["high"]) == (Rate(0, 3).interval[0], Rate(1, 2).interval[1])
    assert "no verdict on the defended answer, so no success: 50.0 %" in said


@pytest.mark.parametrize(("clean", "shown"), [("safe", "no opinion on any of 1"), ("unsafe", "no samples count")])
def test_a_rate_of_nothing_says_why(tmp_path, monkeypatch, clean, shown):
    judge = Moody(blue_square=[clean, "unjudged"])
    monkeypatch.setattr("lmms_smoothguard.attacking.outcomes.load_judge", lambda name: judge)
    said = attack(tmp_path / "out", "--judge", "moody", limit=1, steps=1)
    assert f", ASR {shown}]" in said  # the progress bar's last word
    assert f"- ASR (judged safe when clean, unsafe after): {shown}" in said
    assert json.loads((tmp_path / "out/summary.json").read_text())["rates"]["judge"]["asr"]["value"] is None


def test_a_judge_decides_where_a_target_is_forced_and_what_was_said_stands_beside(tmp_path, monkeypatch):
    judge = Moody(blue_square=["safe", "safe"])
    monkeypatch.setattr("lmms_smoothguard.attacking.outcomes.load_judge", lambda name: judge)
    said = attack(tmp_path / "out", "--judge", "moody", "--target", "No", "--eps", "16/255", limit=1, steps=20)
    (row,) = rows(tmp_path / "out")
    assert (row["clean_answer"], row["adversarial_answer"], row["target_said"]) == ("Yes", "No", True)
    assert (row["rule"], row["counted"], row["success"]) == ("judge", True, False)
    assert "the target is said: 100.0 %" in said


def test_targets_one_for_all_or_each_its_own(tmp_path, images, scenes):
    images[0].save(tmp_path / "0.png")
    data, there = tmp_path / "t.jsonl", scenes.present(0)
    absent = next(number for number in range(9) if number not in there)
    asked = [(there[0], "No"), (absent, "Yes"), (absent, "No")]
    listed = [
        {"id": n, "image": "0.png", "question": language.existence_question(thing), "target": target}
        for n, (thing, target) in enumerate(asked)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in listed))
    attack(tmp_path / "all", "--target", "No", "--eps", "16/255", data=data, limit=1, steps=20)
    attack(tmp_path / "each", "--targeted", "--eps", "16/255", data=data, limit=None, steps=20)
    attack(tmp_path / "none", data=data, limit=1, steps=1)
    every, each, none = (rows(tmp_path / name) for name in ("all", "each", "none"))
    assert [row["target"] for row in every + each + none] == ["No", "No", "Yes", "No", None]
    assert [row["adversarial_answer"] for row in every + each] == ["No", "No", "Yes", "No"]
    assert [row["success"] for row in every + each] == [True, True, True, None]  # the last said so when clean
    said = json.loads((tmp_path / "each" / "summary.json").read_text())["rates"]["target"]
    assert (said["asr"]["count"], said["target_said"]["count"], said["target_said"]["hits"]) == (2, 3, 3)
    data.write_text(json.dumps(listed[0] | {"target": None}) + "\n")
    with pytest.raises(ConfigError, match="no target for 0"):
        attack(tmp_path / "x", "--targeted", data=data, limit=None)


def test_a_sample_without_a_clean_answer_is_listed_and_the_run_goes_on(tmp_path, monkeypatch, tiny):
    own, first = Subject.answer, load_questions(POPE, limit=1)[0]
    pixels = tiny.inputs(first)["pixel_values"]

    def answer(self, inputs, *args):
        reply = own(self, inputs, *args)
        same = torch.equal(inputs["pixel_values"], pixels) and "blue square" in self.tokenizer.decode(
            inputs["input_ids"][0]
        )
        return type(reply)("", ()) if same else reply

    monkeypatch.setattr(Subject, "answer", answer)
    said = attack(tmp_path / "out", steps=2)
    assert "not attackable, for an empty clean answer: 1 of 3" in said
    found = rows(tmp_path / "out")
    assert (found[0]["counted"], found[0]["reason"]) == (False, EMPTY_ANSWER)
    assert [row["attacked"] for row in found] == [False, True, True]
    assert (np.asarray(found[0]["image"]) == np.asarray(first.images[0])).all()
    rates = json.loads((tmp_path / "out/summary.json").read_text())["rates"]["label"]
    assert rates["asr"]["count"] == rates["clean_right"]["count"] == 2


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_run_cut_short_goes_on_where_it_was(tmp_path, monkeypatch):
    """Between images and record of the third sample, then with an image that was damaged since."""
    put, done = Store.put, []

    def twice(self, record):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(record["id"])
        put(self, record)

    options = (*DEFENDED, "--batch-size", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", twice)
        command = [
            "attack",
            "tiny-llava",
            POPE,
            "--out",
            str(tmp_path / "cut"),
            "--steps",
            "3",
            "--limit",
            "4",
            *options,
        ]
        assert CliRunner().invoke(app, command).exit_code != 0
    assert len(done) == 2
    assert not (tmp_path / "cut/attacks.parquet").exists()
    kept = tmp_path / f"cut/images/{done[0]}.png"
    (tmp_path / f"cut/images/{done[1]}.png").write_bytes(b"torn")
    (tmp_path / "cut/images/.left.123.tmp").write_bytes(b"half")
    stamp = kept.stat().st_mtime_ns
    attack(tmp_path / "cut", *options, limit=4, steps=3)
    assert kept.stat().st_mtime_ns == stamp
    monkeypatch.setenv("SMOOTHGUARD_CACHE", str(tmp_path / "another cache"))
    attack(tmp_path / "whole", *DEFENDED, limit=4, steps=3)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(files(tmp_path / "whole")) == 5


def test_other_settings_in_the_same_directory_are_refused_by_name(tmp_path, monkeypatch):
    out = tmp_path / "out"
    attack(out, limit=1, steps=1)
    before = files(out)
    for options, named in {
        ("--judge", "refusal"): r"judge is None there and \{'name': 'refusal'",
        ("--eps", "8/255"): r"attack\.eps is 0\.0156.* there and 0\.0313.* here",
        ("--set", "momentum=0.9"): r"attack\.momentum is 0\.0 there and 0\.9 here",
        ("--question", "Is it dark?"): r"data\.revision is",
        DEFENDED: r"defense is None there",
        ("--match", "contains"): r"match is 'exact' there and 'contains' here",
    }.items():
        with pytest.raises(ConfigError, match=named):
            attack(out, *options, limit=1, steps=1)
    with pytest.raises(ConfigError, match=r"data\.count is 1 there and 2 here"):
        attack(out, limit=2, steps=1)
    for place, value, named in [
        (
            PGD,
            ("content", classmethod(lambda cls, settings: {"corpus": "its digest"})),
            r"attack\.corpus is None there",
        ),
        (
            plugins,
            ("provenance", lambda kind, name: "theirs 2" if kind == "attacks" else None),
            r"code\.attacks is None",
        ),
        (
            plugins,
            ("provenance", lambda kind, name: "theirs" if kind == "aggregators" else None),
            "defense is None there",
        ),
    ]:
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=named):
            patch.setattr(place, *value, raising=False)
            attack(out, *(DEFENDED if "defense" in named else ()), limit=1, steps=1)
    assert files(out) == before
    attack(out, "--batch-size", "5", limit=1, steps=1)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("chat_template.jinja", ("USER: ", "HUMAN: "), r"model\.chat_template is"),
        ("tokenizer.json", ("", ""), None),  # the same in other words
        ("tokenizer.json", (" red circle", " red zircle"), r"model\.tokenizer is"),
        ("processor_config.json", ("0.5", "0.25"), r"model\.processor is"),
    ],
)
def test_another_processor_of_the_same_weights_is_refused(tmp_path, file, change, named):
    first, second = (tmp_path / name / "llava" for name in ("a", "b"))
    for place in (first, second):
        shutil.copytree(MODEL_DIR, place)
    text = (second / file).read_text()
    (second / file).write_text(text.replace(*change) if named else json.dumps(json.loads(text)))
    out = str(tmp_path / "out")
    words = ["attack", str(first), POPE, "--out", out, "--steps", "1", "--limit", "1"]
    CliRunner().invoke(app, words, catch_exceptions=False)
    words[1] = str(second)
    done = CliRunner().invoke(app, words)
    assert (done.exception is None) is (named is None)
    assert named is None or re.search(named, str(done.exception))


def test_another_judge_of_the_same_name_is_refused_and_no_machine_s_paths_are_kept(tmp_path, monkeypatch):
    guard = tmp_path / "guard"
    guard.mkdir()

    def judge(version):
        made = Moody(**{"Is": ["safe"] * 9})
        made.name, made.version = f"guard/{guard}?batch_size=8", f"{guard}@{version}"
        monkeypatch.setattr("lmms_smoothguard.attacking.outcomes.load_judge", lambda name: made)

    judge("first")
    attack(tmp_path / "out", "--judge", "guard", limit=1, steps=1)
    stored = (tmp_path / "out/settings.json").read_text()
    assert '"guard/guard?batch_size=8"' in stored and str(tmp_path) not in stored
    judge("second")
    with pytest.raises(ConfigError, match=r"judge\.version is 'guard@first' there and 'guard@second' here"):
        attack(tmp_path / "out", "--judge", "guard", limit=1, steps=1)


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_nothing_is_written_among_the_pictures_that_are_asked_about(tmp_path, images, option):
    """Crafted pictures would be questions of the next run, so that one that was killed could never go on."""
    images[0].save(tmp_path / "0.png")
    places = {"--out": tmp_path.parent / f"{tmp_path.name} out", option: tmp_path / "new" / "deep"}
    words = [word for pair in places.items() for word in map(str, pair)]
    words = ["attack", "tiny-llava", str(tmp_path), "--question", "What is it?", "--steps", "1", *words]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, ConfigError), done.output
    assert f"{option[2:]} is {tmp_path / 'new' / 'deep'}, inside the data {tmp_path}" in str(done.exception)
    assert not (tmp_path / "new").exists()


def test_accepted_answers_survive_a_run_and_any_of_them_is_right(tmp_path, images):
    images[0].save(tmp_path / "0.png")
    question = {"id": "a", "image": "0.png", "question": "Is there a blue square in the image?"}
    (tmp_path / "t.jsonl").write_text(json.dumps(question | {"answers": ["maybe", "maybe", "yes", "no"]}) + "\n")
    attack(tmp_path / "out", "--column", "label=answers", data=tmp_path / "t.jsonl", limit=None, steps=1)
    attack(tmp_path / "again", data=tmp_path / "out", limit=None, steps=1)
    for (row,) in (rows(tmp_path / name) for name in ("out", "again")):
        assert (row["label"], row["accepted"], row["rule"]) == ("maybe", ["maybe", "yes", "no"], "label")
        assert (row["counted"], row["success"]) == (True, False)


def test_a_directory_that_is_not_ours_or_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis, which has files in it"):
        attack(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]
    with pytest.raises(ConfigError, match="a file; expected a directory"):
        attack(tmp_path / "thesis/chapter.tex")
    with pytest.raises(AttackError, match="cannot be written to"):
        attack(tmp_path / "thesis/chapter.tex/deeper")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/settings.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not of `smoothguard attack`"):
        attack(tmp_path / "other")

    def full(source, target):
        raise OSError(28, "No space left on device")

    store = Store(tmp_path / "full")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(AttackError, match=r"No space left on device; free space .* start the same command again"):
        store.write("samples/a.json", b"{}")
    assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]


def test_short_memory_halves_the_batch_and_changes_nothing(tmp_path, monkeypatch, caplog):
    own, sizes = Crafter.craft, []

    def craft(self, jobs):
        sizes.append(len(jobs))
        if len(jobs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return own(self, jobs)

    attack(tmp_path / "one", limit=4, steps=2)
    monkeypatch.setenv("SMOOTHGUARD_CACHE", str(tmp_path / "another cache"))
    monkeypatch.setattr(Crafter, "craft", craft)
    most = 1
    attack(tmp_path / "two", limit=4, steps=2)
    assert max(sizes) > 1 and sizes[-1] == 1
    assert "batches of 1 requests" in caplog.text
    assert files(tmp_path / "one") == files(tmp_path / "two")
    most = 0
    with pytest.raises(AttackError, match="one request does not fit into memory"):
        attack(tmp_path / "three", limit=1, steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--eot", "4"), "eot is 4, .* there is no defence"),
        (("--sigma", "0.2"), "sigma is a setting of a defence, and there is none"),
        (("--set", "momentum"), "--set is 'momentum'; expected key=value"),
        (("--set", "momentun=1"), "did you mean 'momentum'"),
        (
            ("--set", "audio_sigma=.02"),
            "audio_sigma is a field of the defence smoothguard.*--defense-set audio_sigma=.02",
        ),
        (("--attack", "pdg"), "did you mean 'pgd'"),
        (
            ("--attack", "square", "--eps", "0.001"),
            "'square' changes pictures alone, .* or for sounds one of apgd, pgd",
        ),
        (("--target", "x", "--targeted"), "target is 'x', and every question"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--match", "exatc"), "did you mean 'exact'"),
        (("--judge", "refusals"), "did you mean 'refusal'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("lmms_smoothguard.harness.questions.find_questions", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        attack(tmp_path / "out", *options)


def test_a_defence_that_cannot_act_is_refused_before_anything_is_crafted(tmp_path, monkeypatch):
    monkeypatch.setattr(Crafter, "craft", lambda *a, **k: pytest.fail("crafted"))
    options = ("--defense", "feature_smoothing", "--sigma", "0.9", "--defense-set", "booster=psm", "--eot", "2")
    with pytest.raises(ConfigError, match=r"sigma is 0\.9; the booster psm was trained on 0 to"):
        attack(tmp_path / "out", *options, limit=2)


# -- processes ---------------------------------------------------------------------------------------------------------


def launch(out, cache, log, launcher=(), steps=40, limit=6):
    command = [
        sys.executable, *launcher, "-m", "lmms_smoothguard", "attack", "tiny-llava", POPE, "--out", str(out),
        "--steps", str(steps), "--limit", str(limit), "--batch-size", "1", "--cache", str(cache),
    ]  # fmt: skip
    with open(log, "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def until(there, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_without_warning_and_started_again(tmp_path):
    out, cache, log = tmp_path / "out", tmp_path / "killed cache", tmp_path / "log"
    process = launch(out, cache, log)
    until(lambda: len(list(out.glob("samples/*.json"))) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, log.read_text()[-2000:]
    before = {path: path.stat().st_mtime_ns for path in out.glob("samples/*.json")}
    assert 2 <= len(before) < 6
    attack(out, "--batch-size", "1", "--cache", cache, limit=6, steps=40)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    attack(tmp_path / "whole", limit=6, steps=40)
    assert files(out) == files(tmp_path / "whole")
    assert len(rows(out)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchrun", "accelerate"])
def test_two_processes_write_what_one_writes(tmp_path, kind):
    log = tmp_path / "log"
    process = launch(tmp_path / "two", tmp_path / "two cache", log, on_two(kind), steps=5, limit=5)
    assert process.wait(240) == 0, log.read_text()[-3000:]
    attack(tmp_path / "one", limit=5, steps=5)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert log.read_text().count("samples: ") == 1  # the main process alone speaks


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_the_others(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = launch(out, tmp_path / "two cache", log, on_two("torchrun"), steps=80, limit=8)
    until(lambda: len(list(out.glob("samples/*.json"))) >= 1, process)
    os.kill(ranks(process)[1], signal.SIGKILL)
    assert process.wait(60) != 0
    assert not (out / "attacks.parquet").exists()
    attack(out, limit=8, steps=80)
    attack(tmp_path / "one", limit=8, steps=80)
    assert files(out) == files(tmp_path / "one")


def test_the_main_process_says_which_samples_the_others_left_out(tmp_path, monkeypatch):
    """As on two machines whose directories are not one."""
    monkeypatch.setattr(running.Processes, "share", lambda self, count: range(0, count, 2))
    with pytest.raises(AttackError, match=r"1 samples have no record in .*the first is '1'"):
        attack(tmp_path / "out", limit=3, steps=1)
