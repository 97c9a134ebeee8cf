"""One run of `smoothguard attack`: what is asked, what must not change between its parts, who does what."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_smoothguard.attacking.identity import described, versions
from lmms_smoothguard.attacking.outcomes import Rules
from lmms_smoothguard.attacking.processes import Processes
from lmms_smoothguard.attacking.store import Store
from lmms_smoothguard.attacks.cache import default_cache_dir
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.questions import Questions
from lmms_smoothguard.evaluation.tables import refuse_inside

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackRun:
    """What a user asks for.

    model: a hub id, a directory or tiny-llava; data: whatever `find_questions` takes, with split, limit, question and columns;
    targeted: every question has a target of its own; attack: its settings; defense: what EOT averages over, and what answers
    the adversarial images a second time; max_new_tokens: None = the data's own, else 32; judge, match: see `Rules`;
    batch_size: rows of the model at once in crafting, EOT's draws and restarts counted; cache: of adversarial images.
    """

    model: str
    data: str
    out: Path
    attack: AttackSettings
    defense: Choice | None = None
    split: str | None = None
    limit: int | None = None
    question: str | None = None
    columns: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    targeted: bool = False
    max_new_tokens: int | None = None
    match: str = "exact"
    judge: str | None = None
    batch_size: int = 32
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        for field in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{field} is {value!r}; expected a whole number of at least 1")
        if self.attack.name == "universal":
            raise ConfigError(
                "attack is 'universal', one change for all images, which `smoothguard attack` cannot share out; expected an attack "
                "on each image, such as pgd"
            )
        if self.targeted and self.attack.target is not None:
            raise ConfigError(
                f"target is {self.attack.target!r}, and every question was to have its own; expected one of the two"
            )
        if self.attack.eot and self.defense is None:
            raise ConfigError(
                f"eot is {self.attack.eot}, an average over a defence's randomness, and there is no defence; expected one, such "
                "as --defense smoothguard"
            )


def run_attack(asked: AttackRun) -> dict[str, Any] | None:
    """Crafts, answers and writes all samples that are not done yet. The summary, in the main process; None in others.

    Raises SmoothGuardError for whatever cannot be meant, loaded or written.
    """
    cache = asked.cache or default_cache_dir() / "attacks"
    refuse_inside(asked.data, {"out": asked.out, "cache": cache})
    rules = Rules(asked.match, asked.judge)
    store = Store(asked.out)
    processes = Processes()

    from lmms_smoothguard.attacking.share import Share
    from lmms_smoothguard.attacking.summary import write_results
    from lmms_smoothguard.harness.questions import find_questions
    from lmms_smoothguard.subject import Subject

    with processes.main_first():
        questions = find_questions(
            asked.data, split=asked.split, limit=asked.limit, question=asked.question, columns=asked.columns
        )
    if asked.targeted:
        _check_targets(questions)
    asked = dataclasses.replace(
        asked,
        cache=cache,
        max_new_tokens=asked.max_new_tokens or questions.max_new_tokens or MAX_NEW_TOKENS,
    )
    subject = Subject(
        asked.model, processes.device(asked.device), asked.dtype, trust_remote_code=asked.trust_remote_code
    )
    settings = described(asked, subject, questions, rules.judge)
    with processes.main_first():
        store.open(settings, questions.ids, versions())
        if processes.main:
            store.sweep_up()
    Share(asked, subject, questions, rules, store, quiet=not processes.main).work(processes.share(len(questions)))
    processes.wait()
    summary = write_results(store, settings, questions) if processes.main else None
    processes.wait()
    processes.end()
    return summary


def _check_targets(questions: Questions) -> None:
    without = [words.id for words in questions.words if not words.target]
    if without:
        raise ConfigError(
            f"{questions.source} has no target for {', '.join(without[:10])}; expected one for each question with --targeted, "
            "or one --target for all"
        )
