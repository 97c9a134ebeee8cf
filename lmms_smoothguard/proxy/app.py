"""The proxy's routes: chat completions defended, the list of models and text-only chats passed through, all else refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import quote

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lmms_smoothguard.errors import SmoothGuardError, explain
from lmms_smoothguard.proxy.answering import answer
from lmms_smoothguard.proxy.chat import ChatRequest, read_chat
from lmms_smoothguard.proxy.media import NoisyMedia, gather_data
from lmms_smoothguard.proxy.refusals import Refusal, bad_request
from lmms_smoothguard.proxy.remote import fetch_public
from lmms_smoothguard.proxy.replies import reply
from lmms_smoothguard.proxy.settings import ProxySettings
from lmms_smoothguard.proxy.upstream import PASSED_ON, Call, Declined, Unanswered, Upstream

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
    async def models(request: Request) -> Response:
        return _Relayed(await request.app.state.upstream.call("GET", "models", b"", _as_asked(request)))

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        if any(part in (".", "..") for part in name.split("/")) or not name.isprintable() or "\\" in name:
            raise _not_served(f"/v1/models/{name}")  # it could lead to any route of the engine
        path = f"models/{quote(name, safe='/')}"
        return _Relayed(await request.app.state.upstream.call("GET", path, b"", _as_asked(request)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        data = await _body(request, settings.most_bytes)
        found = await asyncio.to_thread(read_chat, data, settings.extra_fields)
        return await desk.serve(request, found, data)

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def others(path: str) -> Response:
        raise _not_served(f"/{path}")

    return app


def _not_served(path: str) -> Refusal:
    return Refusal(
        404,
        "undefended_route",
        f"{path} is not defended, and so not served; expected /v1/chat/completions, /v1/models or /health",
    )


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
            response = await _while_connected(request, self._answer(request, found, data))
        except BaseException:
            self._leave()
            raise
        if isinstance(response, _Relayed):
            response.when_done(self._leave)
        else:
            self._leave()
        return response

    def _leave(self) -> None:
        self.in_work -= 1

    async def _answer(self, request: Request, found: ChatRequest, data: bytes) -> Response:
        upstream: Upstream = request.app.state.upstream
        headers = _passed_on(request)
        if not found.media:
            sent = {**_as_asked(request), "content-type": "application/json"}
            return _Relayed(await upstream.call("POST", "chat/completions", data, sent))
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

    def __init__(self, call: Call) -> None:
        found = call.response
        super().__init__(found.aiter_raw(), found.status_code, _returned(found) | _encoding(found))
        self._call = call
        self._done: Callable[[], None] = lambda: None

    def when_done(self, done: Callable[[], None]) -> None:
        """What to do once, when the answer has been handed on or is lost."""
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except httpx.HTTPError as error:  # cut upstream: the client sees a cut stream as well
            log.warning("the engine's answer broke off: %s", type(error).__name__)
            raise
        finally:
            self._done()
            await self._call.aclose()


def _encoding(found: httpx.Response) -> dict[str, str]:
    encoding = found.headers.get("content-encoding")
    return {"content-encoding": encoding} if encoding else {}


def _returned(found: httpx.Response) -> dict[str, str]:
    return {name: found.headers[name] for name in _RETURNED if name in found.headers}


def _passed_on(request: Request) -> dict[str, str]:
    """Raises Refusal for values that no header may have."""
    found = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
    for name, value in found.items():
        if not value.isascii():
            raise bad_request(f"the header {name} has characters beyond ASCII; expected none")
    return found


def _as_asked(request: Request) -> dict[str, str]:
    """Of a request whose answer is handed on as it is: compressed only if the client takes it so."""
    return {**_passed_on(request), "accept-encoding": request.headers.get("accept-encoding", "identity")}


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
