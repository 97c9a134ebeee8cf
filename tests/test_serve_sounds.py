"""`smoothguard serve` on a model that hears: every sound of a request is noised, whatever the request says."""

from __future__ import annotations

import base64

import httpx
import pytest
from serving import smoothguard_server

from lmms_smoothguard.choice import choose
from lmms_smoothguard.evaluation.questions import load_questions
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.tiny import PLACES

pytest.importorskip("librosa")
DROWNING = {"audio_sigma": 1.0, "num_samples": 3, "include_clean": False, "seed": 7}
"""Noise in which nothing is heard: a defended answer is told from a plain one."""


@pytest.fixture(scope="module")
def asked():
    """Questions whose answers drown, with the drowned answer."""
    subject = Subject("tiny-audio")
    defense = choose({"defense": "smoothguard", **DROWNING})
    found = []
    for question in load_questions(str(tasks_path() / "sounds" / "data" / "pope.parquet"), limit=12):
        inputs = subject.inputs(question)
        plain, drowned = subject.answer(inputs, 4).text, subject.answer(inputs, 4, defense).text
        if plain != drowned:
            found.append((question, drowned))
    assert len(found) >= 3
    return found


def test_a_servers_answers_about_sounds_are_the_defended_ones(asked, tmp_path):
    settings = [word for name, value in DROWNING.items() for word in ("--set", f"{name}={value}")]
    with smoothguard_server(tmp_path / "log", *settings, model=PLACES["tiny-audio"]) as address:
        for question, drowned in asked[:3]:
            sound = {"data": base64.b64encode(question.sounds[0].wav).decode(), "format": "wav"}
            content = [{"type": "input_audio", "input_audio": sound}, {"type": "text", "text": question.text}]
            request = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
            brought = {"generation_config": '{"max_new_tokens": 4, "do_sample": false, "smoothguard": false}'}
            for body in (request, request | brought):
                response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120)
                assert response.status_code == 200, response.text
                assert response.json()["choices"][0]["message"]["content"].strip() == drowned
        sound["data"] = base64.b64encode(b"no sound at all").decode()
        refused = httpx.post(f"{address}/v1/chat/completions", json=request, timeout=120)
        assert refused.status_code == 400, refused.text
        assert "cannot be read" in refused.json()["error"]["message"]
