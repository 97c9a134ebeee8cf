"""Sweeps and certificates about sounds: noise on waveforms, in amplitude and in decibels."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from lmms_smoothguard.certifying.records import read_certificates
from lmms_smoothguard.choice import choose
from lmms_smoothguard.cli import app
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.evaluation.questions import load_questions
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.sweeps.answers import AnswerCache, Answerer
from lmms_smoothguard.sweeps.grid import Grid, conditions
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
