"""One defended answer: N copies asked at once, a vote, one message."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from lmms_smoothguard.aggregation.verdict import Verdict
from lmms_smoothguard.blackbox.ballot import Ballot
from lmms_smoothguard.proxy.media import NoisyMedia
from lmms_smoothguard.proxy.refusals import Refusal
from lmms_smoothguard.proxy.settings import ProxySettings
from lmms_smoothguard.proxy.upstream import Unanswered, Upstream


class Answered(NamedTuple):
    """completion: the engine's, of the chosen copy; copies: those whose answers counted; usage: tokens of all answers that came."""

    completion: dict[str, Any]
    verdict: Verdict
    copies: tuple[int, ...]
    answered: int
    failed: int
    asked: int
    usage: dict[str, int]

    @property
    def report(self) -> dict[str, Any]:
        """The `smoothguard` field of the answer."""
        return {
            "agreement": self.verdict.agreement,
            "suspicion": self.verdict.suspicion,
            "suspected": self.verdict.suspected,
            "num_samples": self.asked,
            "answered": self.answered,
            "failed": self.failed,
            "counted": len(self.copies),
            "usage": self.usage,
            "warnings": list(self.verdict.warnings),
        }

    @property
    def headers(self) -> dict[str, str]:
        """The same in short."""
        return {
            "x-smoothguard-agreement": f"{self.verdict.agreement:.3f}",
            "x-smoothguard-suspected": str(self.verdict.suspected).lower(),
            "x-smoothguard-answers": f"{self.answered}/{self.asked}",
        }


async def answer(
    media: NoisyMedia, upstream: Upstream, settings: ProxySettings, headers: Mapping[str, str]
) -> Answered:
    """Asks for all copies at once, until the ballot is settled; what is no longer needed is cancelled.

    Raises Refusal 503 where fewer than the quorum answer, and Declined where the engine refuses the request itself.
    """
    total = settings.defense.num_samples
    ballot = Ballot(settings.defense, settings.needed)
    completions: dict[int, dict[str, Any]] = {}
    failures: list[str] = []

    async def ask(copy: int) -> tuple[int, dict[str, Any] | Unanswered]:
        try:
            return copy, await upstream.answer(functools.partial(media.body, copy), _of_copy(headers, copy))
        except Unanswered as error:
            return copy, error

    tasks = [asyncio.create_task(ask(copy)) for copy in range(total)]
    try:
        for arriving in asyncio.as_completed(tasks):
            copy, found = await arriving
            if isinstance(found, Unanswered):
                ballot.fail(copy)
                failures.append(str(found))
            else:
                completions[copy] = found
                ballot.add(copy, comparable(found))
            if ballot.hopeless or ballot.settled:
                break
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if ballot.hopeless:
        raise Refusal(
            503,
            "no_quorum",
            f"{ballot.failed} of {total} copies got no answer ({failures[-1]}); {settings.needed} must answer. Nothing was answered "
            "undefended; try again",
            {"retry-after": "5"},
        )
    verdict, copies = await asyncio.to_thread(ballot.verdict)
    chosen = completions[copies[verdict.chosen]]
    return Answered(chosen, verdict, tuple(copies), ballot.answered, ballot.failed, total, _usage(completions.values()))


def _of_copy(headers: Mapping[str, str], copy: int) -> dict[str, str]:
    """Engines may take two requests with one id for the same."""
    return {name: f"{value}-{copy}" if name == "x-request-id" else value for name, value in headers.items()}


def comparable(completion: Mapping[str, Any]) -> str:
    """An answer as it is compared with others: its text, and the tools it calls, whatever ids these calls have; where it has neither, as
    much of its reasoning as there is."""
    message = completion["choices"][0]["message"]
    calls = [_call(call) for call in message.get("tool_calls") or []]
    if message.get("function_call"):
        calls.append(_call({"function": message["function_call"]}))
    text = message.get("content") or message.get("refusal") or ""
    if not text and not calls:
        text = message.get("reasoning_content") or message.get("reasoning") or ""
    return text if not calls else f"{text}\n{json.dumps(calls, sort_keys=True, ensure_ascii=False)}".lstrip("\n")


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    with contextlib.suppress(ValueError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return [function.get("name"), arguments]


def _usage(completions: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for completion in completions:
        usage = completion.get("usage")
        for name, value in (usage if isinstance(usage, dict) else {}).items():
            if isinstance(value, int):
                total[name] = total.get(name, 0) + value
    return total
