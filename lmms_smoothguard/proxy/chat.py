"""A chat request as the proxy takes it: what media it carries, and where. What is not known is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmms_smoothguard.errors import did_you_mean
from lmms_smoothguard.proxy.refusals import Refusal, bad_request

FIELDS = frozenset({
    # OpenAI's
    "model", "messages", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
    "max_tokens", "metadata", "modalities", "n", "parallel_tool_calls", "presence_penalty", "prompt_cache_key", "reasoning_effort",
    "response_format", "safety_identifier", "seed", "service_tier", "stop", "store", "stream", "stream_options", "temperature",
    "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity",
    # of engines: sampling, constraints, scheduling
    "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "bad_words", "best_of", "cache_salt", "chat_template_kwargs",
    "continue_final_message", "ebnf", "echo", "guided_choice", "guided_grammar", "guided_json", "guided_regex",
    "ignore_eos", "include_reasoning", "include_stop_str_in_output", "length_penalty", "min_p", "min_tokens", "no_stop_trim", "priority",
    "regex", "repetition_penalty", "request_id", "return_token_ids", "separate_reasoning", "skip_special_tokens",
    "spaces_between_special_tokens", "stop_token_ids", "stream_reasoning", "structured_outputs", "thinking", "top_k",
    "truncate_prompt_tokens", "use_beam_search",
})  # fmt: skip
"""Fields of a request that carry no media and leave pictures as they are. `mm_processor_kwargs` is none of them: it resizes."""
_OF_A_MESSAGE = frozenset({
    "role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "reasoning", "reasoning_content",
})  # fmt: skip
_OF_TEMPLATES = frozenset({"enable_thinking", "preserve_thinking", "reasoning_effort", "thinking"})
_PLAIN_PARTS = frozenset({"text", "refusal"})
_OF_THE_REQUEST = ("messages", "stream", "stream_options", "request_id")
"""What the copies do not share with the request: engines may take two with one id for the same."""
_MOST_OBJECTS, _MOST_VALUES = 100_000, 1_000_000


class Part(NamedTuple):
    """A part of a message that is a picture or a sound: its place, and its data. kind: "image_url" or "input_audio"."""

    message: int
    place: int
    kind: str
    value: Mapping[str, Any]


class ChatRequest(NamedTuple):
    """media: every picture and sound, in their order; body: as parsed, empty where there are no media and the request goes on as it is."""

    body: dict[str, Any]
    media: tuple[Part, ...]

    @property
    def stream(self) -> bool:
        return self.body.get("stream") is True

    @property
    def wants_usage(self) -> bool:
        """Whether a streamed answer ends with the tokens it cost."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def with_media(self, values: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A body for the engine, not streamed, with these in place of the media; what has no media is shared, not copied."""
        body = {name: value for name, value in self.body.items() if name not in _OF_THE_REQUEST}
        messages = list(self.body["messages"])
        for number in {part.message for part in self.media}:
            messages[number] = {**messages[number], "content": list(messages[number]["content"])}
        for part, value in zip(self.media, values, strict=True):
            messages[part.message]["content"][part.place] = {"type": part.kind, part.kind: value}
        return body | {"messages": messages}


def read_chat(data: bytes, extra_fields: Collection[str] = ()) -> ChatRequest:
    """Raises Refusal for what is no chat request, and for anything in it that is not known: a field, a message's field or a part
    could carry a picture past the defence."""
    _check_size(data)
    try:
        body = json.loads(data, object_pairs_hook=_once)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise bad_request(f"the request is no JSON ({error})") from error
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise bad_request('expected {"model": ..., "messages": [...]} with at least one message')
    known = FIELDS | set(extra_fields)
    for name in body:
        if name not in known:
            raise bad_request(
                f"the request has a field {name!r}, which may change what the model sees; {did_you_mean(name, FIELDS)}. "
                f"The operator can allow it: smoothguard proxy --extra-field {name}"
            )
    _check_template(body.get("chat_template_kwargs"))
    media = tuple(_media(body["messages"]))
    if media:
        _check_answers(body)
    return ChatRequest(body if media else {}, media)


