"""Attacks the requests of a run before they are answered: plan, one clean pass each, crafting, other images in their places.

A sample that cannot be attacked (no image in a mixed task; an empty clean answer, which leaves nothing to lead away from)
stays as it is, is logged with the reason, and is in no rate under attack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_smoothguard.attacks.cache import AttackCache, Entry
from lmms_smoothguard.attacks.craft import Job
from lmms_smoothguard.attacks.goals import goal
from lmms_smoothguard.attacks.universal_crafter import UniversalCrafter
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.harness.lmms_eval import ledger, universal
from lmms_smoothguard.harness.lmms_eval.instances import document_of, with_images
from lmms_smoothguard.harness.lmms_eval.options import Options
from lmms_smoothguard.harness.lmms_eval.planning import NO_ANSWER, NO_IMAGE, Plan, plan
from lmms_smoothguard.harness.lmms_eval.recording import PlainPass, recorded

INFO = "_smoothguard"
"""The key of a request's metadata under which the samples log's fields about its attack travel."""


def attacked_requests(
    wrapper: Any,
    requests: Sequence[Instance],
    options: Options,
    model: Any,
    processor: Any,
    answer: Callable[[Instance], str],
    quiet: bool,
) -> dict[int, Instance]:
    """What takes the place of each request that an attack is asked for, by the request's id.

    `answer`: the wrapper's own, undefended answer to a request; `quiet`: no progress bars.
    """
    together, others = universal.split(requests, options)
    plans, bare = plan(wrapper, others, options) if others else ([], [])
    made = {id(request): _left_out(wrapper, request, NO_IMAGE, "") for request in bare}
    if not plans and not together:
        return made
    if processor is None:
        raise AttackError(f"{type(wrapper).__name__} shows no processor; expected one to carry gradients to the pixels")
    tokenizer = getattr(processor, "tokenizer", None) or getattr(wrapper, "tokenizer", None)
    _check_targets(tokenizer, plans)
    cache = AttackCache(options.attack_cache)
    crafter = UniversalCrafter(model, processor, cache, options.defense, options.attack_batch_size, quiet)
    way = universal.OrdinaryWay(wrapper, model, crafter.fingerprint, cache, answer, quiet)
    for shown in universal.shown_requests(way, together, options, crafter, processor, tokenizer) if together else ():
        made[id(shown.plan.request)] = _attacked(shown.plan, shown.plain, shown.entry, shown.arguments)
    jobs: list[tuple[Plan, PlainPass, Job]] = []
    for one, plain in _plain_passes(plans, model, crafter.fingerprint, cache, answer, quiet):
        job = _job(one, plain, tokenizer)
        if job is None:
            made[id(one.request)] = _left_out(wrapper, one.request, NO_ANSWER, plain.text)
        else:
            jobs.append((one, plain, job))
    entries = crafter.craft([job for _, _, job in jobs]) if jobs else []
    for (one, plain, _), entry in zip(jobs, entries, strict=True):
        pictures = [Image.fromarray(image) for image in entry.images]
        made[id(one.request)] = _attacked(one, plain, entry, with_images(wrapper, one.request, pictures))
    return made


def _plain_passes(
    plans: Sequence[Plan],
    model: Any,
    fingerprint: str,
    cache: AttackCache,
    answer: Callable[[Instance], str],
    quiet: bool,
) -> list[tuple[Plan, PlainPass]]:
    from tqdm import tqdm

    passes = []
    for one in tqdm(plans, desc="clean answers", unit="sample", disable=quiet):
        with recorded(model, fingerprint, cache) as plain:
            plain.text = answer(one.request)
        passes.append((one, plain))
    return passes


def _job(one: Plan, plain: PlainPass, tokenizer: Any) -> Job | None:
    """None where the clean answer is empty, and no target was named to lead to."""
    label = one.label(plain.text)
    words = goal(tokenizer, plain.inputs, plain.answer, target=one.target, label=label, clean_is_right=label is None)
    if words is None:
        return None
    settings = (
        one.attack.settings if one.target is None else dataclasses.replace(one.attack.settings, target=one.target)
    )
    return Job(settings, one.images, plain.inputs, words)


def _check_targets(tokenizer: Any, plans: Sequence[Plan]) -> None:
    """A target the model cannot say at all is found before the first clean answer."""
    for one in {one.target: one for one in plans if one.target is not None}.values():
        name = f"the target {one.target!r} of {one.request.task_name}[{one.request.doc_id}]"
        ids = tokenizer(str(one.target).strip(), add_special_tokens=False).input_ids
        if not ids:
            raise AttackError(f"{name} has no tokens; expected words the model can say")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise AttackError(f"{name} has words that the tokenizer does not know; expected words the model can say")


def _left_out(wrapper: Any, request: Instance, reason: str, clean_answer: str) -> Instance:
    ledger.record(request.task_name, document_of(wrapper, request), ledger.Note(clean_answer, reason))
    info = {"attack_left_out": reason, "clean_answer": clean_answer}
    return dataclasses.replace(request, metadata={**request.metadata, INFO: info})


def _attacked(one: Plan, plain: PlainPass, entry: Entry, arguments: tuple[Any, ...]) -> Instance:
    info = {
        "attack": entry.record["attack"],
        "attack_key": entry.key,
        "attack_linf": entry.record["linf"],
        "attack_l2": entry.record["l2"],
        "attack_rendering_gap": entry.record["rendering_gap"],
        "attack_seconds": entry.record["seconds"],
        "clean_answer": plain.text,
    }
    ledger.record(one.request.task_name, one.doc, ledger.Note(plain.text))
    return dataclasses.replace(
        one.request,
        arguments=arguments,
        metadata={**one.request.metadata, INFO: info},
    )
