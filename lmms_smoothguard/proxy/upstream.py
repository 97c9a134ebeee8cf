"""The engine behind the proxy: one answer to one request, tried again where that can help."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from http.cookiejar import DefaultCookiePolicy
from types import TracebackType
from typing import Any

import httpx

from lmms_smoothguard.proxy.settings import ProxySettings

PASSED_ON = (
    "authorization",
    "api-key",
    "x-api-key",
    "openai-organization",
    "openai-project",
    "x-request-id",
    "traceparent",
)
"""Headers of a client's request that the engine gets; none is ever logged."""
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_PAUSE = 30.0
_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")


class Unanswered(Exception):
    """The engine gave no answer to a copy, however often it was asked."""


class Declined(Exception):
    """The engine will not answer this request, noisy or not: its own words."""

    def __init__(self, response: httpx.Response) -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


class Call:
    """An answer that is still being read: it has its turn until it is closed."""

    def __init__(self, response: httpx.Response, turns: asyncio.Semaphore) -> None:
        self.response, self._turns, self._open = response, turns, True

    async def aclose(self) -> None:
        """Closes the answer; a second time nothing happens."""
        if self._open:
            self._open = False
            self._turns.release()
            await self.response.aclose()


class Upstream:
    """A client of the engine, shared by all requests; a context manager."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=settings.most_upstream)
        timeout = httpx.Timeout(settings.timeout, connect=min(10.0, settings.timeout), pool=None)
        # Neither proxies nor credentials of the environment: where a request goes is what the settings say.
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, trust_env=False, follow_redirects=False)
        self._client.cookies.jar.set_policy(
            DefaultCookiePolicy(allowed_domains=[])
        )  # or one user's would go out with the next
        self._free = asyncio.Semaphore(settings.most_upstream)

    async def __aenter__(self) -> Upstream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def answer(self, make: Callable[[], bytes], headers: Mapping[str, str]) -> dict[str, Any]:
        """The engine's chat completion. `make` makes the request's body, in a thread, once it is its turn: bodies that wait would fill the
        memory. Raises Declined where asking again cannot help, Unanswered when all attempts failed."""
        sent = {**headers, "content-type": "application/json"}
        failure, asked = "no attempt", 0.0
        for attempt in range(self._settings.retries + 1):
            if attempt:
                backoff = self._settings.pause * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                await asyncio.sleep(max(asked, backoff))
            try:
                async with self._free:
                    content = await asyncio.to_thread(make)
                    async with asyncio.timeout(self._settings.timeout):
                        response = await self._client.post(self._url("chat/completions"), content=content, headers=sent)
            except TimeoutError:
                failure = f"no answer within {self._settings.timeout:g} seconds"
                continue
            except httpx.HTTPError as error:  # refused, cut or malformed connections, time limits of sockets
                failure = type(error).__name__
                continue
            if response.status_code in _AGAIN:
                failure, asked = f"status {response.status_code}", _asked_to_wait(response)
                continue
            if response.status_code >= 300:
                raise Declined(response)
            try:
                return _completion(response)
            except ValueError as error:
                failure = str(error)
        raise Unanswered(failure)

    async def call(self, method: str, path: str, content: bytes, headers: Mapping[str, str]) -> Call:
        """A call as it is, once it is its turn, its answer still to be read and closed. Raises Unanswered where the engine cannot be reached."""
        request = self._client.build_request(method, self._url(path), content=content, headers=dict(headers))
        await self._free.acquire()
        try:
            return Call(await self._client.send(request, stream=True), self._free)
        except BaseException as error:
            self._free.release()
            if isinstance(error, httpx.HTTPError):
                raise Unanswered(type(error).__name__) from error
            raise

    async def reachable(self) -> bool:
        """Whether the engine takes connections; whatever it says."""
        try:
            await self._client.get(self._url("models"), timeout=5.0)
        except httpx.HTTPError:
            return False
        return True

    def _url(self, path: str) -> str:
        return f"{self._settings.base}/{path}"


def _asked_to_wait(response: httpx.Response) -> float:
    """Seconds that the engine asks for, within reason."""
    try:
        return min(_LONGEST_PAUSE, max(0.0, float(response.headers.get("retry-after", 0))))
    except ValueError:  # a date
        return 0.0


def _completion(response: httpx.Response) -> dict[str, Any]:
    """Raises ValueError for what is no chat completion with one message, and for what could not be handed on as JSON."""
    try:
        found: dict[str, Any] = json.loads(response.content, parse_constant=_no_number)
        message = found["choices"][0]["message"]
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # halves of characters among it
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError("no chat completion") from error
    if not isinstance(message, dict) or not all(isinstance(message.get(name) or "", str) for name in _TEXTS):
        raise ValueError("a message without text")
    calls, function = message.get("tool_calls") or [], message.get("function_call") or {}
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in [*calls, function]):
        raise ValueError("a message with malformed tool calls")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
