"""Requests that the proxy refuses: each with a reason, and none of it reaches the engine."""

from __future__ import annotations

import base64
import io
import json
import struct
import wave
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from serving import remembering, served
from typer.testing import CliRunner

from lmms_smoothguard.cli import app as cli
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import ConfigError, SmoothGuardError
from lmms_smoothguard.proxy import remote
from lmms_smoothguard.proxy.answering import comparable
from lmms_smoothguard.proxy.app import make_app
from lmms_smoothguard.proxy.settings import ProxySettings

DEFENSE = SmoothGuardConfig(num_samples=3, sigma=0.1, noise_space="pixel", seed=None)


@pytest.fixture(scope="module")
def engine():
    app = remembering()
    with served(app) as app.state.address:
        yield app.state


@pytest.fixture
def proxied(engine):
    running = []

    def start(**settings):
        fields = {"upstream": engine.address, "defense": DEFENSE, "retries": 0}
        server = served(make_app(ProxySettings(**{**fields, **settings})))
        running.append(server)
        return httpx.Client(base_url=server.__enter__(), timeout=30)

    del engine.bodies[:]
    yield start
    for server in running:
        server.__exit__(None, None, None)


def data_of(image, form="PNG", **options):
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def address(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


SMALL = data_of(Image.new("RGB", (8, 8)))


def image(url=None, **more):
    return {"type": "image_url", "image_url": {"url": address(SMALL) if url is None else url, **more}}


def request_of(*parts, **fields):
    return {
        "model": "m",
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}],
        **fields,
    }


def bomb(width, height):
    """A PNG that claims to be that large, in a few bytes."""

    def chunk(kind, held):
        return struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


