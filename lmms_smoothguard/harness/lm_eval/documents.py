"""The functions that our tasks for lm-eval name: data, prompts, pictures, scores. Importing them registers our model, since
lm-eval's stock command imports the functions of a task that is given by its path before it looks for a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_smoothguard.evaluation.pope import exact_yes_or_no
from lmms_smoothguard.harness import scoring
from lmms_smoothguard.harness.lm_eval import registering
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path

registering.register()

asr, asr_low, asr_high, asr_count = scoring.asr, scoring.asr_low, scoring.asr_high, scoring.asr_count
recovery = scoring.recovered


def embedded(file: str, **_: Any) -> Any:
    """One of the package's own data files, wherever it is installed."""
    import datasets

    return datasets.load_dataset("parquet", data_files={"test": str(tasks_path() / "shapes" / "data" / file)})


def image(doc: Mapping[str, Any]) -> list[Any]:
    """The document's picture."""
    return [doc["image"].convert("RGB")]


def question(doc: Mapping[str, Any]) -> str:
    """lm-eval's placeholder, then the question."""
    return f"<image>{doc['question']}"


def question_in_a_word(doc: Mapping[str, Any]) -> str:
    """The question as lmms-eval's POPE asks it."""
    return f"<image>{doc['question'].strip()}\nAnswer the question using a single word or phrase."


def pope(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Right is exactly yes or no, in any case, as in lmms-eval's POPE."""
    right = exact_yes_or_no(results[0]) == exact_yes_or_no(doc["answer"])
    return {"pope_accuracy": float(right), "pope_yes_ratio": float(exact_yes_or_no(results[0]) is True)}


def pope_attacked(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """With the rates under attack; nothing for a sample that was left out."""
    rates = scoring.attack_scores(doc, results[0], lambda answer: pope(doc, [answer])["pope_accuracy"] == 1)
    return pope(doc, results) | rates if rates else {}


def caption(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Exact match, and F1 over the named objects."""
    return dict(scoring.caption_scores(doc, results[0]))


def caption_attacked(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """With the rates under attack; nothing for a sample that was left out."""
    rates = scoring.attack_scores(doc, results[0], lambda answer: scoring.same_answer(answer, doc["caption"]))
    return caption(doc, results) | rates if rates else {}
