"""The proxy's routes: chat completions defended, the list of models and text-only chats passed through, all else refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lmms_smoothguard.errors import SmoothGuardError, explain
from lmms_smoothguard.proxy.answering import answer
from lmms_smoothguard.proxy.chat import ChatRequest, read_chat
from lmms_smoothguard.proxy.media import NoisyMedia, gather_data
from lmms_smoothguard.proxy.refusals import Refusal
from lmms_smoothguard.proxy.remote import fetch_public
from lmms_smoothguard.proxy.replies import reply
from lmms_smoothguard.proxy.settings import ProxySettings
from lmms_smoothguard.proxy.upstream import PASSED_ON, Declined, Unanswered, Upstream

log = logging.getLogger(__name__)

_RETURNED = ("content-type", "retry-after", "x-request-id", "openai-processing-ms", "www-authenticate")
_T = TypeVar("_T")


def make_app(settings: ProxySettings) -> FastAPI:
    """The proxy as an ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Upstream(settings) as upstream:
            app.state.upstream = upstream
            yield

    # No pages of documentation: a proxy shows what it is for, and nothing else.
    app = FastAPI(title="smoothguard proxy", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    desk = _Desk(settings)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(Declined)
    async def declined(request: Request, error: Declined) -> Response:
        found = error.response
        return Response(found.content, found.status_code, _returned(found))

    @app.exception_handler(Unanswered)
    async def unanswered(request: Request, error: Unanswered) -> Response:
        refusal = Refusal(502, "upstream", f"the engine behind the proxy cannot be reached ({error})")
        return JSONResponse(refusal.body, refusal.status)

    @app.get("/health")
    async def health(request: Request) -> Response:
        reachable = await request.app.state.upstream.reachable()
        state = {"status": "ok" if reachable else "upstream unreachable", "in_work": desk.in_work}
        return JSONResponse(state, 200 if reachable else 503)

    @app.get("/v1/models")
    @app.get("/v1/models/{name:path}")
    async def models(request: Request) -> Response:
        path = request.url.path.removeprefix("/v1/")
        return _Relayed(await request.app.state.upstream.call("GET", path, b"", _passed_on(request)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        data = await _body(request, settings.most_bytes)
        found = await asyncio.to_thread(read_chat, data, settings.extra_fields)
        return await desk.serve(request, found, data)

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def others(path: str) -> Response:
        raise Refusal(
            404, "undefended_route",
            f"/{path} is not defended, and so not served; expected /v1/chat/completions, /v1/models or /health",
        )  # fmt: skip

    return app


class _Desk:
    """Takes requests while there is room, and lets go of those whose client has left."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self.in_work = self._pixels = 0

    async def serve(self, request: Request, found: ChatRequest, data: bytes) -> Response:
        """Raises Refusal, Declined or Unanswered."""
        if self.in_work >= self._settings.most_requests:
            raise _busy(f"{self.in_work} requests are in work")
        self.in_work += 1
        try:
            return await _while_connected(request, self._answer(request, found, data))
        finally:
            self.in_work -= 1

    async def _answer(self, request: Request, found: ChatRequest, data: bytes) -> Response:
        upstream: Upstream = request.app.state.upstream
        headers = _passed_on(request)
        if not found.media:
            relayed = await upstream.call(
                "POST", "chat/completions", data, {**headers, "content-type": "application/json"}
            )
            return _Relayed(relayed)
        settings = self._settings
        files = await gather_data(found, settings, lambda url: fetch_public(url, settings.most_bytes))
        try:
            media = await asyncio.to_thread(NoisyMedia, found, files, settings)
        except SmoothGuardError as error:
            raise Refusal(400, "undefendable", explain(error)) from error
        if self._pixels and self._pixels + media.pixels > settings.most_pixels_in_work:
            raise _busy(f"{self._pixels} pixels are in work")
        self._pixels += media.pixels
        try:
            return reply(await answer(media, upstream, settings, headers), found.stream, found.wants_usage)
        finally:
            self._pixels -= media.pixels


def _busy(what: str) -> Refusal:
    return Refusal(503, "busy", f"{what}; expected fewer. Try again", {"retry-after": "1"})


class _Relayed(StreamingResponse):
    """The engine's answer, byte for byte, closed whatever becomes of the client."""

    def __init__(self, found: httpx.Response) -> None:
        super().__init__(found.aiter_raw(), found.status_code, _returned(found) | _encoding(found))
        self._found = found

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except httpx.HTTPError as error:  # cut upstream: the client sees a cut stream as well
            log.warning("the engine's answer broke off: %s", type(error).__name__)
            raise
        finally:
            await self._found.aclose()


def _encoding(found: httpx.Response) -> dict[str, str]:
    encoding = found.headers.get("content-encoding")
    return {"content-encoding": encoding} if encoding else {}


def _returned(found: httpx.Response) -> dict[str, str]:
    return {name: found.headers[name] for name in _RETURNED if name in found.headers}


def _passed_on(request: Request) -> dict[str, str]:
    return {name: request.headers[name] for name in PASSED_ON if name in request.headers}


async def _body(request: Request, most: int) -> bytes:
    """Raises Refusal for more than `most` bytes, before they are held."""
    declared = request.headers.get("content-length", "")
    found = bytearray()
    if not (declared.isdigit() and int(declared) > most):
        async for chunk in request.stream():
            found += chunk
            if len(found) > most:
                break
        else:
            return bytes(found)
    raise Refusal(413, "too_large", f"the request has more than {most} bytes; expected at most that")


async def _while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """The work's result; where the client leaves, the work is cancelled, and asyncio.CancelledError raised."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(499, "client_left", "the client has left")
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
