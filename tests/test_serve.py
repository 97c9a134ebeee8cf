"""`smoothguard serve`: transformers' own server on the embedded model, in a process of its own, defended whatever it is asked."""

from __future__ import annotations

import json

import httpx
import pytest
from serving import smoothguard_server, transformers_server
from test_proxy import chat, content, encoded
from typer.testing import CliRunner

import hf_integration.calls
from hf_integration.serve import _defended
from lmms_smoothguard.blackbox.config import check_outside
from lmms_smoothguard.choice import choose
from lmms_smoothguard.cli import app
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.serving import choice_of
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.model import MODEL_DIR

DROWNING = {"sigma": 2.0, "noise_space": "pixel", "num_samples": 3, "include_clean": False, "seed": 7}
"""So much noise that nothing is seen of the picture: a defended answer is told from a plain one."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    settings = [word for name, value in DROWNING.items() for word in ("--set", f"{name}={value}")]
    with smoothguard_server(logs / "defended", *settings) as defended, transformers_server(logs / "plain") as plain:
        yield defended, plain


@pytest.fixture
def asked(scenes, images, llava):
    """Requests about objects that are there, and what the drowned model says to them: another thing than the plain one."""
    model, processor = llava
    found = []
    for number in range(6):
        question = language.existence_question(scenes.present(number)[0])
        request = chat(images[number], question, temperature=0)
        messages = [
            {
                "role": "user",
                "content": [{"type": "image", "image": images[number]}, {"type": "text", "text": question}],
            }
        ]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        answers = []
        for defense in (DROWNING, False):
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False, smoothguard=defense)
            text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.append(text.strip())
        if answers[0] != answers[1]:
            found.append((request, *answers))
    assert len(found) >= 2
    return found


def said(address, request):
    response = httpx.post(f"{address}/v1/chat/completions", json=request, timeout=60)
    assert response.status_code == 200, response.text
    return content(response.json()).strip()


def test_every_request_is_defended_as_in_process(servers, asked):
    defended, plain = servers
    assert [said(defended, request) for request, _, _ in asked] == [drowned for _, drowned, _ in asked]
    assert [said(plain, request) for request, _, _ in asked] == [clear for _, _, clear in asked]


@pytest.mark.parametrize("config", [{}, {"smoothguard": False}, {"smoothguard": {"sigma": 0.0}}, {"smoothguard": None}])
def test_a_request_cannot_switch_it_off(servers, asked, config):
    brought = {"generation_config": json.dumps({"max_new_tokens": 6, "do_sample": False, **config})}
    for request, drowned, _ in asked:
        assert said(servers[0], {**request, **brought}) == drowned


def test_streamed_answers_are_defended(servers, asked):
    request, drowned, _ = asked[0]
    with httpx.stream(
        "POST", f"{servers[0]}/v1/chat/completions", json={**request, "stream": True}, timeout=60
    ) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines if json.loads(line)["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas).strip() == drowned


def test_the_responses_route_is_defended(servers, asked, images):
    request, drowned, _ = asked[0]
    parts = request["messages"][0]["content"]
    told = [
        {"type": "input_image", "image_url": parts[0]["image_url"]["url"]},
        {"type": "input_text", "text": parts[1]["text"]},
    ]
    body = {
        "model": str(MODEL_DIR),
        "input": [{"role": "user", "content": told}],
        "max_output_tokens": 6,
        "stream": False,
    }
    response = httpx.post(f"{servers[0]}/v1/responses", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.json()["output"][0]["content"][0]["text"].strip() == drowned


def test_requests_without_pictures_are_as_without_us(servers):
    request = {
        "model": str(MODEL_DIR),
        "messages": [{"role": "user", "content": "Is there a red circle?"}],
        "max_tokens": 5,
        "temperature": 0,
    }
    assert said(servers[0], request) == said(servers[1], request)


def test_routes_past_generate_are_not_served(servers, images):
    picture = encoded(images[0])
    questions = {"there": {"type": "yes_no", "question": "Is there a red circle?"}}
    body = {"model": str(MODEL_DIR), "state": "", "questions": questions, "assets": {"a": picture}}
    for path in ("/v1/systemone", "/v1/audio/transcriptions"):
        assert httpx.post(servers[0] + path, json=body).status_code == 404
        assert httpx.post(servers[1] + path, json=body, timeout=60).status_code != 404  # there is such a route
    assert httpx.get(servers[0] + "/docs").status_code == 404


def test_what_cannot_be_defended_is_refused_with_its_reason(servers, asked):
    request = asked[0][0]
    several = {**request, "generation_config": json.dumps({"num_return_sequences": 2, "do_sample": True})}
    response = httpx.post(f"{servers[0]}/v1/chat/completions", json=several, timeout=60)
    assert response.status_code == 400
    assert "UndefendableError" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "--continuous-batching"], "bypasses generate"),
        (["--", "--cb-block-size", "16"], "bypasses generate"),
        (["--", "--no-such-option"], "no-such-option"),
        (["--set", "sigma"], "expected FIELD=VALUE"),
        (["--set", "sigmma=1"], "did you mean 'sigma'"),
        (["--defense", "none"], "expected one to serve with"),
        (["--set", "num_samples=1"], "one answer is no vote"),
        (["--set", "sigma=0"], "equal copies defend nothing"),
        (["--defense", "smoothguard+feature_smoothing", "--set", "sigma=0.0"], "equal copies defend nothing"),
        (["--defense", "feature_smoothing", "--set", "sigma=0"], "without noise nothing is smoothed"),
    ],
)
def test_what_cannot_be_served_ends_before_it_starts(arguments, message):
    found = CliRunner().invoke(app, ["serve", str(MODEL_DIR), *arguments])
    assert isinstance(found.exception, ConfigError) or found.exit_code == 2
    assert message in f"{found.exception} {found.output}"
    assert not hf_integration.calls._forced


@pytest.mark.parametrize("field", [{"num_samples": 1}, {"sigma": 0}])
def test_what_defends_nothing_is_refused_for_the_same_reason_on_either_side_of_a_server(field):
    """In a server and before one; measurements may ask for it."""
    config = SmoothGuardConfig(noise_space="pixel", **field)
    with pytest.raises(ConfigError) as outside:
        check_outside(config)
    with pytest.raises(ConfigError) as inside:
        choice_of("smoothguard", [f"{name}={value}" for name, value in field.items()])
    assert str(outside.value) == str(inside.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_samples": 1},
        {"sigma": 0},
        {"audio_sigma": 0},
        {"level": "token", "num_samples": 1},
        {"defense": "smoothguard+feature_smoothing", "sigma": 0.0},
        SmoothGuardConfig(num_samples=1),
    ],
)
def test_what_defends_nothing_is_not_forced_and_what_was_forced_stays(settings):
    hf_integration.force(DROWNING)
    try:
        forced = hf_integration.calls._forced
        with pytest.raises(ConfigError, match=r"one answer is no vote|equal copies defend nothing"):
            hf_integration.force(settings)
        with pytest.raises(ConfigError, match="None to lift it"):
            hf_integration.force(False)
        assert hf_integration.calls._forced is forced
    finally:
        hf_integration.force(None)
    hf_integration.force({"audio_sigma": 0, "audio_snr": 20.0})  # noise all the same
    hf_integration.force(None)


def test_a_server_of_a_defence_that_defends_nothing_changes_nothing_before_it_is_refused():
    from transformers.cli.serving import server
    from transformers.cli.serving.model_manager import ModelManager

    before = server.build_server, ModelManager.load_model_and_processor
    with pytest.raises(ConfigError, match="one answer is no vote"), _defended(choose({"num_samples": 1})):
        pytest.fail("it would be served")
    assert (server.build_server, ModelManager.load_model_and_processor) == before
    assert hf_integration.calls._forced is None


def test_a_forced_defence_stands_over_every_call(llava, batch, monkeypatch):
    model, _ = llava
    inputs = batch(0)
    plain = model.generate(**inputs, max_new_tokens=4, smoothguard=False, return_dict_in_generate=True)
    assert not hasattr(plain, "smoothguard")
    hf_integration.force(DROWNING)
    try:
        for asked in ({}, {"smoothguard": False}, {"smoothguard": {"num_samples": 2}}):
            forced = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, **asked)
            assert len(forced.smoothguard[0].candidates) == 3
        with pytest.raises(UndefendableError, match="bypasses"):
            model.generate_batch([[1, 2]])
        with pytest.raises(ConfigError, match="None to lift it"):
            hf_integration.force(False)
    finally:
        hf_integration.force(None)
    again = model.generate(**inputs, max_new_tokens=4, smoothguard=False, return_dict_in_generate=True)
    assert not hasattr(again, "smoothguard")
