"""Attacks the requests of an lm-eval run before they are answered: one clean pass each, crafting, other images in their places."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from PIL import Image

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.goals import goal
from lmms_smoothguard.errors import AttackError, did_you_mean
from lmms_smoothguard.fingerprint import model_fingerprint
from lmms_smoothguard.harness import ledger
from lmms_smoothguard.harness.options import Options, TaskAttack
from lmms_smoothguard.harness.recording import PlainPass, recorded
from lmms_smoothguard.harness.summary import NO_ANSWER, NO_IMAGE, Outcome, told_of

METADATA = "smoothguard_attack"
"""In a task's metadata: the attack it asks for. Not `attack`: lm-eval puts the model's arguments into every task's metadata."""


@dataclasses.dataclass(frozen=True)
class Attacked:
    """What takes a request's place: itself with adversarial pictures, and what the samples log says of that."""

    request: Instance
    info: dict[str, Any]
    clean_answer: str
    target: str | None = None

    def outcome(self, answer: str) -> Outcome:
        """With the final answer."""
        attack, left_out = self.info.get("attack"), self.info.get("attack_left_out")
        return Outcome(self.clean_answer.strip(), answer.strip(), attack, self.target, left_out)


@dataclasses.dataclass(frozen=True)
class _Asked:
    request: Instance
    attack: TaskAttack
    images: tuple[Image.Image, ...]
    target: str | None
    right: str | None


def attack(
    model: Any,
    processor: Any,
    requests: Sequence[Instance],
    metadata: Mapping[str, Mapping[str, Any]],
    options: Options,
    answer: Callable[[Instance], str],
    quiet: bool,
) -> dict[int, Attacked]:
    """What takes the place of each request that an attack is asked for, by the request's id.

    metadata: of the tasks, by name; answer: lm-eval's own, undefended answer to a request; quiet: no progress bars. Raises
    AttackError for what cannot be attacked.
    """
    found: dict[int, Attacked] = {}
    asked: list[_Asked] = []
    for request in {id(request): request for request in requests}.values():
        wanted = options.attack_on({"attack": metadata[request.task_name].get(METADATA)})
        if wanted is not None and (one := _asked(request, wanted, options)) is not None:
            asked.append(one)
        elif wanted is not None:
            found[id(request)] = _left_out(request, NO_IMAGE, "")
    if not asked:
        return found
    cache = AttackCache(options.attack_cache)
    jobs: list[tuple[_Asked, PlainPass, Job]] = []
    for one, plain in _plain_passes(asked, model, cache, answer, quiet):
        tokens = _goal(one, plain, processor.tokenizer)
        if tokens is None:
            found[id(one.request)] = _left_out(one.request, NO_ANSWER, plain.text)
            continue
        settings = (
            one.attack.settings if one.target is None else dataclasses.replace(one.attack.settings, target=one.target)
        )
        jobs.append((one, plain, Job(settings, one.images, plain.inputs, tokens)))
    crafter = Crafter(model, processor, cache, options.defense, options.attack_batch_size, quiet)
    for (one, plain, _), entry in zip(jobs, crafter.craft([job for *_, job in jobs]) if jobs else [], strict=True):
        info = {**told_of(entry), "clean_answer": plain.text}
        pictures = [Image.fromarray(image) for image in entry.images]
        context, settings, media = one.request.args
        changed = dataclasses.replace(one.request, arguments=(context, settings, {**media, "visual": pictures}))
        ledger.record(str(one.request.task_name), one.request.doc, ledger.Note(plain.text))
        found[id(one.request)] = Attacked(changed, info, plain.text, one.target)
    return found


def pictures_of(request: Instance) -> tuple[Image.Image, ...]:
    """Raises AttackError for what is no picture in memory."""
    found = tuple(request.args[2].get("visual") or ()) if len(request.args) > 2 else ()
    for item in found:
        if not isinstance(item, Image.Image):
            raise AttackError(
                f"{request.task_name}[{request.doc_id}] has a {type(item).__name__} among its pictures; expected PIL images. "
                "Mend the task's doc_to_image."
            )
    return found


def _asked(request: Instance, wanted: TaskAttack, options: Options) -> _Asked | None:
    """None for a request without a picture."""
    images = pictures_of(request)
    if not images:
        return None
    if wanted.settings.name == "universal":
        raise AttackError(
            f"{request.task_name} asks for the attack 'universal', which lm-eval's requests do not carry; expected one picture's "
            "own attack such as pgd. Use lmms-eval for universal pictures."
        )
    asked = wanted.settings.target if "target" in options.attack else None
    target = asked or wanted.settings.target
    if asked is None and wanted.target_field is not None:
        target = _field(request, "target_field", wanted.target_field)
    right = None if target is not None or wanted.label is None else _field(request, "label", wanted.label)
    return _Asked(request, wanted, images, target, right)


def _field(request: Instance, role: str, name: str) -> str:
    place = f"{request.task_name}[{request.doc_id}]"
    if name not in request.doc:
        raise AttackError(f"{place} has no field {name!r}, the attack's {role}; {did_you_mean(name, request.doc)}")
    value = request.doc[name]
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise AttackError(f"{place} has {value!r} in its field {name!r}, the attack's {role}; expected a text")
    return str(value)


def _plain_passes(
    asked: Sequence[_Asked], model: Any, cache: AttackCache, answer: Callable[[Instance], str], quiet: bool
) -> list[tuple[_Asked, PlainPass]]:
    from tqdm import tqdm

    fingerprint, passes = model_fingerprint(model), []
    for one in tqdm(asked, desc="clean answers", unit="sample", disable=quiet):
        with recorded(model, fingerprint, cache) as plain:
            plain.text = answer(one.request)
        passes.append((one, plain))
    return passes


def _goal(one: _Asked, plain: PlainPass, tokenizer: Any) -> tuple[int, ...] | None:
    from lmms_smoothguard.aggregation.verdict import normalize_answer

    clean_is_right = one.right is None or normalize_answer(plain.text) == normalize_answer(one.right)
    return goal(
        tokenizer, plain.inputs, plain.answer, target=one.target, label=one.right, clean_is_right=clean_is_right
    )


def _left_out(request: Instance, reason: str, clean: str) -> Attacked:
    ledger.record(str(request.task_name), request.doc, ledger.Note(clean, reason))
    return Attacked(request, {"attack_left_out": reason, "clean_answer": clean}, clean)
