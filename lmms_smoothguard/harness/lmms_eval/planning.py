"""Which requests are attacked, with everything checked that can be before a model is asked: bad data costs no hours."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.attacks.media import PICTURES, SOUNDS
from lmms_smoothguard.attacks.sound_clips import too_faint
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import AttackError, did_you_mean
from lmms_smoothguard.harness import ledger, sharding
from lmms_smoothguard.harness.lmms_eval.ears import Ear, heard_as
from lmms_smoothguard.harness.lmms_eval.finishing import PADDING
from lmms_smoothguard.harness.lmms_eval.instances import (
    document_of,
    has_media,
    images_of,
    media_kinds,
    reading,
    sounds_of,
)
from lmms_smoothguard.harness.options import Options, TaskAttack
from lmms_smoothguard.sounds import Sound

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """One request to attack: its document, its own pictures, the target it is to be led to (None: away from `right`).

    right: answers the data set accepts; none where the task names no label; sounds: its own, where it has no picture, at the
    model's rate and in whole steps of 16 bits, as what is crafted from them will be.
    """

    request: Instance
    attack: TaskAttack
    doc: Any
    images: tuple[Image.Image, ...]
    target: str | None
    right: tuple[str, ...]
    sounds: tuple[Sound, ...] = ()

    @property
    def too_faint(self) -> bool:
        """Whether its sounds are silent, or so nearly that the budget in decibels leaves no room for any change."""
        return too_faint(self.sounds, self.attack.settings.snr)

    def label(self, clean_answer: str) -> str | None:
        """What to lead away from; None is the model's own clean answer, in its own tokens.

        That wherever it is one of the accepted answers, or none is named; else the one most often given.
        """
        if not self.right or any(_same(clean_answer, text) for text in self.right):
            return None
        return Counter(self.right).most_common(1)[0][0]


def warn_of_noise(wrapper: Any, requests: Sequence[Instance], options: Options) -> None:
    """Says once where SmoothGuard's noise is set for pictures alone and tasks have sounds alone, as their first samples show it."""
    config, given = None if options.defense is None else options.defense.config, options.defense_given
    seen = [name for name in ("sigma", "noise_space") if name in given]
    if not isinstance(config, SmoothGuardConfig) or not seen or not {"audio_sigma", "audio_snr"}.isdisjoint(given):
        return
    heard = []
    for task, request in {request.task_name: request for request in reversed(requests)}.items():
        with reading(request):
            if media_kinds(wrapper, request) == {"sounds"}:
                heard.append(task)
    if heard:
        values = ", ".join(f"{name}={getattr(config, name)}" for name in seen)
        log.warning(
            "%s given, of noise on pictures, and %s has sounds, whose noise is audio_sigma=%g by default; expected audio_sigma=... or "
            "audio_snr=... for another",
            values, ", ".join(map(str, sorted(heard))), config.audio_sigma,
        )  # fmt: skip


def plan(
    wrapper: Any, requests: Sequence[Instance], options: Options, ear: Ear | None = None
) -> tuple[list[Plan], list[Instance]]:
    """The requests that are attacked, each once, and those of the same tasks that have no image or sound to attack.

    A task that asks for its attack itself must have images or sounds throughout; one that is attacked because the model's
    arguments say so may mix samples with and without. `ear`: the model's, None where its processor shows none. Raises
    AttackError for what cannot be attacked; warns of attack settings without an attack.
    """
    plans: list[Plan] = []
    bare: list[Instance] = []
    asked = False
    for request in {id(request): request for request in requests}.values():  # repeats are the same request again
        attack = options.attack_on(request.metadata)
        asked = asked or attack is not None
        if attack is None or request.metadata.get(PADDING):
            continue
        made = _plan(wrapper, request, attack, options, ear)
        if made is not None:
            plans.append(made)
        else:
            bare.append(request)
    if options.attack and not asked:
        given = ", ".join(f"attack_{name}" for name in options.attack)
        log.warning(
            "%s given, but no task of this run asks for an attack: nothing is attacked without attack=...", given
        )
    _refuse_bare_tasks(plans, bare)
    refuse_duplicates(plans)
    return plans, bare


