"""The questions of an lmms-eval task, without its model wrappers."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lmms_smoothguard.errors import ConfigError, did_you_mean
from lmms_smoothguard.evaluation.columns import NAMES, answers_of
from lmms_smoothguard.evaluation.questions import Questions, Words, labelled
from lmms_smoothguard.harness.lmms_eval import discovery
from lmms_smoothguard.sounds import Sound, sound_of

log = logging.getLogger(__name__)


def is_task(name: str) -> bool:
    """Whether lmms-eval, where it is installed, knows a task or group of that name."""
    return _manager_of(name) is not None


def load_task(name: str, *, limit: int | None = None) -> Questions:
    """The questions of one task: pictures, sounds and texts as its own functions give them, without any model's own prompts.

    The right answers are those in the document's field that `metadata.attack.label` names, all of them where it is a list (as
    VQA's ten), else the task's target where that is one text; the target of an attack is `metadata.attack.target_field`'s.
    Ids are the documents' own, or row numbers, with a warning, where some have none or share one. Raises ConfigError for a
    group, a task that is not known, cannot be loaded, or asks for more than pictures and sounds.
    """
    manager = _manager_of(name)
    if manager is None:
        every = _manager(ours_alone=False)
        known = (
            did_you_mean(name, difflib.get_close_matches(name, every.all_subtasks)) if every else "it is not installed"
        )
        raise ConfigError(f"lmms-eval has no task {name!r}; {known}")
    if name not in manager.all_subtasks:
        listed = manager.task_index[name]["task"]
        inside = f" of {', '.join(map(str, listed))}" if isinstance(listed, list) else ""
        raise ConfigError(f"{name!r} is a group{inside}; expected one task")
    try:
        task = manager.load_task_or_group([name])[name]
        docs = task.test_docs() if task.has_test_docs() else task.validation_docs()
    except Exception as error:
        raise ConfigError(f"lmms-eval cannot load the task {name!r}: {_cause(error)}") from error
    split = task.config.test_split or task.config.validation_split
    count = min(limit or len(docs), len(docs))
    settings = task.config.generation_kwargs or {}
    attack = (task.config.metadata or {}).get("attack")
    attack = attack if isinstance(attack, Mapping) else {}
    ids = _ids(name, docs)
    words = [_words(task, docs[number], ids[number], attack) for number in range(count)]

    @functools.lru_cache(maxsize=1)  # pictures and sounds of one document come one after the other
    def media(number: int) -> tuple[Any, ...]:
        return tuple(task.doc_to_visual(docs[number]) or ())

    def pictures(number: int) -> Sequence[Image.Image]:
        strangers = [item for item in media(number) if not isinstance(item, Image.Image) and not _is_sound(item)]
        if strangers:
            raise ValueError(f"a {type(strangers[0]).__name__} among its pictures and sounds")
        return [item for item in media(number) if isinstance(item, Image.Image)]

    def sounds(number: int) -> Sequence[Sound]:
        return [sound_of(item) for item in media(number) if _is_sound(item)]

    longest = settings.get("max_new_tokens")
    return Questions(words, pictures, sounds=sounds, source=name, split=split, max_new_tokens=longest)


def _is_sound(item: Any) -> bool:
    """As `datasets` has them: undecoded, decoded, or torchcodec's decoder."""
    if isinstance(item, Mapping):
        return "array" in item or set(item) == {"bytes", "path"}
    return hasattr(item, "get_all_samples")


def _ids(name: str, docs: Any) -> list[str]:
    """The documents' own, where each of ALL has one to itself, so that a question has the same one under any limit."""
    numbers = [str(number) for number in range(len(docs))]
    known = [part for part in NAMES["id"] if part in docs.column_names]
    if not known:
        return numbers
    found = [_usual(doc, "id") or "" for doc in docs.select_columns(known)]  # without reading pictures
    if len(set(found)) == len(found) and all(text.strip() for text in found):
        return found
    log.warning("%s has no %s of its own for each question, so they go by the numbers of their rows", name, known[0])
    return numbers


def _usual(doc: Mapping[str, Any], part: str) -> str | None:
    return next((str(doc[name]) for name in NAMES[part] if isinstance(doc.get(name), str | int)), None)


def _words(task: Any, doc: Mapping[str, Any], name: str, attack: Mapping[str, Any]) -> Words:
    target = doc.get(attack["target_field"]) if "target_field" in attack else attack.get("target")
    right = answers_of(_field(doc, attack["label"])) if "label" in attack else _own_target(task, doc)
    label, accepted = labelled(right)
    return Words(
        name,
        str(task.doc_to_text(doc)),
        label,
        None if target is None else str(target),
        _usual(doc, "group"),
        accepted,
    )


def _field(doc: Mapping[str, Any], name: str) -> Any:
    if name not in doc:
        raise ConfigError(f"a document has no field {name!r}, the right answer by its task; {did_you_mean(name, doc)}")
    return doc[name]


def _own_target(task: Any, doc: Mapping[str, Any]) -> tuple[str, ...]:
    """The task's target where that is one text: a list of captions names no right one."""
    asked = task.config.doc_to_target
    if isinstance(asked, str) and asked not in doc and "{" not in asked:
        return ()  # upstream's VQA tasks name a field that is not there, and lmms-eval takes its name for the answer
    found = task.doc_to_target(doc)
    return () if isinstance(found, list | tuple | Mapping) else answers_of(found)


def _manager_of(name: str) -> Any:
    """A task manager that knows the name: of our tasks alone if it is one, for lmms-eval's thousands take ten seconds."""
    managers = (_manager(ours_alone) for ours_alone in (True, False))
    return next((manager for manager in managers if manager is not None and name in manager.all_tasks), None)


@functools.cache
def _manager(ours_alone: bool) -> Any:
    try:
        from lmms_eval.tasks import TaskManager
        from loguru import logger
    except ImportError:
        return None
    discovery.install()
    logger.disable("lmms_eval")  # a line for every file that is no task
    try:
        return TaskManager("ERROR", include_path=str(discovery.tasks_path()), include_defaults=not ours_alone)
    finally:
        logger.enable("lmms_eval")


def _cause(error: Exception) -> str:
    attempt = getattr(error, "last_attempt", None)  # lmms-eval tries again, and then hides what went wrong
    inner = attempt.exception() if attempt is not None else error
    return f"{type(inner).__name__}: {inner}".splitlines()[0]
