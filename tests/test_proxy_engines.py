"""What an engine may say to the proxy, and what of it a client gets: real HTTP on both sides, the engine's words are a test's."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from serving import served
from test_proxy_bad_requests import SMALL, address, image, request_of

from lmms_smoothguard.blackbox.pictures import Sight
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.proxy.app import make_app
from lmms_smoothguard.proxy.settings import ProxySettings

DEFENSE = SmoothGuardConfig(num_samples=5, sigma=0.1, noise_space="pixel", seed=None)
TO_THE_END = dataclasses.replace(DEFENSE, early_stop="off")
ASKED = request_of(image(address(SMALL)))
TEXT = {"messages": [{"role": "user", "content": "Hello."}]}


class Engine:
    """Answers chats with `say(number)`: a message, or the whole body as bytes."""

    def __init__(self):
        self.say, self.requests, self.paths, self.most, self._open = lambda number: {"content": "Fine."}, [], [], 0, 0
        self._lock = threading.Lock()
        self.app = FastAPI()

        @self.app.post("/v1/chat/completions")
        async def chat(request: Request):
            asked = await request.json()
            with self._lock:
                self.requests.append((dict(request.headers), asked))
                number = len(self.requests) - 1
            said = self.say(number)
            if isinstance(said, Response):
                return said
            body = said if isinstance(said, bytes) else json.dumps(completion(said)).encode()
            return Response(body, media_type="application/json", headers={"set-cookie": f"session=of-{number}"})

        @self.app.get("/{path:path}")
        async def other(path: str):
            self.paths.append(path)
            return {"object": "list", "data": [path]}

    def slowly(self, seconds):
        """A streamed answer that takes its time; counts how many are open."""

        def pieces():
            with self._lock:
                self._open += 1
                self.most = max(self.most, self._open)
            try:
                yield "data: 1\n\n"
                time.sleep(seconds)
                yield "data: [DONE]\n\n"
            finally:
                with self._lock:
                    self._open -= 1

        return StreamingResponse(pieces(), media_type="text/event-stream")


def completion(message):
    return {"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}]}


@pytest.fixture
def engine():
    made = Engine()
    with served(made.app) as made.address:
        yield made


@pytest.fixture
def proxied(engine):
    running = []

    def start(**settings):
        fields = {"upstream": engine.address, "defense": DEFENSE, "retries": 0, "sight": Sight(8)}
        server = served(make_app(ProxySettings(**{**fields, **settings})))
        running.append(server)
        return httpx.Client(base_url=server.__enter__(), timeout=60)

    yield start
    for server in running:
        server.__exit__(None, None, None)


def ask(client, body=ASKED, **options):
    return client.post("/v1/chat/completions", json=body, **options)


# -- what is voted on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", [
    lambda n: {"content": None, "function_call": {"name": "f", "arguments": json.dumps({"x": n if n < 2 else 7})}},
    lambda n: {"content": None, "reasoning_content": f"thought {n if n < 2 else 7}"},
    lambda n: {"content": "", "reasoning": f"thought {n if n < 2 else 7}"},
])  # fmt: skip
def test_answers_without_a_text_are_compared_by_what_they_have(proxied, engine, message):
    engine.say = message
    told = ask(proxied(defense=TO_THE_END)).json()
    assert told["smoothguard"]["agreement"] < 1
    assert "7" in json.dumps(told["choices"][0]["message"])  # three of five agree


def test_a_function_call_is_streamed_too(proxied, engine):
    call = {"name": "f", "arguments": '{"x": 1}'}
    engine.say = lambda number: {"content": None, "function_call": call, "reasoning": "so"}
    lines = [line.removeprefix("data: ") for line in ask(proxied(), ASKED | {"stream": True}).text.split("\n\n")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines if line.startswith("{")]
    assert {"function_call": call} in deltas and {"reasoning": "so"} in deltas


# -- malformed answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [
    {"content": None, "tool_calls": 5},
    {"content": None, "tool_calls": ["x"]},
    {"content": None, "function_call": "x"},
    {"content": None, "refusal": {"a": 1}},
    {"content": "a", "reasoning_content": {"a": 1}},
    json.dumps(completion({"content": "\ud83d"})).encode(),
    json.dumps(completion({"content": "a"})).replace('"stop"', "-Infinity").encode(),
    b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
], ids=["tool calls", "a tool call", "function call", "refusal", "reasoning", "half a character", "infinity", "nested"])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_malformed_answer_is_one_copys_failure(proxied, engine, said, stream):
    engine.say = lambda number: said if number == 2 else {"content": "Fine."}
    response = ask(proxied(defense=TO_THE_END), ASKED | {"stream": stream})
    assert response.status_code == 200
    assert response.headers["x-smoothguard-answers"] == "4/5"
    assert "Fine." in response.text


# -- between users -----------------------------------------------------------------------------------------------------


def test_an_engines_cookies_go_to_nobody(proxied, engine):
    client = proxied()
    for body in (TEXT, ASKED, TEXT, ASKED):
        with httpx.Client(base_url=client.base_url, timeout=60) as user:
            assert ask(user, body).status_code == 200
    assert len(engine.requests) > 8
    assert not [headers for headers, _ in engine.requests if "cookie" in headers]


def test_copies_have_ids_of_their_own(proxied, engine):
    ask(proxied(), ASKED | {"request_id": "mine"}, headers={"x-request-id": "r"})
    assert len({headers["x-request-id"] for headers, _ in engine.requests}) == len(engine.requests) > 2
    assert not [body for _, body in engine.requests if "request_id" in body]


def test_a_header_that_is_no_text_is_refused(proxied, engine):
    for body in (TEXT, ASKED):
        response = ask(proxied(), body, headers=[(b"authorization", b"Bearer \xe9")])
        assert response.status_code == 400 and "authorization" in response.json()["error"]["message"]
    assert not engine.requests


# -- other routes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [
    "/v1/models/../../metrics", "/v1/models/..%2f..%2fmetrics", "/v1/models/%2e%2e/%2e%2e/metrics", "/v1/models/a/..%5c..%5cmetrics",
    "/v1/models/./../../metrics", "/v1/models/a%0d%0ab",
])  # fmt: skip
def test_the_list_of_models_leads_to_no_other_route(proxied, engine, path):
    """As bytes on the wire: httpx would tidy the path up."""
    import socket

    host, port = str(proxied().base_url.netloc, "ascii").split(":")
    with socket.create_connection((host, int(port))) as wire:
        wire.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
        found = b"".join(iter(lambda: wire.recv(4096), b""))
    assert b"404" in found.split(b"\r\n", 1)[0]
    assert not engine.paths


def test_names_of_models_are_passed_on_whole(proxied, engine):
    client = proxied()
    for path, name in (("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"), ("a%3Fb=1", "a?b=1")):
        assert client.get(f"/v1/models/{path}").json()["data"] == [f"v1/models/{name}"]


def test_text_is_compressed_only_for_those_who_ask(proxied, engine):
    ask(proxied(), TEXT, headers={"accept-encoding": "identity"})
    ask(proxied(), TEXT, headers={"accept-encoding": "gzip"})
    assert [headers["accept-encoding"] for headers, _ in engine.requests] == ["identity", "gzip"]


# -- bounds ------------------------------------------------------------------------------------------------------------


def _all_at_once(client, bodies):
    found = [None] * len(bodies)

    def one(number):
        found[number] = ask(client, bodies[number])

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_texts_are_in_work_until_they_are_handed_on(proxied, engine):
    """Their answers have begun, and have not ended."""
    engine.say = lambda number: engine.slowly(1.5)
    client = proxied(most_requests=2)
    with (
        client.stream("POST", "/v1/chat/completions", json=TEXT) as one,
        client.stream("POST", "/v1/chat/completions", json=TEXT) as two,
    ):
        reading = [one.iter_text(), two.iter_text()]  # kept: a reader that is dropped leaves
        assert all("1" in next(texts) for texts in reading)
        assert client.get("/health").json()["in_work"] == 2
        assert ask(client, TEXT).status_code == 503
    for _ in range(100):
        if client.get("/health").json()["in_work"] == 0:
            break
        time.sleep(0.05)
    assert ask(client, TEXT).status_code == 200


def test_texts_take_their_turn_at_the_engine(proxied, engine):
    engine.say = lambda number: engine.slowly(0.3)
    client = proxied(most_upstream=2)
    assert {response.status_code for response in _all_at_once(client, [TEXT] * 6)} == {200}
    assert engine.most == 2


# -- how the model sees pictures ---------------------------------------------------------------------------------------


def test_pictures_are_brought_to_what_the_model_sees():
    from PIL import Image

    assert Sight.parse("48x32").of(Image.new("RGB", (640, 8))).size == (48, 32)
    assert Sight.parse("64").of(Image.new("RGB", (300, 100))).size == (192, 64)
    assert Sight.parse("64").of(Image.new("RGB", (100, 34))).size == (100, 34)
    assert Sight.parse("keep").of(Image.new("RGB", (6400, 8))).size == (6400, 8)
    for size in ((301, 100), (100, 301), (25600, 64)):
        with pytest.raises(UndefendableError, match="sides of at most 3 to 1"):
            Sight.parse("64").of(Image.new("RGB", size))


def test_a_picture_that_would_be_squeezed_is_refused_or_squeezed_first(proxied, engine):
    from PIL import Image
    from test_proxy_bad_requests import data_of

    narrow = request_of(image(address(data_of(Image.new("RGB", (640, 8))))))
    response = ask(proxied(), narrow)
    assert response.status_code == 400 and "640 x 8" in response.json()["error"]["message"]
    assert not engine.requests
    assert ask(proxied(sight=Sight(size=(16, 16))), narrow).status_code == 200
    from test_proxy import pictures

    assert {picture.size for _, body in engine.requests for picture in pictures(body)} == {(16, 16)}
