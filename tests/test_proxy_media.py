"""Media made to harm the proxy: sounds and pictures that grow when they are decoded, and hosts that answer as no host should."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import socket
import struct
import time
import tracemalloc

import httpx
import numpy as np
import pytest
import soundfile
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from serving import remembering, served

from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.proxy import remote
from lmms_smoothguard.proxy.app import make_app
from lmms_smoothguard.proxy.media import read_picture
from lmms_smoothguard.proxy.refusals import Refusal
from lmms_smoothguard.proxy.settings import ProxySettings
from lmms_smoothguard.sounds import read_clip

DEFENSE = SmoothGuardConfig(num_samples=3, sigma=0.1, noise_space="pixel", seed=None)
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def engine():
    app = remembering()
    with served(app) as app.state.address:
        yield app.state


@pytest.fixture(scope="module")
def client(engine):
    settings = ProxySettings(
        upstream=engine.address,
        defense=DEFENSE,
        retries=0,
        remote=True,
        audio_sigma=0.05,
        longest_sound=2.0,
        most_bytes=2**25,
    )
    with served(make_app(settings)) as address, httpx.Client(base_url=address, timeout=30) as found:
        yield found


@pytest.fixture
def asked(client, engine):
    """Asks about a part; the status, the reason and what the engine was asked."""

    def ask(part):
        del engine.bodies[:]
        content = [part, {"type": "text", "text": "What is this?"}]
        response = client.post(CHAT, content=json.dumps({"messages": [{"role": "user", "content": content}]}))
        reason = "" if response.status_code == 200 else response.json()["error"]["message"]
        return response.status_code, reason, list(engine.bodies)

    return ask


def data_of(image, form="PNG", **options):
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def inline(data):
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


SMALL = data_of(Image.new("RGB", (8, 8)))


# -- pictures by their address -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gallery():
    """A host that remembers what it is asked, compresses what should not be, and drips."""
    app = FastAPI()
    app.state.headers = []

    @app.get("/{name}")
    async def picture(name: str, request: Request):
        app.state.headers.append(dict(request.headers))
        if name == "drip":
            return StreamingResponse(drops(), media_type="image/png")
        encoding = request.query_params.get("encoding")
        data = SMALL
        for _ in range((encoding or "").count("gzip")):
            data = gzip.compress(data)
        return Response(data, headers={"content-encoding": encoding} if encoding else {})

    async def drops():
        for _ in range(200):
            yield b"x"
            await asyncio.sleep(0.1)

    with served(app) as app.state.address:
        yield app.state


@pytest.fixture
def public(gallery, monkeypatch):
    """The gallery plays the public network: its address counts as public here."""
    monkeypatch.setattr(remote, "_is_public", lambda address: address == "127.0.0.1")
    del gallery.headers[:]
    return gallery


@pytest.mark.parametrize("encoding", ["gzip, gzip", "gzip", "GZIP", "br", "zstd", "identity, gzip"])
def test_what_comes_compressed_is_refused_before_it_is_inflated(asked, public, encoding):
    status, reason, bodies = asked(image(f"{public.address}/a.png?encoding={encoding}"))
    assert (status, bodies) == (400, [])
    assert f"content-encoding {encoding!r}" in reason
    assert public.headers[0]["accept-encoding"] == "identity"


def test_what_names_no_compression_is_taken(asked, public):
    assert asked(image(f"{public.address}/a.png?encoding=identity"))[0] == 200
    assert asked(image(f"{public.address}/a.png"))[0] == 200


def test_a_host_that_drips_is_left(asked, public, monkeypatch):
    """A byte comes ten times in the time that is given: no single read takes too long."""
    monkeypatch.setattr(remote, "_SECONDS", 1.0)
    started = time.monotonic()
    status, reason, bodies = asked(image(f"{public.address}/drip"))
    assert (status, bodies) == (400, [])
    assert "within 1 seconds" in reason
    assert time.monotonic() - started < 8  # it would drip for twenty


def test_a_name_that_takes_its_time_is_left(monkeypatch):
    ordinary = socket.getaddrinfo

    def slow(host, *given, **named):
        time.sleep(2)
        return ordinary("127.0.0.1", *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(remote, "_SECONDS", 0.3)
    with pytest.raises(Refusal, match=r"within 0.3 seconds") as found:
        asyncio.run(remote.fetch_public("http://slow.example/a.png", 2**20))
    assert found.value.status == 400


@pytest.mark.parametrize(
    "host",
    ["[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]", "[::127.0.0.1]", "[::ffff:0:127.0.0.1]", "[fec0::1]", "[5f00::1]", "[ff0e::1]",
     "[2001:0:7f00:1::1]", "[2002:7f00:1::]", "[2002:a83f:8110::]", "168.63.129.16", "192.0.0.192"],
)  # fmt: skip
def test_addresses_that_lead_inside(asked, gallery, host):
    status, reason, bodies = asked(image(f"http://{host}:{gallery.address.rpartition(':')[2]}/a.png"))
    assert (status, bodies) == (403, [])
    assert "not on the public network" in reason


@pytest.mark.parametrize("address", ["8.8.8.8", "168.63.129.17", "2606:4700:4700::1111", "2002:808:808::1"])
def test_addresses_that_are_public(address):
    assert remote._is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://[::1]x/a.png",
        "http://[v1.a]/a.png",
        "http://1.1.1.1/\x01",
        "http://1.1.1.1/\ud800",
        "http://\ud800.example/",
        "http://１.１.１.１/a",
        "http://1.1.1.1:0/a.png",
        "http://1.1.1.1:-5/a.png",
        "http://1.1.1.1:99999/a.png",
        "http://1.1.1.1:99999999999999999999/a.png",
        "http://1.1.1.1\\@127.0.0.1/a.png",
        "http://1.1.1.1/" + "a" * 70_000,
        "http://1.1.1.1/" + "é" * 30_000,  # too long once it is quoted
    ],
    ids=lambda url: ascii(url[:40]),
)
def test_addresses_that_are_none(asked, url):
    status, reason, bodies = asked(image(url))
    assert (status, bodies) == (400, [])
    assert f"a picture's address is {url[:80]!r}; expected http(s)://" in reason


def test_a_name_in_another_script_is_asked_for_as_the_network_writes_it(public, monkeypatch):
    ordinary = socket.getaddrinfo

    def resolved(host, *given, **named):
        assert host == "xn--mnchen-3ya.example"
        return ordinary("127.0.0.1", *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    port = public.address.rpartition(":")[2]
    assert asyncio.run(remote.fetch_public(f"http://münchen.example:{port}/a.png", 2**20)) == SMALL
    assert public.headers[0]["host"] == f"xn--mnchen-3ya.example:{port}"


# -- pictures ----------------------------------------------------------------------------------------------------------


def exif(*entries):
    """EXIF of such entries: tag, type, count, and a value of at most four bytes."""
    held = b"".join(
        struct.pack(">HHI", tag, kind, count) + value.ljust(4, b"\0") for tag, kind, count, value in entries
    )
    return b"MM\0*" + struct.pack(">IH", 8, len(entries)) + held + bytes(4)


TURNED = (0x112, 3, 1, b"\0\6")
BROKEN = {
    "text for a number": exif((0x100, 2, 4, b"abc\0"), TURNED),
    "text for a ratio": exif(TURNED, (0x13E, 2, 4, b"abc\0")),
    "a number for a text": exif((0x10E, 11, 1, bytes(4)), TURNED),
    "a number that is too large": exif((0x100, 9, 1, b"\xff" * 4), TURNED),
}


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_exif_is_a_broken_picture(asked, name, form):
    marked = b"Exif\0\0" if form == "JPEG" else b""
    status, reason, bodies = asked(image(inline(data_of(Image.new("RGB", (16, 8)), form, exif=marked + BROKEN[name]))))
    assert (status, bodies) == (400, [])
    assert "cannot be read" in reason


def test_whole_exif_turns_the_picture():
    assert read_picture(data_of(Image.new("RGB", (16, 8)), exif=exif(TURNED)), 1000).size == (8, 16)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animated_pictures_are_refused(asked, form):
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 90, 180)]
    status, reason, bodies = asked(image(inline(data_of(frames[0], form, save_all=True, append_images=frames[1:]))))
    assert (status, bodies) == (400, [])
    assert "expected a still one" in reason


def parts_of_gif():
    """Head and frame of a GIF of one pixel; its end is a semicolon."""
    whole = data_of(Image.new("P", (1, 1)), "GIF")
    start = whole.index(b",")
    return whole[:start], whole[start:-1]


def test_nothing_is_looked_at_behind_the_second_frame():
    head, frame = parts_of_gif()
    with pytest.raises(Refusal, match="expected a still one"):
        read_picture(head + 2 * frame + b",torn", 1000)
    many = head + 1_400_000 * frame + b";"
    started = time.thread_time()
    with pytest.raises(Refusal, match="expected a still one"):
        read_picture(many, 1000)
    assert time.thread_time() - started < 1


def test_still_gifs_are_what_they_were():
    head, frame = parts_of_gif()
    remark = b"!\xfe\x05hello\0"
    assert read_picture(head + remark + frame + remark + b";", 1000).tobytes() == bytes(3)
    drawn = Image.effect_noise((16, 8), 60)
    clear = read_picture(data_of(drawn, "GIF", transparency=0, comment=b"x"), 1000)
    assert np.array_equal(np.asarray(clear), np.asarray(drawn.convert("RGB")))


@pytest.mark.parametrize("detail", ["low", "auto", "high", None, ["low"]])
def test_no_detail_is_lost_at_a_clients_wish(asked, detail):
    status, _, bodies = asked(image(inline(SMALL), detail=detail))
    assert (status, len(bodies)) == (200, 3)
    for body in bodies:
        assert body["messages"][0]["content"][0]["image_url"]["detail"] == "high"


def test_detail_is_said_only_to_engines_that_are_told_of_it(asked):
    status, _, bodies = asked(image(inline(SMALL)))
    assert (status, len(bodies)) == (200, 3)
    assert all(set(body["messages"][0]["content"][0]["image_url"]) == {"url"} for body in bodies)


# -- sounds ------------------------------------------------------------------------------------------------------------


def flac(rate, channels, seconds):
    """Silence."""
    written = io.BytesIO()
    soundfile.write(written, np.zeros((int(rate * seconds), channels), np.int16), rate, format="FLAC")
    return written.getvalue()


def claiming(data, frames):
    """The same FLAC, whose header speaks of so many samples a channel."""
    changed = bytearray(data)
    changed[21] = changed[21] & 0xF0 | frames >> 32
    changed[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    return bytes(changed)


def mp3(slow, fast):
    """Silence of so many frames at 32 kbit/s and then at 320: each of 1152 samples at 44.1 kHz, in 104 and 1044 bytes."""
    return slow * (b"\xff\xfb\x10\xc4" + bytes(100)) + fast * (b"\xff\xfb\xe0\xc4" + bytes(1040))


LARGE = {
    "a rate beyond any recorder's": (flac(655_350, 1, 0.1), "a rate of 655350 Hz; expected at most 192000"),
    "many channels": (flac(48_000, 8, 1), "48000 samples in each of 8 channels; expected at most 192000 in all"),
    "a high rate": (flac(192_000, 2, 1), "192000 samples in each of 2 channels; expected at most 192000 in all"),
    "many channels by its header": (claiming(flac(48_000, 8, 0.1), 96_000), "96000 samples in each of 8 channels"),
    "long by its header": (claiming(flac(16_000, 1, 0.1), 2**35), "longer than 2 seconds"),
    "long": (flac(16_000, 1, 2.1), "longer than 2 seconds"),
    "a long MP3": (mp3(1, 80), "longer than 2 seconds"),
}


@pytest.mark.parametrize("name", LARGE)
def test_sounds_that_are_too_large(asked, name):
    data, message = LARGE[name]
    status, reason, bodies = asked(
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}
    )
    assert (status, bodies) == (400, [])
    assert message in reason


def test_what_is_too_large_is_not_decoded():
    data = flac(192_000, 8, 3)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="576000 samples in each of 8 channels"):
            read_clip(data, 4.0)
        assert tracemalloc.get_traced_memory()[1] < 2**20  # 18 MB decoded
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("rate", "channels", "seconds"), [(16_000, 1, 2), (48_000, 2, 2), (192_000, 1, 1), (48_000, 8, 0.5)])  # fmt: skip
def test_sounds_within_the_bounds(rate, channels, seconds):
    clip = read_clip(flac(rate, channels, seconds), 2.0)
    assert (clip.rate, clip.samples.shape) == (rate, (rate * seconds, channels))


def test_an_mp3_is_as_long_as_it_turns_out():
    """Its header says nothing of its length, and its first frame's bit rate leads astray."""
    data = mp3(1, 60)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert file.frames > 5 * 44_100
    clip = read_clip(data, 2.0)
    assert clip.rate == 44_100
    assert len(clip.samples) == pytest.approx(61 * 1152, abs=3 * 1152)
