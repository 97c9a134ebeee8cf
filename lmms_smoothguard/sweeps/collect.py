"""Asks a model everything that a grid needs, once: clean answers, adversarial pictures, answers of noisy copies."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.attacks.cache import AttackCache, Entry
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.goals import goal
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.sound_clips import TOO_FAINT, too_faint
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.pope import yes_or_no
from lmms_smoothguard.evaluation.questions import Question, Questions, Words
from lmms_smoothguard.subject import GREEDY, Subject
from lmms_smoothguard.sweeps.answers import AnswerCache, Answerer, Ids
from lmms_smoothguard.sweeps.grid import Condition, Grid
from lmms_smoothguard.sweeps.noises import Noise

_AT_ONCE = 256
"""Questions whose pictures are held in memory together."""
QUIET = Noise(0.0, "pixel", 0)
"""No noise: the undefended answer."""


class Cell(NamedTuple):
    """What one question got under one condition and noise: the answer to the unperturbed input, and those of the noisy
    copies 1, 2, ...; `attack`: the adversarial picture's or sound's entry without its media, which many cells would not fit into memory
    with; None for a clean picture; left_out: why it is in no rate under attack though its clean answer is right, if so."""

    plain: Ids
    noisy: tuple[Ids, ...]
    attack: Entry | None
    left_out: str | None = None


@dataclass
class Answers:
    """words: the questions; clean: the undefended answers to them; cells: by condition and noise, one a question;
    answered: copies that had to be answered because no cache had them."""

    words: Sequence[Words]
    clean: list[Ids] = field(default_factory=list)
    cells: dict[tuple[str, Noise], list[Cell]] = field(default_factory=lambda: defaultdict(list))
    answered: int = 0


def is_right(answer: str, label: str) -> bool:
    """Whether an answer is the right one: of a yes / no question by its first word, else as a vote compares answers."""
    if normalize_answer(label) in ("yes", "no"):
        return yes_or_no(answer) is yes_or_no(label)
    return normalize_answer(answer) == normalize_answer(label)


class _Asked(NamedTuple):
    question: Question
    inputs: dict[str, Any]
    clean: Ids


class Collector:
    """Fills `Answers` for one model and one grid; whatever a cache has is not computed again."""

    def __init__(
        self,
        subject: Subject,
        grid: Grid,
        cache: Path,
        *,
        max_new_tokens: int,
        batch_size: int = 32,
        quiet: bool = False,
    ) -> None:
        """cache: for adversarial pictures (`attacks`) and answers (`answers`); batch_size: rows of the model at once, EOT's draws counted,
        while pictures are crafted."""
        self._subject, self._grid, self._quiet, self._batch_size = subject, grid, quiet, batch_size
        self._attacks = AttackCache(cache / "attacks")
        self._answerer = Answerer(subject.model, subject.processor, AnswerCache(cache / "answers"))
        self._settings = {**GREEDY, "max_new_tokens": max_new_tokens}
        self._crafters: dict[Noise | None, Crafter] = {}

    def texts(self, answers: Sequence[Ids]) -> list[str]:
        """See `Answerer.texts`."""
        return self._answerer.texts(answers)

    def collect(self, questions: Questions, numbers: Sequence[int] | None = None) -> Answers:
        """Everything, question by question; of these numbers alone where they are given. Raises ConfigError for questions without a
        right answer."""
        _check(questions)
        from tqdm import tqdm

        numbers, before = range(len(questions)) if numbers is None else numbers, self._answerer.answered
        found, passes = Answers([questions.words[number] for number in numbers]), self._passes()
        total = len(numbers) * len(passes)
        with tqdm(total=total, desc="answering copies", unit="request", disable=self._quiet) as bar:
            for start in range(0, len(numbers), _AT_ONCE):
                asked = [self._ask(questions[number]) for number in numbers[start : start + _AT_ONCE]]
                found.clean += [part.clean for part in asked]
                for condition, noise in passes:
                    found.cells[condition.name, noise] += self._cells(asked, condition, noise, bar)
        found.answered = self._answerer.answered - before
        return found

    def _passes(self) -> list[tuple[Condition, Noise]]:
        """Conditions and noises, those that share adversarial pictures after one another."""
        noises = [Noise(sigma, space, seed) for space, sigma in self._grid.noises() for seed in self._grid.seeds]
        quiet = [QUIET] if 0.0 in self._grid.sigmas else []
        return [(condition, noise) for condition in self._grid.conditions for noise in [*quiet, *noises]]

    def _ask(self, question: Question) -> _Asked:
        inputs = self._subject.inputs(question)
        return _Asked(question, inputs, self._answerer.clean({**inputs, **self._settings}))

    def _cells(self, asked: Sequence[_Asked], condition: Condition, noise: Noise, bar: Any) -> Iterator[Cell]:
        attack = condition.at(noise.sigma)
        entries = {} if attack is None else self._craft(asked, attack, noise)
        for number, part in enumerate(asked):
            inputs, entry = part.inputs, entries.get(number)
            if entry is not None:
                pictures = tuple(Image.fromarray(image) for image in entry.images)
                attacked = dataclasses.replace(part.question, images=pictures, sounds=entry.sounds)
                inputs = self._subject.inputs(attacked)
            arguments = {**inputs, **self._settings}
            plain = self._answerer.clean(arguments)
            copies = self._answerer.noisy(arguments, noise, self._grid.copies()) if noise.sigma else []
            bar.update()
            snr = None if attack is None else attack.snr
            faint = snr is not None and too_faint(self._subject.sounds(part.question), snr)
            kept = None if entry is None else entry._replace(images=(), sounds=())
            yield Cell(plain, tuple(copies), kept, TOO_FAINT if faint else None)

    def _craft(self, asked: Sequence[_Asked], attack: AttackSettings, noise: Noise) -> dict[int, Entry]:
        """Adversarial pictures by the question's place: one set an attack; with EOT one for each noise that the attacker averages
        over. A question whose clean answer is empty has none: there is nothing to lead away from, and it is in no ASR; nor has one whose
        sounds are too faint for a budget in decibels."""
        key = noise._replace(seed=0) if attack.eot else None
        if key not in self._crafters:
            defense = Choice("smoothguard", noise.config) if attack.eot else None
            self._crafters[key] = Crafter(
                self._subject.model, self._subject.processor, self._attacks, defense, self._batch_size, self._quiet
            )
        jobs = {number: job for number, part in enumerate(asked) if (job := self._job(part, attack)) is not None}
        return dict(zip(jobs, self._crafters[key].craft(list(jobs.values())), strict=True))

    def _job(self, part: _Asked, attack: AttackSettings) -> Job | None:
        label = part.question.label
        (said,) = self._answerer.texts([part.clean])
        answer = goal(
            self._subject.tokenizer,
            part.inputs,
            part.clean,
            target=attack.target,
            label=label,
            clean_is_right=label is None or is_right(said, label),
        )
        sounds = self._subject.sounds(part.question)
        if answer is None or too_faint(sounds, attack.snr):
            return None
        return Job(attack, part.question.images, part.inputs, answer, sounds)


def _check(questions: Questions) -> None:
    without = [words.id for words in questions.words if words.label is None]
    if without:
        raise ConfigError(
            f"{len(without)} questions of {questions.source} have no right answer, the first: {', '.join(without[:5])}; "
            "expected one for each, in a column such as answer (--columns label=NAME)"
        )
    several = [words.id for words in questions.words if words.accepted]
    if several:
        raise ConfigError(
            f"{len(several)} questions of {questions.source} have several right answers, the first: {', '.join(several[:5])}; "
            "expected one for each: a sweep counts a copy's answer as right or wrong by its label alone"
        )
