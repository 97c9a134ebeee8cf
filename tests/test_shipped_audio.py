"""The embedded audio model as it is shipped: what its card says, fragile when clean, steady under noise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("soundfile")

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.goals import goal
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.evaluation.questions import load_questions
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path
from lmms_smoothguard.sounds import Sound
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.tiny import PLACES

HOME = PLACES["tiny-audio"]
POPE = tasks_path() / "sounds" / "data" / "pope.parquet"


@pytest.fixture(scope="module")
def subject():
    return Subject("tiny-audio")


@pytest.fixture(scope="module")
def questions():
    return load_questions(str(POPE), limit=40)


def said(subject, question, sounds=None):
    asked = question if sounds is None else dataclasses.replace(question, sounds=sounds)
    return subject.answer(subject.inputs(asked), 4).text.lower()


def test_it_is_a_real_qwen2_audio_of_the_size_that_was_set(subject):
    assert type(subject.model).__name__ == "Qwen2AudioForConditionalGeneration"
    assert sum(parameter.numel() for parameter in subject.model.parameters()) <= 6_000_000
    assert sum(path.stat().st_size for path in HOME.iterdir()) <= 12 * 2**20


def test_it_answers_held_out_questions_clean_and_under_noise(subject, questions):
    rng = np.random.default_rng(3)
    right = {"clean": 0, "noisy": 0}
    for question in questions:
        (clean,) = question.sounds
        noisy = Sound((clean.samples + 0.04 * rng.standard_normal(len(clean.samples))).astype(np.float32), clean.rate)
        right["clean"] += said(subject, question) == question.label
        right["noisy"] += said(subject, question, (noisy,)) == question.label
    assert min(right.values()) >= 38, right


def test_it_is_led_away_by_what_nobody_hears_and_not_by_chance_of_that_size(subject, questions, tmp_path):
    settings = AttackSettings.parse({"name": "pgd", "eps": 0.001, "steps": 20})
    jobs = []
    for question in questions[:12]:
        inputs = subject.inputs(question)
        answer = goal(
            subject.tokenizer, inputs, subject.answer(inputs, 4).ids, label=question.label, clean_is_right=True
        )
        jobs.append(Job(settings, (), inputs, answer, subject.sounds(question)))
    entries = Crafter(subject.model, subject.processor, AttackCache(tmp_path), quiet=True).craft(jobs)
    rng = np.random.default_rng(4)
    led, noised = 0, 0
    for question, entry in zip(questions[:12], entries, strict=True):
        (clean,) = question.sounds
        apart = np.abs(entry.sounds[0].samples - clean.samples).max()
        assert 0 < apart <= 0.001 + 1e-6
        signs = 0.001 * rng.choice([-1, 1], len(clean.samples))
        led += said(subject, question, entry.sounds) != question.label
        noised += (
            said(subject, question, (Sound((clean.samples + signs).astype(np.float32), clean.rate),)) != question.label
        )
    assert led >= 8 and noised <= 1, (led, noised)


def test_the_card_states_its_figures():
    stated = json.loads((HOME / "figures.json").read_text())
    card = Path(HOME / "README.md").read_text()
    for name, figure in stated["figures"].items():
        assert f"| {name} | {100 * figure['value']:.1f} % ({100 * figure['low']:.1f}-{100 * figure['high']:.1f}" in card
    existence = stated["figures"]["existence"]
    assert existence["value"] >= 0.95 and existence["count"] == 420
