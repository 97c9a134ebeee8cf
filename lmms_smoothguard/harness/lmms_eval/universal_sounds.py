"""Universal attacks on sounds in a run: one change, learnt from a corpus through the wrapper's own path, on every clip of a task."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance

from hf_integration.protecting import hears
from lmms_smoothguard.attacks.cache import Entry
from lmms_smoothguard.attacks.corpus import Pair, corpus_of
from lmms_smoothguard.attacks.objective import answer_ids
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.universal_clips import pairs_with_clips
from lmms_smoothguard.attacks.universal_sounds import SoundLesson, UniversalSoundCrafter
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.harness.lmms_eval.ears import Ear, check_heard, heard_as
from lmms_smoothguard.harness.lmms_eval.instances import as_asked, media_kinds, reading
from lmms_smoothguard.harness.lmms_eval.planning import Plan
from lmms_smoothguard.harness.lmms_eval.universal import (
    NAME,
    OrdinaryWay,
    instructions,
    known_question,
    refuse_known_questions,
)
from lmms_smoothguard.sounds import Sound, read_clip

log = logging.getLogger(__name__)


def split(wrapper: Any, requests: Sequence[Instance], processor: Any) -> tuple[list[Instance], list[Instance]]:
    """Requests under a universal attack: those of tasks that are shown a picture, and those of tasks with sounds, among which are those
    of text alone where the model has no eyes.

    Raises AttackError for a task with pictures and sounds.
    """
    deaf_or_seeing = not hears(processor) or getattr(processor, "image_processor", None) is not None
    found: dict[str, dict[str, Instance]] = {request.task_name: {} for request in requests}
    for request in requests:
        with reading(request):
            for kind in media_kinds(wrapper, request):
                found[request.task_name].setdefault(kind, request)
    for task, kinds in found.items():
        if len(kinds) > 1:
            places = [f"{kind} ({task}[{kinds[kind].doc_id}])" for kind in sorted(kinds)]
            raise AttackError(
                f"{task} has {' and '.join(places)}, and attack=universal makes one picture, or one change of sounds; expected a task of "
                "one of them. Attacks on both are not supported."
            )
    heard = {task for task, kinds in found.items() if "sounds" in kinds or not (kinds or deaf_or_seeing)}
    return [r for r in requests if r.task_name not in heard], [r for r in requests if r.task_name in heard]


@dataclass(frozen=True)
class Course:
    """What the change for some requests is learnt from. plans: the requests, of one task and settings; pairs: the corpus; clips: what
    each pair is asked about, as the model hears it."""

    settings: AttackSettings
    plans: tuple[Plan, ...]
    pairs: tuple[Pair, ...]
    clips: tuple[Sound, ...]

    @functools.cached_property
    def _known(self) -> set[bytes]:
        return {clip.pcm.tobytes() for clip in self.clips}

    def has(self, one: Plan) -> bool:
        """Whether the change is learnt on a clip of this request."""
        return any(sound.pcm.tobytes() in self._known for sound in one.sounds)

    def about(self, one: Plan) -> list[Pair]:
        """The pairs about a clip of this request."""
        sounds = {sound.pcm.tobytes() for sound in one.sounds}
        return [pair for pair, clip in zip(self.pairs, self.clips, strict=True) if clip.pcm.tobytes() in sounds]


class Changed(NamedTuple):
    """One request's clips with the change, and what the samples log says beside their distances."""

    entry: Entry
    info: dict[str, Any]


def courses(wrapper: Any, plans: Sequence[Plan], ear: Ear | None) -> list[Course]:
    """What the universal attacks among these plans learn from, all read and checked before a model is asked.

    Raises AttackError for clips that cannot be heard whole and questions of the corpus; warns of clips that are scored, too.
    """
    groups: dict[tuple[AttackSettings, str], list[Plan]] = defaultdict(list)
    for one in plans:
        if one.attack.settings.name == NAME:
            groups[one.attack.settings, one.request.task_name].append(one)
    made = []
    for (settings, task), members in groups.items():
        pairs = pairs_with_clips(settings)
        course = Course(settings, tuple(members), pairs, _clips(pairs, ear))
        _check_apart(wrapper, task, course, own=corpus_of(settings)[0].audio is not None)
        made.append(course)
    return made


def _clips(pairs: Sequence[Pair], ear: Ear | None) -> tuple[Sound, ...]:
    heard: dict[bytes, Sound] = {}
    for number, pair in enumerate(pairs, start=1):
        assert pair.audio is not None
        if pair.audio not in heard:
            name = f"the clip of pair {number} of the attack's corpus"
            heard[pair.audio] = heard_as(name, read_clip(pair.audio).mono(), ear, "Cut it.")
    return tuple(heard[pair.audio] for pair in pairs if pair.audio is not None)


def _check_apart(wrapper: Any, task: str, course: Course, *, own: bool) -> None:
    """own: each pair is about a clip of its own, so that its words alone are not yet the question."""
    shared, count = [one for one in course.plans if course.has(one)], len(course.plans)
    if own:
        for one in shared:
            refuse_known_questions(wrapper, course.about(one), [one])
        known = instructions(course.pairs)
        asked = sum(known_question(wrapper, known, one) is not None for one in course.plans)
        if asked:
            log.warning(
                "%d of %d samples of %s ask what the corpus of the universal attack asks about other clips: where words alone are the "
                "question, take it out of the corpus",
                asked, count, task,
            )  # fmt: skip
    else:
        refuse_known_questions(wrapper, course.pairs, course.plans)
    if shared:
        log.warning(
            "%d of %d samples of %s have a clip that the universal change is learnt on (attack_learnt_on in the samples log): their figures "
            "say nothing of other clips. Expected clips apart from what is evaluated.",
            len(shared), count, task,
        )  # fmt: skip


def changed(
    way: OrdinaryWay, learnt_from: Sequence[Course], crafter: UniversalSoundCrafter, tokenizer: Any
) -> dict[int, Changed]:
    """The clips of every request with the change for it, by the request's id."""
    made = {}
    for course in learnt_from:
        change = crafter.craft_change(course.settings, _lessons(way, course, tokenizer))
        for one in course.plans:
            info = {"attack_change_key": change.key} | ({"attack_learnt_on": True} if course.has(one) else {})
            made[id(one.request)] = Changed(crafter.changed(change, one.sounds), info)
    return made


def _lessons(way: OrdinaryWay, course: Course, tokenizer: Any) -> list[SoundLesson]:
    """The corpus as the wrapper asks it: a request's system turns and settings, the instruction, the clip."""
    template, made = course.plans[0].request, []
    asked = list(zip(course.pairs, course.clips, strict=True))
    for number, (pair, clip) in enumerate(way.bar(asked, "reading the corpus", "pair"), start=1):
        plain = way.recorded(as_asked(way.wrapper, template, pair.instruction, clip))
        check_heard(way.wrapper, f"pair {number} of the attack's corpus", [clip], plain)
        ids = answer_ids(tokenizer, plain.inputs["input_ids"][0].tolist(), pair.response)
        made.append(SoundLesson(plain.inputs, tuple(ids), (clip,)))
    return made
