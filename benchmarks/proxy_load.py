"""What a proxy before an engine holds: many users at once, each with a picture, plain and defended; nothing lost, nothing mixed up.

python benchmarks/proxy_load.py        # results/proxy_load.json, about five minutes on two cores; leave the machine alone meanwhile

Two engines: one that waits `delay` seconds and says back whom it was asked by (however many ask at once), so that what is left is the
proxy's own cost, and that every answer can be told to be its user's; and transformers' own server on the embedded model, which
generates one answer at a time. "copies by hand" are the same N bodies sent straight to the engine, prepared beforehand.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import numpy as np
import typer
import uvicorn
from fastapi import FastAPI, Request
from PIL import Image

from bench import hardware
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.evaluation.machine import environment
from lmms_smoothguard.proxy.chat import read_chat
from lmms_smoothguard.proxy.media import NoisyMedia
from lmms_smoothguard.proxy.settings import ProxySettings
from lmms_smoothguard.tiny.model import MODEL_DIR
from timing.paired import median, ratio, run_paired

RESULTS = Path(__file__).parent / "results"
PLAIN, BY_HAND, PROXIED = "plain", "copies by hand", "through the proxy"
_Engine = Callable[[], contextlib.AbstractContextManager[str]]
MOST = 64  # calls of the engine at a time


def run(
    users: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="In a round.")] = 24,
    copies: Annotated[int, typer.Option(min=2, help="N.")] = 10,
    side: Annotated[int, typer.Option(min=8, help="Pixels of a picture's sides.")] = 336,
    delay: Annotated[float, typer.Option(min=0, help="Seconds that the engine takes for an answer.")] = 0.5,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    out: Annotated[Path, typer.Option()] = RESULTS / "proxy_load.json",
) -> None:
    """Measure both engines and write the result file."""
    load = os.getloadavg()[0]
    engines: dict[str, tuple[_Engine, int, int, int]] = {
        f"waits {delay:g} s": (lambda: _echoing(delay), requests, side, users),
        "transformers' server, embedded model": (_transformers, 8, 64, 4),
    }
    measured = {name: _measure(name, *engine, copies, rounds) for name, engine in engines.items()}
    result = {
        "name": "proxy_load",
        "command": "python benchmarks/" + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": {**environment(), **hardware("cpu"), "load_before": round(load, 2)},
        "num_samples": copies,
        "engines": measured,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


def _measure(name: str, engine: _Engine, count: int, side: int, users: int, copies: int, rounds: int) -> dict[str, Any]:
    echoes = name.startswith("waits")
    asked = [_chat(number, side) for number in range(count)]
    by_hand = [body for data in asked for body in _copies(data, copies)]
    with engine() as address, _proxy(address, copies) as front:
        ways = {
            PLAIN: lambda _: _send(address, asked, users, echoes),
            BY_HAND: lambda _: _send(address, by_hand, min(MOST, users * copies), echoes),
            PROXIED: lambda _: _send(front, asked, users, echoes),
        }
        seconds = run_paired(ways, rounds, warmup=1).seconds
    found = {
        "setting": {"users": users, "requests": count, "side": side, "rounds": rounds},
        "requests_a_second": {way: median([count / taken for taken in seconds[way]]).to_dict() for way in ways},
        "ratios": {
            f"{PROXIED} : {other}": ratio(seconds[PROXIED], seconds[other]).to_dict() for other in (PLAIN, BY_HAND)
        },
        "answers": {
            "checked": rounds * count * (2 + copies),
            "lost": 0,
            "mixed_up": 0 if echoes else None,
        },  # else _send has raised
    }
    print(name)
    for part in ("requests_a_second", "ratios"):
        print(
            *(
                f"  {way}: {value['value']:.2f} ({value['low']:.2f}-{value['high']:.2f})"
                for way, value in found[part].items()
            ),
            sep="\n",
        )
    return found


def _chat(number: int, side: int) -> bytes:
    """A request whose question names its user."""
    picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8))
    written = io.BytesIO()
    picture.save(written, "PNG")
    url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"I am user {number}. Who am I?"},
    ]
    return json.dumps(
        {"model": str(MODEL_DIR), "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
    ).encode()


def _copies(data: bytes, copies: int) -> list[bytes]:
    """What the proxy would ask."""
    defense = SmoothGuardConfig(num_samples=copies, noise_space="pixel", seed=0)
    settings, request = ProxySettings(upstream="http://engine", defense=defense), read_chat(data)
    url = request.body["messages"][0]["content"][0]["image_url"]["url"]
    media = NoisyMedia(request, [base64.b64decode(url.partition(",")[2])], settings)
    return [media.body(copy) for copy in range(copies)]


def _send(address: str, bodies: Sequence[bytes], together: int, echoes: bool) -> None:
    """So many at a time until all are answered. Raises RuntimeError for an answer that is lost or another user's."""

    async def everybody() -> None:
        waiting = iter(bodies)

        async def one_user(client: httpx.AsyncClient) -> None:
            for body in waiting:
                found = await client.post(
                    "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
                )
                if found.status_code != 200:
                    raise RuntimeError(f"a request was lost: {found.status_code} {found.text[:200]}")
                said = found.json()["choices"][0]["message"]["content"]
                if echoes and said != _user(body.decode()):
                    raise RuntimeError(f"{_user(body.decode())!r} was told {said!r}")

        async with httpx.AsyncClient(base_url=address, timeout=300, trust_env=False) as client:
            await asyncio.gather(*(one_user(client) for _ in range(together)))

    asyncio.run(everybody())


def _user(text: str) -> str:
    found = re.search(r"I am user \d+", text)
    return found.group() if found else ""


# -- servers -----------------------------------------------------------------------------------------------------------


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextlib.contextmanager
def _started(command: Sequence[str], port: int, path: str = "/health") -> Iterator[str]:
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(address + path).status_code == 200:
                    break
            if process.poll() is not None:
                raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _proxy(engine: str, copies: int) -> contextlib.AbstractContextManager[str]:
    port = _free_port()
    command = [sys.executable, "-m", "lmms_smoothguard", "proxy", engine, "--port", str(port), "--seen-as", "keep",
               "--num-samples", str(copies), "--early-stop", "off", "--most-upstream", str(MOST)]  # fmt: skip
    return _started(command, port)


def _echoing(delay: float) -> contextlib.AbstractContextManager[str]:
    port = _free_port()
    return _started([sys.executable, __file__, "echo", str(port), str(delay)], port)


def _transformers() -> contextlib.AbstractContextManager[str]:
    port = _free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(MODEL_DIR), "--port", str(port)]
    return _started(command, port)


def echo(port: int, delay: float) -> None:
    """The engine that waits."""
    app = FastAPI()

    @app.get("/health")
    @app.get("/v1/models")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> dict[str, Any]:
        said = _user((await request.body()).decode())
        await asyncio.sleep(delay)
        return {
            "id": "1",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}],
        }

    uvicorn.run(app, port=port, log_level="error")


if __name__ == "__main__":
    if sys.argv[1:2] == ["echo"]:
        echo(int(sys.argv[2]), float(sys.argv[3]))
    else:
        typer.run(run)
