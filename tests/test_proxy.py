"""The proxy before transformers' own server on the embedded model, with faults between the two. Nothing of either is replaced."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import Faulty, free_port, served, transformers_server

from lmms_smoothguard.aggregation.verdict import aggregate, normalize_answer
from lmms_smoothguard.blackbox.pictures import Sight
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.proxy.app import make_app
from lmms_smoothguard.proxy.settings import ProxySettings
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.model import MODEL_DIR
from lmms_smoothguard.tiny.scenes import OBJECTS

DEFENSE = SmoothGuardConfig(num_samples=5, sigma=0.2, noise_space="pixel", seed=None)
SIDE = 64


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with transformers_server(tmp_path_factory.mktemp("engine") / "log") as address:
        yield address


@pytest.fixture
def between(engine):
    faulty = Faulty(engine)
    with served(faulty.app) as faulty.address:
        yield faulty


@pytest.fixture
def proxied(between):
    """Starts a proxy of such settings before the faults; its client."""
    running = []

    def start(**settings):
        fields = {"upstream": between.address, "defense": DEFENSE, "timeout": 20.0, "retries": 0, "pause": 0.0}
        server = served(make_app(ProxySettings(**{**fields, **settings})))
        running.append(server)
        client = httpx.Client(base_url=server.__enter__(), timeout=60)
        running.append(client)
        return client

    yield start
    for one in reversed(running):
        one.__exit__(None, None, None)


def encoded(image, form="PNG", kind="image/png", **options):
    written = io.BytesIO()
    image.save(written, form, **options)
    return f"data:{kind};base64,{base64.b64encode(written.getvalue()).decode()}"


def decoded(url):
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def chat(*contents, **fields):
    """A request with these parts: texts, pictures, or parts as they are."""
    parts = []
    for content in contents:
        if isinstance(content, Image.Image):
            content = {"type": "image_url", "image_url": {"url": encoded(content)}}
        parts.append({"type": "text", "text": content} if isinstance(content, str) else content)
    body = {"model": str(MODEL_DIR), "messages": [{"role": "user", "content": parts}], "max_tokens": 6}
    return {**body, **fields}


@pytest.fixture
def asked(scenes, images):
    """A question with its picture."""
    return chat(images[0], language.existence_question(scenes.present(0)[0]))


def content(completion):
    return completion["choices"][0]["message"]["content"]


def pictures(body):
    return [decoded(part["image_url"]["url"]) for part in body["messages"][0]["content"] if part["type"] == "image_url"]


# -- what is asked and what is answered --------------------------------------------------------------------------------


def test_the_answer_is_the_vote_over_the_engines_answers_to_the_copies(proxied, between, engine, asked, images):
    response = proxied().post("/v1/chat/completions", json=asked)
    assert response.status_code == 200
    assert between.calls == 5
    copies = sorted(between.bodies, key=lambda body: noise_of(body, images[0]).std())
    answers = [content(httpx.post(f"{engine}/v1/chat/completions", json=body).json()) for body in copies]
    verdict = aggregate(answers, lambda: pytest.fail("no vectors needed"), clean_first=True)
    found = response.json()
    assert normalize_answer(content(found)) == normalize_answer(answers[verdict.chosen])
    report = found["smoothguard"]
    assert (report["agreement"], report["suspicion"], report["suspected"]) == (
        verdict.agreement,
        verdict.suspicion,
        verdict.suspected,
    )
    assert (report["num_samples"], report["answered"], report["failed"], report["counted"]) == (5, 5, 0, 5)
    assert response.headers["x-smoothguard-answers"] == "5/5"
    assert response.headers["x-smoothguard-agreement"] == f"{verdict.agreement:.3f}"


def noise_of(body, clean):
    return (np.asarray(pictures(body)[0], float) - np.asarray(clean, float)) / 255


def test_one_copy_is_clean_and_the_others_have_noise_of_sigma(proxied, between, images):
    grey = Image.new("RGB", (SIDE, SIDE), (128, 128, 128))  # far from both ends: little is clipped
    settings = {"defense": dataclasses.replace(DEFENSE, sigma=0.1)}
    proxied(**settings).post("/v1/chat/completions", json=chat(grey, grey, "What is this?"))
    noises = [np.stack([np.asarray(p, float) / 255 - 128 / 255 for p in pictures(body)]) for body in between.bodies]
    assert sum(not noise.any() for noise in noises) == 1
    noisy = [noise for noise in noises if noise.any()]
    for noise in noisy:
        assert noise.std() == pytest.approx(0.1, rel=0.03)
        assert abs(noise.mean()) < 0.003
    flat = np.stack(noisy).reshape(8, -1)  # copies, and equal pictures within a copy, have draws of their own
    assert np.abs(np.corrcoef(flat) - np.eye(8)).max() < 0.05


def test_noise_is_fresh_for_every_request_unless_it_has_a_seed(proxied, between, asked):
    for seed, equal in ((None, False), (3, True)):
        client = proxied(defense=dataclasses.replace(DEFENSE, seed=seed))
        del between.bodies[:]
        for _ in range(2):
            client.post("/v1/chat/completions", json=asked)
        first, second = (
            {pictures(body)[0].tobytes() for body in between.bodies[start : start + 5]} for start in (0, 5)
        )
        assert len(first) == 5
        assert len(first & second) == (5 if equal else 1)  # the clean one


def test_without_a_clean_copy_all_have_noise(proxied, between, asked, images):
    client = proxied(defense=dataclasses.replace(DEFENSE, include_clean=False))
    report = client.post("/v1/chat/completions", json=asked).json()["smoothguard"]
    assert report["suspicion"] is None
    assert min(np.abs(noise_of(body, images[0])).mean() for body in between.bodies) > 0.05


def test_pictures_are_brought_to_the_models_size_before_the_noise(proxied, between, asked):
    large = Image.new("RGB", (400, 200), (128, 128, 128))
    client = proxied(sight=Sight(100), defense=dataclasses.replace(DEFENSE, sigma=0.1))
    client.post("/v1/chat/completions", json=chat(large, Image.new("RGB", (60, 90)), "What is this?"))
    for body in between.bodies:
        assert [picture.size for picture in pictures(body)] == [(200, 100), (60, 90)]
    spread = sorted(np.asarray(pictures(body)[0], float).std() / 255 for body in between.bodies)
    assert spread[1:] == pytest.approx([0.1] * 4, rel=0.03)


def test_a_picture_is_turned_as_its_orientation_says(proxied, between):
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    exif = picture.getexif()
    exif[0x0112] = 6
    part = {"type": "image_url", "image_url": {"url": encoded(picture, exif=exif)}}
    proxied().post("/v1/chat/completions", json=chat(part, "What is this?"))
    turned = np.rot90(np.asarray(picture), -1)
    assert any(np.array_equal(np.asarray(pictures(body)[0]), turned) for body in between.bodies)


@pytest.mark.parametrize("usage", [False, True])
def test_a_streamed_answer_is_the_same_answer(proxied, asked, usage):
    client = proxied(defense=dataclasses.replace(DEFENSE, seed=1))
    whole = client.post("/v1/chat/completions", json=asked).json()
    options = {"stream_options": {"include_usage": True}} if usage else {}
    with client.stream("POST", "/v1/chat/completions", json={**asked, "stream": True, **options}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]) == content(
        whole
    )
    ended = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
    assert [chunk["choices"][0]["finish_reason"] for chunk in ended] == [whole["choices"][0]["finish_reason"]]
    assert ended[0]["smoothguard"]["agreement"] == whole["smoothguard"]["agreement"]
    assert ("usage" in chunks[-1]) == usage


def test_openais_own_client_reads_both(proxied, asked):
    import openai

    client = openai.OpenAI(base_url=f"{proxied().base_url}/v1", api_key="secret")
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content.strip()
    assert 0 < answer.smoothguard["agreement"] <= 1
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed).strip()


@pytest.mark.parametrize("stream", [False, True])
def test_requests_without_media_pass_unchanged(proxied, between, engine, stream):
    body = {"model": str(MODEL_DIR), "messages": [{"role": "user", "content": "Is there a red circle?"}], "max_tokens": 5, "n": 1,
            "stream": stream}  # fmt: skip
    response = proxied().post("/v1/chat/completions", json=body)
    assert between.bodies == [body]
    plain = httpx.post(f"{engine}/v1/chat/completions", json=body)
    assert response.headers["content-type"] == plain.headers["content-type"]
    assert without_ids(response.text) == without_ids(plain.text)
    assert "x-smoothguard-agreement" not in response.headers


def without_ids(text):
    events = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [{k: v for k, v in json.loads(event).items() if k not in ("id", "created")} for event in events]


# -- an engine in trouble ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 429, "cut", "garbage", "html"])
def test_answers_of_the_copies_that_came(proxied, between, asked, fault):
    between.plan = [fault, fault]
    response = proxied().post("/v1/chat/completions", json=asked)
    assert response.status_code == 200
    assert response.headers["x-smoothguard-answers"] == "3/5"
    assert response.json()["smoothguard"]["failed"] == 2


@pytest.mark.parametrize(("plan", "settings"), [([500, "cut", "garbage"], {}), ([500, 500], {"quorum": 4})])
def test_too_few_answers_are_no_answer(proxied, between, asked, plan, settings):
    between.plan = plan
    response = proxied(**settings).post("/v1/chat/completions", json=asked)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_quorum"
    assert "choices" not in response.json()


@pytest.mark.parametrize("fault", [500, 429, "cut", "garbage"])
def test_what_may_pass_is_tried_again(proxied, between, asked, fault):
    between.plan = [fault] * 3
    response = proxied(retries=3).post("/v1/chat/completions", json=asked)
    assert response.headers["x-smoothguard-answers"] == "5/5"
    assert between.calls == 8


def test_an_engine_that_asks_to_wait_is_given_its_time(proxied, between, asked):
    between.plan = ["later"] * 5
    assert proxied(retries=1).post("/v1/chat/completions", json=asked).headers["x-smoothguard-answers"] == "5/5"
    assert between.calls == 10
    times = {}
    for body, at in zip(between.bodies, between.times, strict=True):
        times.setdefault(json.dumps(body), []).append(at)
    assert all(second - first >= 1 for first, second in times.values())  # each copy's two attempts


def test_a_copy_that_hangs_is_given_up(proxied, between, asked):
    between.plan = ["hang"]
    started = time.monotonic()
    response = proxied(timeout=4.0).post("/v1/chat/completions", json=asked)
    assert response.headers["x-smoothguard-answers"] == "4/5"
    assert time.monotonic() - started < 20  # it would hang for 30 seconds


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_the_engine_will_not_answer_is_told_in_its_words(proxied, between, asked, status):
    between.plan = [status] * 5
    response = proxied(retries=3).post("/v1/chat/completions", json=asked)
    assert response.status_code == status
    assert response.json() == {"error": {"message": f"planned {status}"}}
    assert between.calls <= 5  # not tried again


def test_an_engine_that_is_not_there(asked):
    settings = ProxySettings(upstream=f"http://127.0.0.1:{free_port()}", defense=DEFENSE, retries=0)
    with served(make_app(settings)) as address:
        assert httpx.post(f"{address}/v1/chat/completions", json=asked).status_code == 503
        assert httpx.post(f"{address}/v1/chat/completions", json=chat("Hello")).status_code == 502
        assert httpx.get(f"{address}/v1/models").status_code == 502
        assert httpx.get(f"{address}/health").status_code == 503


def test_what_is_no_longer_needed_is_broken_off(proxied, between, images, scenes):
    """Three of five agree on a plain question with next to no noise; the two that hang decide nothing."""
    between.plan = ["hang", "hang"]
    asked = chat(images[0], language.existence_question(scenes.present(0)[0]))
    client = proxied(defense=dataclasses.replace(DEFENSE, sigma=0.01, early_stop="exact"))
    started = time.monotonic()
    response = client.post("/v1/chat/completions", json=asked)
    assert time.monotonic() - started < 15
    assert response.headers["x-smoothguard-answers"] == "3/5"
    assert response.json()["smoothguard"]["failed"] == 0
    assert eventually(lambda: between.left == 2)


def test_a_client_that_leaves_takes_its_copies_along(proxied, between, asked):
    between.plan = ["hang"] * 5
    client = proxied()

    async def leave():
        async with httpx.AsyncClient(base_url=client.base_url) as leaving:
            with pytest.raises(httpx.ReadTimeout):
                await leaving.post("/v1/chat/completions", json=asked, timeout=httpx.Timeout(10, read=2.0))

    asyncio.run(leave())
    assert between.calls == 5
    assert eventually(lambda: between.left == 5)
    assert eventually(lambda: client.get("/health").json()["in_work"] == 0)


def eventually(holds, seconds=10):
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def test_more_requests_than_there_is_room_for(proxied, between, asked):
    between.plan = ["hang"] * 5
    client = proxied(most_requests=1, timeout=5.0)
    first = threading.Thread(target=lambda: client.post("/v1/chat/completions", json=asked))
    first.start()
    assert eventually(lambda: between.calls == 5)
    refused = client.post("/v1/chat/completions", json=asked)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
    assert int(refused.headers["retry-after"]) >= 1
    first.join()
    assert client.post("/v1/chat/completions", json=asked).status_code == 200


def test_no_more_calls_at_a_time_than_the_engine_may_get(proxied, between, asked):
    most = Counter()
    ordinary = between._response

    async def counted(fault, body):
        most["now"] += 1
        most["most"] = max(most["most"], most["now"])
        try:
            return await ordinary(fault, body)
        finally:
            most["now"] -= 1

    between._response = counted
    assert proxied(most_upstream=2).post("/v1/chat/completions", json=asked).json()["smoothguard"]["answered"] == 5
    assert most["most"] == 2


def test_many_users_at_once_get_answers_of_their_own(proxied, engine, scenes, images):
    """Next to no noise: everybody's answer is the engine's plain one, and no two questions share a picture."""
    there = [scenes.present(n)[0] for n in range(12)]
    absent = [next(o for o in range(len(OBJECTS)) if o not in scenes.present(n)) for n in range(12)]
    asked = [chat(images[n % 12], language.existence_question(o), user=str(n)) for n, o in enumerate(there + absent)]
    plain = [content(httpx.post(f"{engine}/v1/chat/completions", json=body, timeout=60).json()) for body in asked]
    assert len(set(plain)) >= 2
    client = proxied(defense=dataclasses.replace(DEFENSE, num_samples=3, sigma=0.002), most_upstream=8)

    async def everybody():
        async with httpx.AsyncClient(base_url=client.base_url, timeout=120) as users:
            return await asyncio.gather(*(users.post("/v1/chat/completions", json=body) for body in asked))

    responses = asyncio.run(everybody())
    assert [response.status_code for response in responses] == [200] * 24
    assert [content(response.json()) for response in responses] == plain


# -- keys, routes, the server itself -----------------------------------------------------------------------------------


def test_keys_are_passed_on_and_never_logged(proxied, between, asked, caplog):
    caplog.set_level(logging.DEBUG)
    between.plan = [500, 500, 500]
    headers = {"authorization": "Bearer very-secret", "cookie": "session=also-secret", "x-request-id": "r1"}
    client = proxied()
    client.post("/v1/chat/completions", json=asked, headers=headers)
    client.post("/v1/chat/completions", json=asked, headers=headers)
    assert {found["authorization"] for found in between.headers} == {"Bearer very-secret"}
    assert all("cookie" not in found for found in between.headers)
    assert caplog.records
    assert "secret" not in caplog.text


def test_routes_that_are_not_defended_are_not_served(proxied, between, asked, engine):
    client = proxied()
    for path in (
        "/v1/completions",
        "/v1/responses",
        "/v1/embeddings",
        "/generate",
        "/load_model",
        "/v1/chat/completions/x",
    ):
        response = client.post(path, json=asked)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "undefended_route")
    assert between.calls == 0
    assert client.get("/docs").status_code == 404
    assert client.get("/v1/chat/completions").status_code in (404, 405)
    assert client.get("/health").json() == {"status": "ok", "in_work": 0}
    assert client.get("/v1/models").status_code == httpx.get(f"{engine}/v1/models").status_code


def test_the_command_finishes_what_is_in_work_when_it_is_stopped(between, asked, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "lmms_smoothguard", "proxy", between.address, "--port", str(port), "--seen-as", "keep",
               "--num-samples", "3"]  # fmt: skip
    found = []
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            assert eventually(lambda: answers(f"http://127.0.0.1:{port}/health"), 60), (tmp_path / "log").read_text()
            ordinary = between._response

            async def slow(fault, body):
                await asyncio.sleep(3)
                return await ordinary(fault, body)

            between._response = slow
            address = f"http://127.0.0.1:{port}/v1/chat/completions"

            def ask():
                found.append(httpx.post(address, json=asked, timeout=60))

            user = threading.Thread(target=ask)
            user.start()
            assert eventually(lambda: between.calls == 3)
            process.send_signal(signal.SIGTERM)
            user.join()
            assert process.wait(30) in (0, -signal.SIGTERM)
        finally:
            process.kill()
    assert found[0].status_code == 200
    assert "127.0.0.1" in (tmp_path / "log").read_text()


def answers(address):
    try:
        return httpx.get(address).status_code == 200
    except httpx.HTTPError:
        return False
