"""Sweeps and certificates about sounds: noise on waveforms, in amplitude and in decibels."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from lmms_smoothguard.attacks.sound_clips import TOO_FAINT
from lmms_smoothguard.certifying.records import read_certificates
from lmms_smoothguard.choice import choose
from lmms_smoothguard.cli import app
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.evaluation.questions import Question, load_questions
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path
from lmms_smoothguard.sounds import Sound
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.sweeps.answers import AnswerCache, Answerer
from lmms_smoothguard.sweeps.grid import Grid, conditions
from lmms_smoothguard.sweeps.media import check_media
from lmms_smoothguard.sweeps.noises import Noise, config_of
from lmms_smoothguard.sweeps.plots import sigma_figure
from lmms_smoothguard.sweeps.records import read_sweep
from lmms_smoothguard.sweeps.session import sweep

POPE = tasks_path() / "sounds" / "data" / "pope.parquet"
NEWEST = {"name": "sweep", "about": "a trial", "command": "smoothguard sweep ..."}


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny-audio")


@pytest.fixture(scope="module")
def questions():
    return load_questions(str(POPE), limit=3)


@pytest.mark.parametrize(("space", "size"), [("amplitude", 0.3), ("snr", 3.0)])
def test_answers_of_copies_are_those_of_the_defence(subject, questions, tmp_path, space, size):
    answerer = Answerer(subject.model, subject.processor, AnswerCache(tmp_path))
    inputs = subject.inputs(questions[0])
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 8}
    swept = answerer.noisy(arguments, Noise(size, space, 0), 5)
    config = {**choose({"defense": "smoothguard"}).to_dict(), "num_samples": 6}
    fields = {"audio_sigma": size} if space == "amplitude" else {"audio_snr": size}
    verdict = subject.answer(inputs, 8, choose({**config, **fields})).verdict
    assert tuple(swept) == verdict.candidates[1:]
    again = Answerer(subject.model, subject.processor, AnswerCache(tmp_path))
    assert again.noisy(arguments, Noise(size, space, 0), 5) == swept and again.answered == 0
    assert again.noisy(arguments, Noise(size / 2, space, 0), 1) and again.answered == 1


def test_noise_of_pictures_is_none_for_sounds(subject, questions, tmp_path):
    answerer = Answerer(subject.model, subject.processor, AnswerCache(tmp_path))
    with pytest.raises(UndefendableError, match="no image"):
        answerer.noisy({**subject.inputs(questions[0]), "max_new_tokens": 8}, Noise(0.1, "pixel", 0), 1)


def test_a_sweep_over_noise_on_sounds(subject, questions, tmp_path):
    grid = Grid(
        sigmas=(0.0, 0.02, 0.5), noise_spaces=("amplitude",), num_samples=(1, 3),
        conditions=conditions(("none", "pgd"), ("0.002", "30dB"), {"steps": "10"}),
    )  # fmt: skip
    record, _ = sweep(subject, questions, grid, tmp_path, **NEWEST)
    assert list(record.tasks) == ["clean", "pgd 0.002", "pgd 30 dB"]
    assert record.tasks["pgd 30 dB"].attack.settings["snr"] == 30
    assert record.points[0].defense is None and record.points[0].size == 0
    assert {(p.space, p.size) for p in record.points[1:]} == {("amplitude", 0.02), ("amplitude", 0.5)}
    asr = {p.size: record.figure(p, "pgd 0.002", "asr").value for p in record.points if p.main}
    assert asr[0.0] > asr[0.02]
    (tmp_path / "sweep.json").write_text(json.dumps(record.to_dict()))
    again = read_sweep(tmp_path / "sweep.json")
    assert [p.noise for p in again.points] == [p.noise for p in record.points]
    assert "amplitude" in sigma_figure([again]).axes[0].get_xlabel()


@pytest.mark.parametrize(
    ("space", "size", "words"),
    [("amplitud", 0.1, "amplitude"), ("amplitude", 3.0, "full scale 1"), ("snr", 500.0, "in dB")],
)
def test_noise_that_is_none_is_refused_before_any_model(space, size, words):
    with pytest.raises(ConfigError, match=words):
        config_of(space, size)


def test_certificates_of_answers_about_sounds_are_in_the_waveforms_norm(tmp_path):
    command = [
        "certify",
        "tiny-audio",
        str(POPE),
        "--what",
        "answers",
        "--sigma",
        "0.02",
        "--n",
        "40",
        "--n-select",
        "8",
    ]
    command += [
        "--alpha",
        "0.05",
        "--limit",
        "2",
        "--radii",
        "0.01,0.05",
        "--out",
        str(tmp_path / "run"),
        "--batch-size",
        "20",
    ]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    record = read_certificates(tmp_path / "run" / "certify.json")
    assert "amplitude" in record.scope and record.settings["certificate"]["noise_space"] == "amplitude"
    reach = 0.02 * 1.4599  # sigma Phi^-1(.05 ** (1 / 40)): no 40 draws that agree certify more
    assert record.largest["0"] == pytest.approx(reach, rel=1e-3)
    assert np.isfinite(list(record.curves["radius"])).all()


def test_certificates_of_sounds_need_a_sigma_and_take_their_radii_from_it(tmp_path, monkeypatch):
    command = ["certify", "tiny-audio", str(POPE), "--what", "answers", "--limit", "1", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        patched.setattr("lmms_smoothguard.subject.Subject", lambda *a, **k: pytest.fail("loaded"))
        for more in ([], ["--sigma", "2"]):
            refused = CliRunner().invoke(app, [*command, *more])
            assert isinstance(refused.exception, ConfigError) and "amplitude (full scale 1)" in str(refused.exception)
            assert "pixel" not in str(refused.exception)
    few = ["--n", "20", "--n-select", "4", "--alpha", "0.05"]
    made = CliRunner().invoke(app, [*command, *few, "--sigma", "0.02"], catch_exceptions=False)
    assert made.exit_code == 0, made.output
    record = read_certificates(tmp_path / "run" / "certify.json")
    assert (record.settings["certificate"]["sigma"], record.asked["radii"]) == (0.02, [0.01, 0.02, 0.04])
    assert "certified@0.04" in record.figures and "--radii" not in record.command


class Loaded(Exception):
    """A model was asked for."""


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (
            "sounds",
            (),
            "--noise-space is pixel, and question .* has sounds; expected --noise-space amplitude .* or snr",
        ),
        ("sounds", ("--noise-space", "amplitude,normalized"), "--noise-space is normalized"),
        ("sounds", ("--noise-space", "snr"), "expected one for sounds, such as --eps 0.001 .* or --eps 40dB"),
        ("sounds", ("--noise-space", "snr", "--attack", "square"), "'square' changes pictures"),
        ("shapes", ("--noise-space", "amplitude"), "has pictures; expected --noise-space pixel or normalized"),
        ("shapes", ("--eps", "40dB"), "expected one for pictures, such as --eps 4/255"),
        ("sounds", ("--noise-space", "amplitude", "--eps", "0.001,40dB"), None),
        ("sounds", ("--sigma", "0", "--attack", "none"), None),
        ("shapes", (), None),
    ],
)
def test_what_a_sweep_cannot_vary_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, data, options, said):
    def load(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr("lmms_smoothguard.subject.Subject", load)
    file = tasks_path() / data / "data" / "pope.parquet"
    made = CliRunner().invoke(app, ["sweep", "tiny-audio", str(file), "--limit", "2", "--out", str(tmp_path), *options])
    if said is None:
        assert isinstance(made.exception, Loaded)
    else:
        assert isinstance(made.exception, ConfigError) and re.search(said, str(made.exception)), made.exception
        assert "attack_eps" not in str(made.exception)


def test_a_question_with_a_picture_and_a_sound_is_not_swept(tmp_path, images):
    images[0].save(tmp_path / "0.png")
    sound = Sound(np.full(800, 0.1, np.float32), 16000)
    (tmp_path / "0.wav").write_bytes(sound.wav)
    (tmp_path / "t.jsonl").write_text(
        json.dumps({"image": "0.png", "audio": "0.wav", "question": "?", "answer": "yes"})
    )
    with pytest.raises(ConfigError, match=r"'0' has pictures and sounds; .*--column images=none"):
        check_media(Grid(noise_spaces=("amplitude",)), load_questions(str(tmp_path / "t.jsonl")))


def test_silence_is_in_no_figure_of_an_attack_in_decibels(subject, tmp_path):
    """No noise is any number of decibels below it."""
    question = load_questions(str(POPE), limit=1)[0]
    clips = {"heard": question.sounds[0], "silent": Sound(np.zeros(32000, np.float32), 16000)}
    rows = []
    for name, clip in clips.items():
        (tmp_path / f"{name}.wav").write_bytes(clip.wav)
        clean = subject.answer(subject.inputs(Question("q", (), question.text, sounds=(clip,))), 8).text
        assert clean in ("Yes", "No")
        rows.append({"id": name, "audio": f"{name}.wav", "question": question.text, "answer": clean})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = Grid(
        sigmas=(0.0,), noise_spaces=("amplitude",), num_samples=(1,),
        conditions=conditions(("pgd",), ("40dB", "0.001"), {"steps": "1"}),
    )  # fmt: skip
    record, samples = sweep(subject, load_questions(str(tmp_path / "t.jsonl")), grid, tmp_path / "cache", **NEWEST)
    counts = {task: record.figure(record.points[0], task, "asr").count for task in record.tasks}
    assert counts == {"pgd 40 dB": 1, "pgd 0.001": 2}
    assert [(s.id, s.task.split(" |")[0]) for s in samples if s.left_out == TOO_FAINT] == [("silent", "pgd 40 dB")]


def test_features_of_sounds_are_not_certified(tmp_path):
    made = CliRunner().invoke(app, ["certify", "tiny-audio", str(POPE), "--limit", "2", "--out", str(tmp_path / "run")])
    assert made.exit_code != 0
    assert "pictures alone" in str(made.exception) + made.output


def test_the_page_on_sounds_is_that_of_the_result_files():
    root = tasks_path().parent
    if not any((root / "benchmarks" / "results").glob("audio_*.json")):
        pytest.skip("the sweeps were not run yet: make sounds")
    script = root / "benchmarks" / "sound_pages.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0
