"""One process's share of a run: clean answers, crafting in batches, answers to what was crafted, a record each."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard.attacking.asked import AttackRun
from lmms_smoothguard.attacking.outcomes import EMPTY_ANSWER, Rules, Standing
from lmms_smoothguard.attacking.store import Store
from lmms_smoothguard.attacking.summary import success_so_far
from lmms_smoothguard.attacks.cache import AttackCache, Entry
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.goals import goal
from lmms_smoothguard.attacks.media import PICTURES, SOUNDS
from lmms_smoothguard.attacks.sound_clips import TOO_FAINT, too_faint
from lmms_smoothguard.choice import check
from lmms_smoothguard.errors import AttackError, ConfigError, SmoothGuardError, explain
from lmms_smoothguard.evaluation.questions import Question, Questions
from lmms_smoothguard.inputs.carried import CLIPS
from lmms_smoothguard.sounds import sound_of
from lmms_smoothguard.subject import Subject

log = logging.getLogger(__name__)

_BATCHES_AHEAD = 8
"""Clean answers are asked for that many batches before crafting, so that there are enough of one length to share a batch."""


class Prepared(NamedTuple):
    """A sample before crafting; question: without its pictures and sounds, which are read again; job: likewise, with its inputs in
    main memory, for many wait their turn; None where the sample cannot be attacked, and `reason` says why; sizes: of its pictures, and
    how long its sounds are at the model's rate; standing: what its clean answer makes of it; notes: a text for each of its sounds, what
    it is no longer as it was stored."""

    number: int
    question: Question
    standing: Standing
    job: Job | None
    sizes: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    reason: str | None = None


class Share:
    """quiet: no progress bar, for all processes but the main one."""

    def __init__(
        self, asked: AttackRun, subject: Subject, questions: Questions, rules: Rules, store: Store, quiet: bool
    ) -> None:
        assert asked.cache is not None and asked.max_new_tokens is not None
        self._asked, self._subject, self._questions, self._rules = asked, subject, questions, rules
        self._store, self._quiet, self._length = store, quiet, asked.max_new_tokens
        check(asked.defense, subject.model, getattr(subject.processor, "image_processor", subject.processor))
        self._crafter = Crafter(
            subject.model, subject.processor, AttackCache(asked.cache), asked.defense, asked.batch_size, quiet=True
        )
        rows = max(1, asked.attack.eot) * asked.attack.restarts
        self._size = max(1, asked.batch_size // rows)
        self._failed: list[SmoothGuardError] = []

    def work(self, numbers: Sequence[int]) -> list[SmoothGuardError]:
        """Does those samples that are not done, and returns what is wrong with those that could not be answered: one bad file
        costs no others. Where it is all of the first ones, the error of the first is raised."""
        from tqdm import tqdm

        records = [self._store.get(self._questions.ids[n], self._questions.digests[n]) for n in numbers]
        done = [record for record in records if record is not None]
        todo = [number for number, record in zip(numbers, records, strict=True) if record is None]
        with tqdm(total=len(numbers), initial=len(done), unit="sample", desc="attacks", disable=self._quiet) as bar:
            for record in self._records(todo):
                self._store.put(record)
                done.append(record)
                bar.set_postfix_str(f"ASR {success_so_far(done)}", refresh=False)
                bar.update()
        return self._failed

    def _records(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        ahead = self._size * _BATCHES_AHEAD
        for start in range(0, len(numbers), ahead):
            prepared = list(self._prepared(numbers[start : start + ahead]))
            if self._failed and not start and not prepared:
                raise self._failed[0]
            yield from (self._left_out(one) for one in prepared if one.job is None)
            attackable = sorted((one for one in prepared if one.job is not None), key=_likeness)
            for _, alike in itertools.groupby(attackable, key=_likeness):
                yield from self._crafted(list(alike))

    def _prepared(self, numbers: Sequence[int]) -> Iterator[Prepared]:
        for number in numbers:
            with _naming(self._questions.ids[number]):
                question = self._questions[number]
            self._check_medium(question)
            try:
                with _naming(question.id):
                    made = self._prepare(number, question)
            except SmoothGuardError as error:
                self._failed.append(error)
            else:
                yield made

    def _prepare(self, number: int, question: Question) -> Prepared:
        target = question.target if self._asked.targeted else self._asked.attack.target
        inputs = self._subject.inputs(question)
        text, ids, _ = self._subject.answer(inputs, self._length)
        standing = self._rules.standing(question.text, target=target, right=question.right, clean=text)
        right = not question.right or self._rules.is_right(text, question.right)
        answer = goal(self._subject.tokenizer, inputs, ids, target=target, label=question.label, clean_is_right=right)
        settings = dataclasses.replace(self._asked.attack, target=target)
        waiting = {
            key: value.cpu() if isinstance(value, torch.Tensor) else value
            for key, value in inputs.items()
            if key != CLIPS  # the sounds once more, which are read again
        }
        sounds = self._subject.sounds(question)
        sizes = (*(image.size for image in question.images), *((len(sound.samples),) for sound in sounds))
        notes = tuple(", ".join(sound.notes) for sound in sounds)
        bare = dataclasses.replace(question, images=(), sounds=())
        if answer is None or too_faint(sounds, settings.snr):
            reason = EMPTY_ANSWER if answer is None else TOO_FAINT
            return Prepared(number, bare, standing._replace(counted=False), None, sizes, notes, reason)
        return Prepared(number, bare, standing, Job(settings, (), waiting, answer), sizes, notes)

    def _check_medium(self, question: Question) -> None:
        """Nothing is answered first that could not be attacked then."""
        if question.images and question.sounds:
            raise ConfigError(
                f"question {question.id!r} has pictures and sounds; expected one of the two to attack. Leave one out, such as with "
                "--column images=none"
            )
        self._asked.attack.check_medium(SOUNDS if question.sounds else PICTURES)

    # -- crafting ------------------------------------------------------------------------------------------------------

    def _crafted(self, alike: list[Prepared]) -> Iterator[dict[str, Any]]:
        while alike:
            batch = alike[: self._size]
            entries = self._craft([self._whole(one) for one in batch])
            if entries is None:
                continue
            for one, entry in zip(batch, entries, strict=True):
                yield self._record(one, entry)
            alike = alike[len(batch) :]

    def _whole(self, one: Prepared) -> Job:
        assert one.job is not None
        inputs = {
            key: value.to(self._subject.device) if isinstance(value, torch.Tensor) else value
            for key, value in one.job.inputs.items()
        }
        question = self._questions[one.number]
        return dataclasses.replace(
            one.job, images=question.images, sounds=self._subject.sounds(question), inputs=inputs
        )

    def _craft(self, jobs: list[Job]) -> list[Entry] | None:
        """The entries of one batch; None when memory was short and the next batch is to be smaller."""
        from accelerate.utils import release_memory
        from accelerate.utils.memory import should_reduce_batch_size

        try:
            return self._crafter.craft(jobs)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(jobs) == 1:
                raise AttackError(
                    f"one request does not fit into memory ({str(error).splitlines()[0]}); expected a smaller model or dtype, or "
                    "fewer eot draws or restarts"
                ) from error
        release_memory()
        self._size = max(1, min(self._size, len(jobs)) // 2)
        log.warning("out of memory; going on with batches of %d requests", self._size)
        return None

    # -- records -------------------------------------------------------------------------------------------------------

    def _record(self, one: Prepared, entry: Entry) -> dict[str, Any]:
        made = {
            "attacked": True,
            "reason": None,
            "images": self._store.put_images(one.question.id, entry.images),
            "sounds": self._store.put_sounds(one.question.id, entry.sounds),
            "attack": entry.record["attack"],
            "attack_key": entry.key,
            **{key: entry.record[key] for key in ("linf", "l2", "rendering_gap", "objective")},
            "snr_db": entry.record.get("snr_db", []),
        }
        return self._answered(one, made) | {"crafting_seconds": entry.record["seconds"]}

    def _left_out(self, one: Prepared) -> dict[str, Any]:
        """The sample with its own pictures or sounds, so that the data set is whole; it is in no rate."""
        question = self._questions[one.number]
        clean = [np.asarray(image) for image in question.images]
        made = {
            "attacked": False,
            "reason": one.reason,
            "images": self._store.put_images(one.question.id, clean),
            "sounds": self._store.put_sounds(one.question.id, self._subject.sounds(question)),
            "attack": dataclasses.replace(self._asked.attack, target=one.standing.target).to_dict(),
            "attack_key": None,
            "linf": 0.0, "l2": 0.0, "rendering_gap": None, "objective": [], "snr_db": [None] * len(question.sounds),
        }  # fmt: skip
        return self._answered(one, made)

    def _answered(self, one: Prepared, made: dict[str, Any]) -> dict[str, Any]:
        """Answers to the images and sounds as they can be read back, through the ordinary path."""
        question, before = one.question, one.standing
        pictures = tuple(Image.open(self._store.root / image["file"]).convert("RGB") for image in made["images"])
        sounds = tuple(sound_of(sound["file"], self._store.root) for sound in made["sounds"])
        inputs = self._subject.inputs(dataclasses.replace(question, images=pictures, sounds=sounds))
        answer = self._subject.answer(inputs, self._length).text
        record = {
            "id": question.id,
            "digest": self._questions.digests[one.number],
            "question": question.text,
            "label": question.label,
            "accepted": list(question.accepted),
            "target": before.target,
            "group": question.group,
            "sound_notes": list(one.notes),
            "clean_answer": before.clean,
            "adversarial_answer": answer,
            "rule": before.rule,
            "counted": before.counted,
            "clean_verdict": before.verdict,
            **self._rules.outcome(before, answer)._asdict(),
            **made,
        }
        if self._asked.defense is not None:
            with _naming(question.id):
                reply = self._subject.answer(inputs, self._length, self._asked.defense)
            record["defended_answer"] = reply.text
            outcome = self._rules.outcome(before, reply.text)._asdict()
            record |= {f"defended_{name}": value for name, value in outcome.items()}
            for field in ("agreement", "suspicion", "suspected", "num_samples_used"):
                record[f"defended_{field}"] = getattr(reply.verdict, field, None)
        return record


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Whatever stands in a question's way is said with its id; what `Subject` refuses has it already."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise AttackError(
            f"question {name!r} cannot be answered ({explain(error)}); expected a whole picture or sound that the model takes. Mend it, "
            "or take it out"
        ) from error


def _likeness(one: Prepared) -> str:
    """Equal for what can share a batch, see `Crafter`."""
    assert one.job is not None
    shapes = sorted((k, tuple(v.shape)) for k, v in one.job.inputs.items() if isinstance(v, torch.Tensor))
    return repr((one.standing.target, one.sizes, len(one.job.answer), shapes))