GIF = data_of(Image.new("L", (8, 8)), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 255)])
BAD = {
    "no JSON": (b"{", 400, "no JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', 400, "no JSON"),
    "too deep": (b'{"messages":' + b"[" * 100_000, 400, "no JSON"),
    "a list": ([], 400, "at least one message"),
    "no messages": ({"model": "m"}, 400, "at least one message"),
    "empty messages": ({"model": "m", "messages": []}, 400, "at least one message"),
    "a message that is none": ({"messages": ["hello"]}, 400, "message 0 is a str"),
    "content that is a number": ({"messages": [{"role": "user", "content": 3}]}, 400, "is a int"),
    "broken base64": (request_of(image("data:image/png;base64,@@@@")), 400, "no valid base64"),
    "base64 cut": (request_of(image(address(SMALL)[:-3])), 400, "no valid base64"),
    "not base64 at all": (request_of(image("data:image/png,hello")), 400, "no picture"),
    "another type": (request_of(image(address(SMALL, "text/html"))), 400, "no picture"),
    "no picture": (request_of(image(address(b"hello"))), 400, "cannot be read"),
    "a torn picture": (request_of(image(address(data_of(Image.effect_noise((64, 64), 90))[:900]))), 400, "cannot be read"),
    "a TIFF": (request_of(image(address(data_of(Image.new("RGB", (8, 8)), "TIFF")))), 400, "cannot be read"),
    "several frames": (request_of(image(address(GIF, "image/gif"))), 400, "2 frames"),
    "too many pixels": (request_of(image(address(bomb(9_000, 9_000)))), 413, "9000 x 9000"),
    "a bomb": (request_of(image(address(bomb(60_000, 60_000)))), 413, "expected at most"),
    "a larger bomb": (request_of(image(address(bomb(2**31 - 1, 2**31 - 1)))), 413, "expected at most"),
    "a remote picture": (request_of(image("https://example.org/a.png")), 400, "--remote"),
    "a file": (request_of(image("file:///etc/passwd")), 400, "--remote"),
    "no url": (request_of({"type": "image_url", "image_url": {}}), 400, "no picture"),
    "more in a picture": (request_of(image(uuid="1")), 400, "no picture"),
    "two contents in a part": (request_of({**image(), "video_url": {"url": "x"}}), 400, "more than one content"),
    "a picture in a text part": (request_of({"type": "text", "text": "a", "image_url": {"url": "x"}}), 400, "no plain text"),
    "video": (request_of({"type": "video_url", "video_url": {"url": "x"}}), 400, "'video_url', which cannot be defended"),
    "embeddings": (request_of({"type": "image_embeds", "image_embeds": "x"}), 400, "cannot be defended"),
    "a part without a type": (request_of({"image_url": {"url": "x"}}), 400, "type None"),
    "a type that is a list": (request_of({"type": ["image_url"]}), 400, "cannot be defended"),
    "sound": (request_of({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}), 400, "--audio-sigma"),
    "pictures beside the messages": (request_of(images=["x"]), 400, "'images'"),
    "pictures beside a message's content": ({"messages": [{"role": "user", "content": "a", "images": ["x"]}]}, 400, "'images'"),
    "other sizes": (request_of(image(), mm_processor_kwargs={"max_pixels": 9}), 400, "mm_processor_kwargs"),
    "other sizes by the template": (request_of(image(), chat_template_kwargs={"do_resize": False}), 400, "chat_template_kwargs"),
    "pictures for the template": (
        {"messages": [{"role": "user", "content": "<image> What?"}], "chat_template_kwargs": {"processor_kwargs": {"images": ["x"]}}},
        400, "chat_template_kwargs",
    ),
    "a picture as a template's word": (
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"thinking": {"images": ["x"]}}},
        400, "chat_template_kwargs",
    ),
    "very many objects": (b'{"messages": [' + b"{}," * 200_000 + b"{}]}", 413, "fill the memory"),
    "very many values": (b'{"messages": [' + b"0," * 2_000_000 + b"0]}", 413, "fill the memory"),
    "n": (request_of(image(), n=2), 400, "n is 2"),
    "spoken answers": (request_of(image(), modalities=["text", "audio"]), 400, "modalities"),
    "too many": (request_of(*[image()] * 17), 400, "17 pictures"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_why_and_go_no_further(proxied, engine, name):
    sent, status, message = BAD[name]
    response = proxied().post("/v1/chat/completions", content=sent if isinstance(sent, bytes) else json.dumps(sent))
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine.bodies == []


def test_a_name_that_stands_twice(proxied, engine):
    """One reader takes the first, another the last: the picture would pass unseen."""
    hidden = json.dumps(request_of(image()))[:-1] + ', "messages": [{"role": "user", "content": "hello"}]}'
    response = proxied().post("/v1/chat/completions", content=hidden)
    assert (response.status_code, engine.bodies) == (400, [])
    assert "twice" in response.json()["error"]["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large(proxied, engine, declared):
    large = json.dumps(request_of(image(), user="x" * 2**21)).encode()

    def pieces():
        yield from (large[start : start + 2**16] for start in range(0, len(large), 2**16))

    response = proxied(most_bytes=2**20).post("/v1/chat/completions", content=large if declared else pieces())
    assert (response.status_code, engine.bodies) == (413, [])


def test_what_is_allowed_passes(proxied, engine):
    client = proxied(extra_fields=("extra",))
    detailed = {**image(detail="high"), "cache_control": {"type": "ephemeral"}}
    told = [{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": None, "tool_calls": []}]
    asked = request_of(detailed, extra=1, temperature=0.5, chat_template_kwargs={"enable_thinking": False})
    asked["messages"] = told + asked["messages"]
    assert client.post("/v1/chat/completions", json=asked).json()["smoothguard"]["answered"] == 3
    for body in engine.bodies:
        assert {name: value for name, value in body.items() if name != "messages"} == {
            name: value for name, value in asked.items() if name != "messages"
        }
        assert body["messages"][:2] == told
        assert body["messages"][2]["content"][0]["image_url"]["detail"] == "high"
    for form, kind in (("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("GIF", "image/gif"), ("BMP", "image/bmp")):
        part = (
            image(address(data_of(Image.new("RGB", (8, 8))), kind))
            if form == "PNG"
            else image(address(data_of(Image.new("RGB", (8, 8)), form), kind))
        )
        assert client.post("/v1/chat/completions", json=request_of(part)).status_code == 200


def test_pixels_are_counted_over_a_requests_pictures_and_all_requests_in_work(proxied, engine):
    square = image(address(data_of(Image.new("RGB", (100, 100)))))
    client = proxied(most_pixels=25_000)
    assert client.post("/v1/chat/completions", json=request_of(square, square)).status_code == 200
    del engine.bodies[:]
    refused = client.post("/v1/chat/completions", json=request_of(square, square, square))
    assert (refused.status_code, engine.bodies) == (413, [])
    # Four at a time with room for one and a half: one is always taken, others wait their turn or are told to.
    client = proxied(most_pixels_in_work=15_000)
    with ThreadPoolExecutor(4) as users:
        found = list(users.map(lambda _: client.post("/v1/chat/completions", json=request_of(square)), range(12)))
    told = Counter(response.status_code for response in found)
    assert told[200] >= 1
    assert told[200] + told[503] == 12
    assert all(response.json()["error"]["code"] == "busy" for response in found if response.status_code == 503)
    assert client.post("/v1/chat/completions", json=request_of(square)).status_code == 200  # all of it is given back


# -- sound -------------------------------------------------------------------------------------------------------------


def wav(seconds=0.5, rate=16_000, level=0.3):
    written = io.BytesIO()
    tone = level * np.sin(np.arange(int(seconds * rate)) * 0.2)
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((tone * 32767).astype("<i2").tobytes())
    return written.getvalue()


def sound(data):
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def samples(body):
    data = base64.b64decode(body["messages"][0]["content"][0]["input_audio"]["data"])
    with wave.open(io.BytesIO(data)) as file:
        assert file.getframerate() == 16_000
        return np.frombuffer(file.readframes(10**6), "<i2") / 32768


def test_sounds_get_noise_in_amplitude(proxied, engine):
    clip = wav()
    response = proxied(audio_sigma=0.05).post("/v1/chat/completions", json=request_of(sound(clip)))
    assert response.status_code == 200
    clean, *noisy = sorted(map(samples, engine.bodies), key=lambda found: np.abs(np.diff(found)).mean())
    with wave.open(io.BytesIO(clip)) as file:
        assert (
            np.abs(clean * 32768 - np.frombuffer(file.readframes(10**6), "<i2")).max() <= 1
        )  # 16 bits, rounded once more
    first, second = (found - clean for found in noisy)
    assert first.std() == pytest.approx(0.05, rel=0.03)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"hello", "cannot be read"), (wav(seconds=0), "no samples"), (wav(seconds=3), "longer than 2 seconds")],
)
def test_bad_sounds(proxied, engine, data, message):
    response = proxied(audio_sigma=0.05, longest_sound=2.0).post("/v1/chat/completions", json=request_of(sound(data)))
    assert (response.status_code, engine.bodies) == (400, [])
    assert message in response.json()["error"]["message"]


# -- pictures by their address -----------------------------------------------------------------------------------------


@pytest.fixture
def gallery():
    app = FastAPI()

    @app.get("/{name}")
    async def picture(name: str):
        from fastapi.responses import RedirectResponse, Response

        if name == "moved.png":
            return RedirectResponse("/a.png")
        return Response(SMALL * (1000 if name == "large.png" else 1), media_type="image/png")

    with served(app) as where:
        yield where


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0.0.0.0", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "[::1]", "[fe80::1]",
             "[fc00::1]", "[::ffff:127.0.0.1]", "[2002:7f00:1::]", "224.0.0.1", "2130706433", "0x7f.1"]
)  # fmt: skip
def test_private_addresses_are_never_asked(proxied, engine, gallery, host):
    port = gallery.rpartition(":")[2]
    response = proxied(remote=True).post("/v1/chat/completions", json=request_of(image(f"http://{host}:{port}/a.png")))
    assert response.status_code in (400, 403)
    assert (
        "not on the public network" in response.json()["error"]["message"]
        or "cannot be found" in response.json()["error"]["message"]
    )
    assert engine.bodies == []


@pytest.mark.parametrize(
    "url", ["ftp://example.org/a.png", "http://user:word@example.org/a.png", "http:///a.png", "http://example.org:x/a"]
)
def test_addresses_that_are_none(proxied, engine, url):
    response = proxied(remote=True).post("/v1/chat/completions", json=request_of(image(url)))
    assert (response.status_code, engine.bodies) == (400, [])


def test_a_public_picture_is_fetched_once(proxied, engine, gallery, monkeypatch):
    """The gallery plays the public network: its address counts as public here, by its name's first answer alone."""
    monkeypatch.setattr(remote, "_is_public", lambda address: address == "127.0.0.1")
    port = gallery.rpartition(":")[2]
    client = proxied(remote=True, most_bytes=2**16)
    for name, status in (
        ("a.png", 200),
        ("moved.png", 400),
        ("large.png", 413),
    ):
        del engine.bodies[:]
        response = client.post("/v1/chat/completions", json=request_of(image(f"http://localhost:{port}/{name}")))
        assert response.status_code == status
        assert len(engine.bodies) == (3 if status == 200 else 0)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upstream": "engine:8000"}, "upstream is"),
        ({"upstream": "ftp://engine"}, "upstream is"),
        ({"upstream": "http://user:word@engine"}, "user or password"),
        ({"quorum": 1}, "quorum is 1"),
        ({"quorum": 4}, "quorum is 4"),
        ({"timeout": 0}, "timeout is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"audio_sigma": 0}, "audio_sigma is 0"),
        ({"most_requests": 0}, "most_requests is 0"),
    ],
)
def test_settings_that_cannot_be_meant(changes, message):
    with pytest.raises(ConfigError, match=message):
        ProxySettings(**{"upstream": "http://engine", "defense": DEFENSE, **changes})


