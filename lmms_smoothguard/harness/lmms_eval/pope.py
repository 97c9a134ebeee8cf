"""POPE's scores under attack: right is what upstream's own scorer calls right, on the clean twin, clean and attacked alike.

Upstream takes exactly `yes` and `no`, in any case: "Yes." is wrong. So accuracy under attack compares with upstream's own, and
a model that never answers in the bare word has no sample that `asr` could be over: it is NaN, with a warning that says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_smoothguard.evaluation.pope import yes_or_no
from lmms_smoothguard.harness import scoring


def pope_attacked_scores(doc: Any, answer: str) -> dict[str, Any]:
    """Upstream's five and the rates under attack for one sample; nothing for one left out.

    Raises SmoothGuardError for a sample that was never attacked.
    """
    from lmms_eval.tasks.pope.utils import pope_process_results

    def scored(text: str) -> dict[str, Any]:
        found: dict[str, Any] = pope_process_results(doc, [text])
        return found

    rates = scoring.attack_scores(doc, answer, lambda text: scored(text)["pope_accuracy"]["score"] == 1)
    return scored(answer) | rates if rates else {}


def pope_asr(outcomes: Sequence[dict[str, Any]]) -> float:
    """`scoring.asr`; warns where it is over nothing because of how the model words its answers."""
    clean = [o["clean_answer"] for o in outcomes]
    wordy = [text for text in clean if yes_or_no(text) is not None and text.strip().casefold() not in ("yes", "no")]
    if wordy and scoring.asr_count(outcomes) == 0:
        from loguru import logger

        logger.warning(
            "asr is over no sample: the model's answers are not literally yes / no (such as {!r}), which is what upstream's POPE "
            "scorer calls right; expected the bare word. Ask for it in the prompt, or give the task a filter that takes it out.",
            wordy[0],
        )
    return scoring.asr(outcomes)
