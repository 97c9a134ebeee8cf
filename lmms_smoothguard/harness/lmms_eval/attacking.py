"""Attacks the requests of a run before they are answered: plan, one clean pass each, crafting, other media in their places.

A sample that cannot be attacked (no image or sound in a mixed task; an empty clean answer, which leaves nothing to lead away from;
sounds so faint that nothing is so many decibels below them) stays as it is, is logged with the reason, and is in no rate under attack. A clean answer is kept as a scorer would be given it
(`clean_answer` in the samples log), and where that is not all the model said but for white space, raw too
(`clean_answer_raw`).
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
from lmms_smoothguard.attacks.sound_clips import TOO_FAINT
from lmms_smoothguard.attacks.universal_sounds import UniversalSoundCrafter
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.harness import ledger
from lmms_smoothguard.harness.lmms_eval import universal, universal_sounds
from lmms_smoothguard.harness.lmms_eval.ears import Ear, check_heard
from lmms_smoothguard.harness.lmms_eval.finishing import Finished, Finisher
from lmms_smoothguard.harness.lmms_eval.instances import document_of, with_images, with_sounds
from lmms_smoothguard.harness.lmms_eval.planning import Plan, plan, warn_of_noise
from lmms_smoothguard.harness.options import Options
from lmms_smoothguard.harness.recording import PlainPass, recorded
from lmms_smoothguard.harness.summary import NO_ANSWER, NO_IMAGE, NO_SOUND, told_of

INFO = "_smoothguard"
"""The key of a request's metadata under which the samples log's fields about its attack travel."""
CLEAN = "_smoothguard_clean"
"""The same for the clean answer, a `Finished`."""


def attacked_requests(
    wrapper: Any,
    requests: Sequence[Instance],
    options: Options,
    model: Any,
    processor: Any,
    answer: Callable[[Instance], str],
    finisher: Finisher,
    quiet: bool,
) -> dict[int, Instance]:
    """What takes the place of each request that an attack is asked for, by the request's id.

    `answer`: the wrapper's own, undefended answer to a request; `finisher`: what makes of it what a scorer is given;
    `quiet`: no progress bars.
    """
    warn_of_noise(wrapper, requests, options)
    together, others = universal.split(requests, options)
    together, heard_together = universal_sounds.split(wrapper, together, processor)
    others, ear = [*others, *heard_together], Ear.of(processor)
    plans, bare = plan(wrapper, others, options, ear) if others else ([], [])
    heard = {one.request.task_name for one in plans if one.sounds}
    made = {
        id(request): _bare(wrapper, request, NO_SOUND if request.task_name in heard else NO_IMAGE) for request in bare
    }
    if not plans and not together:
        return made
    if processor is None:
        raise AttackError(f"{type(wrapper).__name__} shows no processor; expected one to carry gradients to the media")
    tokenizer = getattr(processor, "tokenizer", None) or getattr(wrapper, "tokenizer", None)
    _check_targets(tokenizer, plans)
    courses = universal_sounds.courses(wrapper, plans, ear)
    cache = AttackCache(options.attack_cache)
    crafter = UniversalSoundCrafter(model, processor, cache, options.defense, options.attack_batch_size, quiet)
    way = universal.OrdinaryWay(wrapper, model, crafter.fingerprint, cache, answer, quiet)
    shown = universal.shown_requests(way, together, options, crafter, processor, tokenizer) if together else []
    passes = _plain_passes(wrapper, plans, model, crafter.fingerprint, cache, answer, quiet)
    clean = _finished([*((each.plan, each.plain) for each in shown), *passes], requests, finisher)
    for each in shown:
        request = each.plan.request
        made[id(request)] = _attacked(each.plan, each.plain, clean[id(request)], each.entry, each.arguments)
        if each.plan.images:  # distances are from the picture that the search started from, not from the sample's own
            made[id(request)].metadata[INFO]["attack_replaces_picture"] = True
    changed = universal_sounds.changed(way, courses, crafter, tokenizer)
    jobs: list[tuple[Plan, PlainPass, Job]] = []
    for one, plain in passes:
        if one.too_faint:
            made[id(one.request)] = _left_out(wrapper, one.request, TOO_FAINT, plain.text, clean[id(one.request)])
            continue
        if (found := changed.get(id(one.request))) is not None:
            arguments = _adversarial(wrapper, one, found.entry)
            made[id(one.request)] = _attacked(one, plain, clean[id(one.request)], found.entry, arguments)
            made[id(one.request)].metadata[INFO].update(found.info)
            continue
        job = _job(one, plain, clean[id(one.request)], tokenizer)
        if job is None:
            made[id(one.request)] = _left_out(wrapper, one.request, NO_ANSWER, plain.text, clean[id(one.request)])
        else:
            jobs.append((one, plain, job))
    entries = crafter.craft([job for _, _, job in jobs]) if jobs else []
    for (one, plain, _), entry in zip(jobs, entries, strict=True):
        arguments = _adversarial(wrapper, one, entry)
        made[id(one.request)] = _attacked(one, plain, clean[id(one.request)], entry, arguments)
    return made


def _adversarial(wrapper: Any, one: Plan, entry: Entry) -> tuple[Any, ...]:
    if one.sounds:
        return with_sounds(wrapper, one.request, entry.sounds)
    return with_images(wrapper, one.request, [Image.fromarray(image) for image in entry.images])


def _finished(
    passes: Sequence[tuple[Plan, PlainPass]], requests: Sequence[Instance], finisher: Finisher
) -> dict[int, Finished]:
    """The clean answers as scorers are given them, by the request's id. A task that asks for its attack itself is scored by
    them: AttackError where no single text is what its scorer would be given."""
    texts = {id(one.request): [plain.text] * int(one.request.repeats or 1) for one, plain in passes}
    found = finisher.finish(requests, texts)
    for one, _ in passes:
        finished = found[id(one.request)]
        if finished.unclear and "attack" in one.request.metadata:
            raise AttackError(
                f"the clean answer to {one.request.task_name}[{one.request.doc_id}] cannot be scored beside the final one: "
                f"{finished.unclear}; expected one text. Give the task's filter_list one entry that ends in take_first."
            )
    return found


def _plain_passes(
    wrapper: Any,
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
        request = one.request
        if one.sounds:
            request = dataclasses.replace(request, arguments=with_sounds(wrapper, request, one.sounds))
        with recorded(model, fingerprint, cache) as plain:
            plain.text = answer(request)
        if one.sounds:
            check_heard(wrapper, f"{one.request.task_name}[{one.request.doc_id}]", one.sounds, plain)
        passes.append((one, plain))
    return passes


def _job(one: Plan, plain: PlainPass, clean: Finished, tokenizer: Any) -> Job | None:
    """None where the clean answer is empty, and no target was named to lead to."""
    label = one.label(clean.scored)
    words = goal(tokenizer, plain.inputs, plain.answer, target=one.target, label=label, clean_is_right=label is None)
    if words is None:
        return None
    settings = (
        one.attack.settings if one.target is None else dataclasses.replace(one.attack.settings, target=one.target)
    )
    return Job(settings, one.images, plain.inputs, words, sounds=one.sounds)


def _check_targets(tokenizer: Any, plans: Sequence[Plan]) -> None:
    """A target the model cannot say at all is found before the first clean answer."""
    for one in {one.target: one for one in plans if one.target is not None}.values():
        name = f"the target {one.target!r} of {one.request.task_name}[{one.request.doc_id}]"
        ids = tokenizer(str(one.target).strip(), add_special_tokens=False).input_ids
        if not ids:
            raise AttackError(f"{name} has no tokens; expected words the model can say")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise AttackError(f"{name} has words that the tokenizer does not know; expected words the model can say")


def _bare(wrapper: Any, request: Instance, reason: str) -> Instance:
    return _left_out(wrapper, request, reason, "", Finished("", ""))


def _left_out(wrapper: Any, request: Instance, reason: str, raw: str, clean: Finished) -> Instance:
    ledger.record(request.task_name, document_of(wrapper, request), ledger.Note(clean.scored, reason))
    info = {"attack_left_out": reason, **_logged(raw, clean)}
    return dataclasses.replace(request, metadata={**request.metadata, INFO: info, CLEAN: clean})


def _logged(raw: str, clean: Finished) -> dict[str, str]:
    return {"clean_answer": clean.scored} | ({} if raw.strip() == clean.scored.strip() else {"clean_answer_raw": raw})


def _attacked(one: Plan, plain: PlainPass, clean: Finished, entry: Entry, arguments: tuple[Any, ...]) -> Instance:
    info = {
        **told_of(entry),
        **_logged(plain.text, clean),
    }
    ledger.record(one.request.task_name, one.doc, ledger.Note(clean.scored))
    return dataclasses.replace(
        one.request,
        arguments=arguments,
        metadata={**one.request.metadata, INFO: info, CLEAN: clean},
    )