@pytest.mark.parametrize(
    "fields",
    [{"noise_space": "normalized"}, {"level": "token"}, {"embedder": "model"}, {"num_samples": 1}, {"sigma": 0}],
)
def test_defences_that_cannot_be_carried_out_from_outside(fields):
    with pytest.raises(SmoothGuardError, match="expected"):
        ProxySettings(upstream="http://engine", defense=SmoothGuardConfig(**{"noise_space": "pixel", **fields}))


def test_the_command_asks_where_the_model_looks():
    runner = CliRunner()
    assert "--seen-as" in runner.invoke(cli, ["proxy", "http://engine"]).output
    found = runner.invoke(cli, ["proxy", "http://engine", "--seen-as", "large"])
    assert isinstance(found.exception, ConfigError)


def test_tool_calls_are_compared_by_what_they_call():
    def completion(arguments, name="look", text=None, number="1"):
        call = {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"choices": [{"message": {"content": text, "tool_calls": [call]}}]}

    assert comparable(completion('{"a": 1, "b": 2}')) == comparable(completion('{"b":2,"a":1}', number="2"))
    assert comparable(completion('{"a": 1}')) != comparable(completion('{"a": 2}'))
    assert comparable(completion('{"a": 1}')) != comparable(completion('{"a": 1}', name="other"))
    assert comparable(completion("no JSON")) != comparable(completion("{}"))
    assert comparable({"choices": [{"message": {"content": "Yes."}}]}) == "Yes."