def _check_size(data: bytes) -> None:
    """A small text can be very many objects, each a hundred times as large in memory."""
    for mark, most in ((b"{", _MOST_OBJECTS), (b",", _MOST_VALUES)):
        if (found := data.count(mark)) > most:
            raise Refusal(
                413,
                "too_large",
                f"the request has {found} {mark.decode()!r}; expected at most {most}, or it would fill the memory",
            )


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A name given twice could mean one thing here and another to the engine."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _check_template(given: Any) -> None:
    """Engines hand these on to the processor, where they could resize what was noised, and be pictures themselves."""
    if given is None:
        return
    if (
        not isinstance(given, dict)
        or set(given) - _OF_TEMPLATES
        or not all(isinstance(value, bool | str) for value in given.values())
    ):
        raise bad_request(
            f"chat_template_kwargs is {str(given)[:200]}; expected some of: {', '.join(sorted(_OF_TEMPLATES))}, each a word or true or false"
        )


def _check_answers(body: Mapping[str, Any]) -> None:
    """Raises Refusal where the answers could not be compared."""
    if body.get("n", 1) not in (1, None):
        raise bad_request(f"n is {body['n']!r}; a defended request has one answer, expected n = 1")
    if body.get("best_of", 1) not in (1, None):
        raise bad_request(f"best_of is {body['best_of']!r}; expected 1, for the proxy answers by a vote")
    if body.get("modalities") not in (None, ["text"]):
        raise bad_request(f"modalities is {body['modalities']!r}; answers are compared as texts, expected ['text']")


def _media(messages: Sequence[Any]) -> Iterator[Part]:
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad_request(
                f"message {number} is a {type(message).__name__}; expected an object with role and content"
            )
        for name in message:
            if name not in _OF_A_MESSAGE:
                raise bad_request(
                    f"message {number} has a field {name!r}, which may carry media past the defence; {did_you_mean(name, _OF_A_MESSAGE)}"
                )
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise bad_request(
                f"the content of message {number} is a {type(content).__name__}; expected a text or a list of parts"
            )
        for place, part in enumerate(content):
            yield from _of_part(number, place, part)


def _of_part(number: int, place: int, part: Any) -> Iterator[Part]:
    if isinstance(part, str):
        return
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise bad_request(
            f"part {place} of message {number} is of type {kind!r}, which cannot be defended; expected a part's name"
        )
    if kind in _PLAIN_PARTS:
        if not isinstance(part.get(kind), str) or set(part) - {"type", kind, "cache_control"}:
            raise bad_request(
                f"part {place} of message {number} is no plain {kind}; expected its type and its text alone"
            )
        return
    read = _READ.get(kind)
    if read is None:
        raise bad_request(
            f"part {place} of message {number} is of type {kind!r}, which cannot be defended; expected text, image_url or input_audio"
        )
    if set(part) - {"type", kind, "cache_control"}:
        raise bad_request(
            f"part {place} of message {number} has more than one content; expected its type and {kind} alone"
        )
    yield Part(number, place, kind, read(part.get(kind), f"part {place} of message {number}"))


def _image(value: Any, where: str) -> dict[str, Any]:
    value = {"url": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("url"), str) or set(value) - {"url", "detail"}:
        raise bad_request(f'{where} is no picture; expected {{"url": "data:image/png;base64,..."}}')
    return value


def _audio(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("data"), str) or set(value) - {"data", "format"}:
        raise bad_request(f'{where} is no sound; expected {{"data": base64, "format": "wav"}}')
    return value


_READ: Mapping[str, Callable[[Any, str], dict[str, Any]]] = {"image_url": _image, "input_audio": _audio}
