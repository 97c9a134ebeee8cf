"""From what a model said to what a scorer is given: lmms-eval's filters and reasoning tags, for answers it does not know of.

lmms-eval filters and strips the final answers only, just before it scores them. The undefended clean answer is scored,
compared and judged beside them, so it must have gone the same way; and judges are asked before lmms-eval gets there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.reasoning import parse_reasoning_tags_config, strip_reasoning_tags

PADDING = "__padding_only__"
"""In a request's metadata: lmms-eval's mark on one that keeps processes in step, and whose answer counts for nothing."""


class Finished(NamedTuple):
    """said: the answer without its reasoning; scored: what the scorer is given, under the first filter where a task has
    several; unclear: why that is not all there is to it, empty where it is."""

    said: str
    scored: str
    unclear: str = ""


class Finisher:
    """What lmms-eval does to an answer, by the run's tasks and its command line; nothing to answers of other tasks.

    task_dict, cli_args: as `evaluate` is given them. Raises ValueError for reasoning tags that are no JSON.
    """

    def __init__(self, task_dict: Mapping[Any, Any] | None = None, cli_args: Any = None) -> None:
        configured = [task for task in tasks_of(task_dict or {}) if hasattr(task, "config")]
        tags = getattr(cli_args, "reasoning_tags", None)
        self._tasks = {
            task.config.task: (task, parse_reasoning_tags_config(tags, getattr(task.config, "reasoning_tags", None)))
            for task in configured
        }

    def finish(self, requests: Sequence[Instance], texts: Mapping[int, Sequence[str]]) -> dict[int, Finished]:
        """`texts`: what was said to a request, by its id, one text for each time it was asked; the result by the same ids.

        `requests` are all of the run's, in their order: some filters pair answers and documents by their place.
        """
        by_task: dict[str | None, list[Instance]] = {}
        for request in {id(request): request for request in requests}.values():
            if not request.metadata.get(PADDING):
                by_task.setdefault(request.task_name, []).append(request)
        found: dict[int, Finished] = {}
        for name, asked in by_task.items():
            if any(id(request) in texts for request in asked):
                task, tags = self._tasks.get(name, (None, None))
                made = _finish(task, tags, [list(texts.get(id(request), [""])) for request in asked])
                found |= {id(request): one for request, one in zip(asked, made, strict=True) if id(request) in texts}
        return found


def _finish(task: Any, tags: list[list[str]] | None, answers: list[list[str]]) -> list[Finished]:
    said = [str(_stripped(texts[0], tags)) for texts in answers]
    columns = {ensemble.name: _filtered(task, ensemble, tags, answers) for ensemble in getattr(task, "_filters", [])}
    if not columns:
        return [Finished(text, text) for text in said]
    return [
        _told(text, dict(zip(columns, row, strict=True)))
        for text, row in zip(said, zip(*columns.values(), strict=True), strict=True)
    ]


def _told(said: str, by_filter: Mapping[str, Any]) -> Finished:
    first = next(iter(by_filter.values()))
    same = all(value == first for value in by_filter.values())
    if isinstance(first, str) and same:
        return Finished(said, first)
    unclear = ", ".join(f"filter {name!r} makes {value!r} of it" for name, value in by_filter.items())
    return Finished(said, first if isinstance(first, str) else said, unclear)


def _filtered(task: Any, ensemble: Any, tags: list[list[str]] | None, answers: list[list[str]]) -> list[Any]:
    """One value an answer: the filters first, the reasoning tags last, as lmms-eval has it."""
    filters = list(ensemble.filters)
    if tags is None and getattr(task.config, "auto_strip_thinking", False):
        from lmms_eval.filters.transformation import StripThinkingFilter

        filters.insert(0, StripThinkingFilter())  # lmms-eval puts it there once everything is answered
    made: Any = [list(texts) for texts in answers]
    for one in filters:
        made = one.apply(made, getattr(task, "task_docs", None))
    return [
        [_stripped(t, tags) for t in value] if isinstance(value, list) else _stripped(value, tags) for value in made
    ]


def _stripped(text: Any, tags: list[list[str]] | None) -> Any:
    return strip_reasoning_tags(text, tags) if tags is not None and isinstance(text, str) else text


def tasks_of(task_dict: Mapping[Any, Any]) -> Iterator[Any]:
    """The tasks in lmms-eval's dict of tasks and groups of them."""
    for task in task_dict.values():
        if isinstance(task, Mapping):
            yield from tasks_of(task)
        else:
            yield task[1] if isinstance(task, tuple) else task
