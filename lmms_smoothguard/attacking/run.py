"""One run of `smoothguard attack`: what is asked, what must not change between its parts, who does what."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmms_smoothguard.attacking.asked import AttackRun
from lmms_smoothguard.attacking.identity import described, versions
from lmms_smoothguard.attacking.outcomes import Rules
from lmms_smoothguard.attacking.store import Store
from lmms_smoothguard.attacks.cache import default_cache_dir
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import AttackError, ConfigError, SmoothGuardError
from lmms_smoothguard.evaluation.questions import Questions
from lmms_smoothguard.evaluation.tables import refuse_inside
from lmms_smoothguard.processes import Processes

MAX_NEW_TOKENS = 32
_SHOWN = 10
_OF_PICTURES = ("sigma", "noise_space")
"""What SmoothGuard's noise on pictures hangs on, and that on sounds does not."""


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
    _check_noise(asked, questions)
    asked = dataclasses.replace(
        asked,
        cache=cache,
        max_new_tokens=asked.max_new_tokens or questions.max_new_tokens or MAX_NEW_TOKENS,
    )
    subject = Subject(
        asked.model,
        processes.device(asked.device),
        asked.dtype,
        trust_remote_code=asked.trust_remote_code,
        vision_tower=asked.vision_tower,
        vision_tower_resolution=asked.vision_tower_resolution,
    )
    settings = described(asked, subject, questions, rules.judge)
    with processes.main_first():
        store.open(settings, questions.ids, versions())
        if processes.main:
            store.sweep_up()
    share = Share(asked, subject, questions, rules, store, quiet=not processes.main)
    failed = share.work(processes.share(len(questions)))
    processes.wait()
    if failed:
        raise _unanswered(failed, store) from failed[0]
    summary = write_results(store, settings, questions) if processes.main else None
    processes.wait()
    processes.end()
    return summary


def _unanswered(failed: list[SmoothGuardError], store: Store) -> AttackError:
    more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    return AttackError(
        f"{len(failed)} samples could not be answered: {'; '.join(map(str, failed[:_SHOWN]))}{more}. The others are done and kept in "
        f"{store.root}. Mend or remove these files and start again with another --out: what is crafted is in the cache"
    )


def _check_targets(questions: Questions) -> None:
    without = [words.id for words in questions.words if not words.target]
    if without:
        raise ConfigError(
            f"{questions.source} has no target for {', '.join(without[:10])}; expected one for each question with --targeted, "
            "or one --target for all"
        )


def _check_noise(asked: AttackRun, questions: Questions) -> None:
    """Noise that was asked for and never acts is refused, for the run's settings would name it."""
    config = None if asked.defense is None else asked.defense.config
    named = [field for field in _OF_PICTURES if field in asked.defense_given]
    if not named or not isinstance(config, SmoothGuardConfig) or not questions.heard:
        return
    if all(question.sounds and not question.images for question in questions):
        raise ConfigError(
            f"--{named[0].replace('_', '-')} is {getattr(config, named[0])}, of noise on pictures, and all questions of "
            f"{questions.source} have sounds alone; expected the size of noise on sounds, such as --defense-set audio_sigma=0.02 "
            "(amplitude, full scale 1) or --defense-set audio_snr=20 (dB)"
        )
