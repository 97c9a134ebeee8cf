"""Real servers for tests: transformers' own on the embedded model, any ASGI application, and one that fails as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lmms_smoothguard.tiny.model import MODEL_DIR


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@contextlib.contextmanager
def served(app) -> Iterator[str]:
    """The address of an application on a socket of its own."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def transformers_server(log: Path, *options: str) -> contextlib.AbstractContextManager[str]:
    """`transformers serve` on the embedded LLaVA, in a process of its own."""
    return _process(
        log, str(Path(sys.executable).with_name("transformers")), "serve", str(MODEL_DIR), *options, "--port"
    )


def smoothguard_server(log: Path, *options: str, model: Path = MODEL_DIR) -> contextlib.AbstractContextManager[str]:
    """`smoothguard serve` on the same, or another embedded model."""
    return _process(log, sys.executable, "-m", "lmms_smoothguard", "serve", str(model), *options, "--", "--port")


@contextlib.contextmanager
def _process(log: Path, *command: str) -> Iterator[str]:
    """A server's address; the command's last option is its port."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as written:
        process = subprocess.Popen([*command, str(port)], stdout=written, stderr=subprocess.STDOUT, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{address}/health").status_code == 200:
                        break
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(20)


class Faulty:
    """Stands between proxy and engine. `plan`: what becomes of each call, in the order of arrival ("ok" once it is used up):
    ok, a status, later (429, in a second), hang, cut, garbage, html. Counts the calls, and those that were broken off."""

    def __init__(self, engine: str) -> None:
        self.engine, self.plan, self.calls, self.left = engine, [], 0, 0
        self.bodies, self.headers, self.times = [], [], []  # of the calls, in the order of arrival
        self.app = FastAPI()

        @self.app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            body, number = await request.json(), self.calls
            self.calls += 1
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self.headers.append(dict(request.headers))
            fault = self.plan[number] if number < len(self.plan) else "ok"
            if fault == "hang":
                for _ in range(300):
                    if await request.is_disconnected():
                        self.left += 1
                        break
                    await asyncio.sleep(0.1)
            return await self._response(fault, body)

        @self.app.get("/v1/models")
        async def models() -> Response:
            async with httpx.AsyncClient() as client:
                found = await client.get(f"{engine}/v1/models")
            return Response(found.content, found.status_code, media_type="application/json")

    async def _response(self, fault, body) -> Response:
        if fault == "cut":
            return StreamingResponse(_torn(), headers={"content-length": "1000"}, media_type="application/json")
        if fault == "garbage":
            return Response("{", media_type="application/json")
        if fault == "html":
            return Response("<h1>Welcome</h1>", media_type="text/html")
        if fault == "later":
            return JSONResponse({}, 429, {"retry-after": "1"})
        if isinstance(fault, int):
            return JSONResponse({"error": {"message": f"planned {fault}"}}, fault)
        async with httpx.AsyncClient(timeout=120) as client:
            found = await client.post(f"{self.engine}/v1/chat/completions", json=body)
        return Response(found.content, found.status_code, media_type=found.headers["content-type"])


async def _torn():
    yield b'{"choices": ['
    raise OSError("torn")


def remembering():
    """An engine that remembers in `state.bodies` what it is asked, and always says the same."""
    app = FastAPI()
    app.state.bodies = []

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        app.state.bodies.append(await request.json())
        message = {"role": "assistant", "content": "Fine."}
        return {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    return app
