"""A defended answer in the form the client asked for: one JSON object, or a stream of events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from lmms_smoothguard.proxy.answering import Answered

_PIECE = 48  # characters an event


def reply(found: Answered, stream: bool, usage: bool) -> Response:
    """usage: whether a stream ends with the tokens that the answer cost."""
    if not stream:
        return JSONResponse({**found.completion, "smoothguard": found.report}, headers=found.headers)
    return StreamingResponse(_events(found, usage), media_type="text/event-stream", headers=found.headers)


def _events(found: Answered, usage: bool) -> Iterator[str]:
    """Chunks as OpenAI's: the role, the text in pieces, tool calls, why it ended; then the end mark."""
    completion = found.completion
    choice = completion["choices"][0]
    message = choice["message"]
    head = {name: completion.get(name) for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}

    def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        chunk = head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    yield event({"role": "assistant", "content": ""})
    for field in ("reasoning_content", "reasoning", "refusal", "content"):
        text = message.get(field) or ""
        for start in range(0, len(text), _PIECE):
            yield event({field: text[start : start + _PIECE]})
    for index, call in enumerate(message.get("tool_calls") or []):
        yield event({"tool_calls": [{**call, "index": index}]})
    if message.get("function_call"):
        yield event({"function_call": message["function_call"]})
    yield event({}, choice.get("finish_reason") or "stop", smoothguard=found.report)
    if usage and isinstance(completion.get("usage"), dict):
        yield f"data: {json.dumps(head | {'choices': [], 'usage': completion['usage']})}\n\n"
    yield "data: [DONE]\n\n"