def _plan(wrapper: Any, request: Instance, attack: TaskAttack, options: Options, ear: Ear | None) -> Plan | None:
    with reading(request):
        doc, images = document_of(wrapper, request), images_of(wrapper, request)
        sounds = [] if images else sounds_of(wrapper, request)
    name = f"{request.task_name}[{request.doc_id}]"
    if not images and not sounds:
        if has_media(wrapper, request):
            raise AttackError(
                f"{name} has media, but no picture or sound in memory; expected PIL images, or sounds with their array and "
                "sampling_rate, which are what is attacked"
            )
        if "attack" in request.metadata:
            raise AttackError(f"{name} has no image or sound to attack; expected a task of images or sounds")
        return None
    attack.settings.check_medium(PICTURES if images else SOUNDS)
    # What the user asks for on the command line goes before what a task's data set names.
    asked = attack.settings.target if "target" in options.attack else None
    target = asked or attack.settings.target
    if asked is None and attack.target_field is not None:
        target = "".join(_texts(name, doc, "target_field", attack.target_field)[:1])
    right = () if target is not None or attack.label is None else _texts(name, doc, "label", attack.label)
    mend = "Shorten it, or leave the sample out with --offset and --limit."
    heard = tuple(heard_as(f"{name}, sound {n}", sound, ear, mend) for n, sound in enumerate(sounds, start=1))
    return Plan(request, attack, doc, tuple(images), target, right, heard)


def _texts(name: str, doc: Mapping[str, Any], role: str, field: str) -> tuple[str, ...]:
    """The texts in a document's field: one, or a list of them, bare or (as VQAv2's) in dicts with an `answer`."""
    if field not in doc:
        raise AttackError(f"{name} has no field {field!r}, the attack's {role}; {did_you_mean(field, doc)}")
    value = doc[field]
    items = value if isinstance(value, list | tuple) else [value]
    items = [item["answer"] if isinstance(item, Mapping) and "answer" in item else item for item in items]
    texts = tuple(str(item) for item in items if isinstance(item, str | int | float) and str(item).strip())
    if not texts:
        raise AttackError(f"{name} has {value!r} in its field {field!r}, the attack's {role}; expected a text")
    return texts


def _same(answer: str, right: str) -> bool:
    """Equal to our eyes or to those of VQA's own scoring, which drops articles and punctuation and knows numerals."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    process = EvalAIAnswerProcessor()
    return normalize_answer(answer) == normalize_answer(right) or process(answer) == process(right)


def _refuse_bare_tasks(plans: Sequence[Plan], bare: Sequence[Instance]) -> None:
    """A task without any image or sound was named by mistake. A shard cannot tell: its share may be text by chance."""
    pictured = {plan.request.task_name for plan in plans}
    for task, count in Counter(request.task_name for request in bare if request.task_name not in pictured).items():
        if not sharding.sharded():
            raise AttackError(
                f"none of the {count} samples of {task} has an image or a sound, so there is nothing to attack; expected a task of "
                "images or sounds. Run text tasks without an attack."
            )


def refuse_duplicates(plans: Sequence[Plan]) -> None:
    """Scores of a task that asks for its attack itself are found by document: two that look alike would share them."""
    seen: dict[tuple[str, str], set[Any]] = defaultdict(set)
    for made in plans:
        if "attack" in made.request.metadata:
            question = str(made.doc["question_id"]) if "question_id" in made.doc else ledger.place(made.doc)
            seen[str(made.request.task_name), question].add(made.request.doc_id)
    twice = [(task, question) for (task, question), documents in seen.items() if len(documents) > 1]
    if twice:
        task = twice[0][0]
        names = [question for other, question in twice if other == task]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise AttackError(
            f"{task} has more than one sample of the same question_id: {', '.join(names[:10])}{more}; expected each once, "
            "or one sample would be scored by another's attack. Mend the data set."
        )
