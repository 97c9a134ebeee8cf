"""Universal attacks in a run: one picture, made from a corpus through the wrapper's own path, shown with every request."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_smoothguard.attacks.cache import AttackCache, Entry
from lmms_smoothguard.attacks.corpus import Pair, corpus_of
from lmms_smoothguard.attacks.objective import answer_ids
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.universal import base_picture
from lmms_smoothguard.attacks.universal_crafter import Lesson, UniversalCrafter
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.harness.lmms_eval.finishing import PADDING
from lmms_smoothguard.harness.lmms_eval.instances import (
    as_asked,
    document_of,
    has_media,
    images_of,
    reading,
    texts_of,
    with_images,
    with_picture_added,
)
from lmms_smoothguard.harness.lmms_eval.planning import Plan, refuse_duplicates
from lmms_smoothguard.harness.options import Options
from lmms_smoothguard.harness.recording import PlainPass, recorded

log = logging.getLogger(__name__)
NAME = "universal"


def split(requests: Sequence[Instance], options: Options) -> tuple[list[Instance], Sequence[Instance]]:
    """The requests under a universal attack, and the others; beside some of the former only those that are attacked too."""
    names = [attack and attack.settings.name for attack in (options.attack_on(r.metadata) for r in requests)]
    together = [r for r, name in zip(requests, names, strict=True) if name == NAME and not r.metadata.get(PADDING)]
    if not together:
        return [], requests
    return together, [request for request, name in zip(requests, names, strict=True) if name not in (NAME, None)]


@dataclass(frozen=True)
class Shown:
    """One request with the universal picture: what it was planned as, its plain pass, its new arguments, the entry."""

    plan: Plan
    plain: PlainPass
    arguments: tuple[Any, ...]
    entry: Entry


def shown_requests(
    way: OrdinaryWay,
    requests: Sequence[Instance],
    options: Options,
    crafter: UniversalCrafter,
    processor: Any,
    tokenizer: Any,
) -> list[Shown]:
    """Every request with the picture of its settings: in place of each picture of its own, or added to text alone.

    Raises AttackError where a request's question is in the corpus, before a picture is made.
    """
    unique = {id(request): request for request in requests}.values()
    plans = [_plan(way.wrapper, request, options) for request in unique]
    refuse_duplicates(plans)
    # A task's system turns and settings are its own, so each is taught by itself; alike ones have one key.
    groups: dict[tuple[AttackSettings, str], list[Plan]] = defaultdict(list)
    for one in plans:
        groups[one.attack.settings, one.request.task_name].append(one)
    for (settings, task), members in groups.items():
        _warn_of_replacing(task, members)
        refuse_known_questions(way.wrapper, corpus_of(settings), members)
    shown = []
    for (settings, _), members in groups.items():
        base = base_picture(settings, processor)
        lessons = way.lessons(corpus_of(settings), Image.fromarray(base), members[0].request, tokenizer)
        shown += way.shown(members, crafter.craft_universal(settings, base, lessons))
    return shown


def _warn_of_replacing(task: str, plans: Sequence[Plan]) -> None:
    if any(one.images for one in plans):
        log.warning(
            "%s has pictures, and attack=universal shows its own in their place: answers change for that alone. The control is "
            "attack_eps=0, the picture that it starts from.",
            task,
        )


def _plan(wrapper: Any, request: Instance, options: Options) -> Plan:
    with reading(request):
        doc, images = document_of(wrapper, request), images_of(wrapper, request)
    attack = options.attack_on(request.metadata)
    assert attack is not None
    name = f"{request.task_name}[{request.doc_id}]"
    if not images and has_media(wrapper, request):
        raise AttackError(
            f"{name} has media, but no picture in memory; expected PIL images, sounds with their array and "
            "sampling_rate, or text alone"
        )
    return Plan(request, attack, doc, tuple(images), None, ())


def refuse_known_questions(wrapper: Any, pairs: Sequence[Pair], plans: Sequence[Plan]) -> None:
    """A picture, or a change of sounds, made from the very question it is scored on would say nothing of others: AttackError."""
    known = instructions(pairs)
    for one in plans:
        if (asked := known_question(wrapper, known, one)) is not None:
            raise AttackError(
                f"{one.request.task_name}[{one.request.doc_id}] asks {asked!r}, which is in the corpus of the universal "
                "attack; expected a corpus apart from what is evaluated. Take it out of the corpus."
            )


def instructions(pairs: Sequence[Pair]) -> dict[str, str]:
    """Of a corpus, by how they are compared."""
    return {_plainly(pair.instruction): pair.instruction for pair in pairs if pair.instruction}


def known_question(wrapper: Any, known: Mapping[str, str], one: Plan) -> str | None:
    """Which of `instructions` a request asks."""
    fields = [value for value in one.doc.values() if isinstance(value, str)]
    return next(
        (known[text] for text in map(_plainly, [*texts_of(wrapper, one.request), *fields]) if text in known), None
    )


def _plainly(text: str) -> str:
    return " ".join(text.casefold().split())


@dataclass(frozen=True)
class OrdinaryWay:
    """The wrapper's own way from a request to `generate`; `answer`: its own answer; `quiet`: no progress bars."""

    wrapper: Any
    model: Any
    fingerprint: str
    cache: AttackCache
    answer: Callable[[Instance], str]
    quiet: bool

    def lessons(self, pairs: Sequence[Pair], base: Image.Image, template: Instance, tokenizer: Any) -> list[Lesson]:
        """The corpus as the wrapper asks it: the template's system turns and settings, the instruction, the base picture."""
        made = []
        for pair in self.bar(pairs, "reading the corpus", "pair"):
            plain = self.recorded(as_asked(self.wrapper, template, pair.instruction, base))
            ids = answer_ids(tokenizer, plain.inputs["input_ids"][0].tolist(), pair.response)
            made.append(Lesson(plain.inputs, tuple(ids)))
        return made

    def shown(self, plans: Sequence[Plan], entry: Entry) -> list[Shown]:
        """Requests with the entry's picture, and the undefended answers to them as they were."""
        picture, made = Image.fromarray(entry.images[0]), []
        for one in self.bar(plans, "clean answers", "sample"):
            if one.images:
                plain = self.recorded(one.request)
                arguments = with_images(self.wrapper, one.request, [picture] * len(one.images))
            else:  # text alone is answered without a defence
                plain = PlainPass(text=self.answer(one.request))
                arguments = with_picture_added(self.wrapper, one.request, picture)
            made.append(Shown(one, plain, arguments, entry))
        return made

    def recorded(self, request: Instance) -> PlainPass:
        """The undefended pass of a request, of which a known answer comes from the cache."""
        with recorded(self.model, self.fingerprint, self.cache) as plain:
            plain.text = self.answer(request)
        return plain

    def bar(self, items: Sequence[Any], title: str, unit: str) -> Any:
        """The items, with a progress bar."""
        from tqdm import tqdm

        return tqdm(items, desc=title, unit=unit, disable=self.quiet)
