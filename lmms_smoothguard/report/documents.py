"""The documents behind a samples log: the embedded scenes that our tasks ask about."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.runs import Sample
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path

_DATA = {"shapes_pope": "pope", "shapes_pope_faint": "pope_faint", "shapes_caption": "caption"}


def is_embedded(task: str) -> bool:
    """Whether a task asks about scenes that the package ships."""
    return _base(task) in _DATA


def _base(task: str) -> str:
    """`shapes_pope` of `shapes_pope_pgd`, and so of every attacked twin."""
    return max((name for name in _DATA if task == name or task.startswith(f"{name}_")), key=len, default=task)


@functools.cache
def documents(task: str, with_images: bool = False) -> Mapping[str, Mapping[str, Any]]:
    """The documents of an embedded task, or of its attacked twin `<task>_<attack>`, by question id.

    `image` is there only if `with_images`, as {"bytes": PNG}. Raises SmoothGuardError for a task without embedded data.
    """
    name = _base(task)
    if name not in _DATA:
        raise SmoothGuardError(f"{task} has no embedded documents; expected one of: {', '.join(_DATA)}")
    import pyarrow.parquet as parquet

    path = tasks_path() / "shapes" / "data" / f"{_DATA[name]}.parquet"
    columns = [c for c in parquet.read_schema(path).names if with_images or c != "image"]
    rows = parquet.read_table(path, columns=columns).to_pylist()
    return MappingProxyType({str(row["question_id"]): row for row in rows})


def document_of(task: str, sample: Sample, with_images: bool = False) -> Mapping[str, Any]:
    """The document a sample was asked about. Raises SmoothGuardError where the log and the data do not belong together."""
    found = documents(task, with_images).get(sample.question_id)
    if found is None or (sample.question and sample.question.strip() != str(found["question"]).strip()):
        asked = "no such question" if found is None else repr(found["question"])
        raise SmoothGuardError(
            f"{task}[{sample.question_id}] asked {sample.question!r} in the log, but the data have {asked}; the data have "
            "changed since the run, so run it again"
        )
    return found


def scenes_of(task: str, samples: Sequence[Sample]) -> list[str]:
    """The scene each sample is about."""
    return [str(document_of(task, sample)["image_source"]) for sample in samples]
