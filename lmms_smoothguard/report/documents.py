"""The documents behind a samples log: the embedded scenes and recordings that our tasks ask about."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.runs import Sample
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path

_KINDS = ("pope", "pope_faint", "caption", "safety")
_DATA = {f"{folder}_{kind}": (folder, kind) for folder in ("shapes", "sounds") for kind in _KINDS}
_MEDIA = ("image", "audio")


def is_embedded(task: str) -> bool:
    """Whether a task asks about scenes or recordings that the package ships."""
    return base_task(task) in _DATA


def base_task(task: str) -> str:
    """`shapes_pope` of `shapes_pope`, `shapes_pope_pgd`, `shapes_pope_square` and every other attacked twin; a task about other
    data than the package's as it is."""
    return max((name for name in _DATA if task == name or task.startswith(f"{name}_")), key=len, default=task)


@functools.cache
def documents(task: str, with_media: bool = False) -> Mapping[str, Mapping[str, Any]]:
    """The documents of an embedded task, or of its attacked twin `<task>_<attack>`, by question id.

    `image` or `audio` is there only if `with_media`, as {"bytes": PNG or WAV}. Raises SmoothGuardError for a task without embedded data.
    """
    name = base_task(task)
    if name not in _DATA:
        raise SmoothGuardError(f"{task} has no embedded documents; expected one of: {', '.join(_DATA)}")
    import pyarrow.parquet as parquet

    folder, kind = _DATA[name]
    path = tasks_path() / folder / "data" / f"{kind}.parquet"
    columns = [c for c in parquet.read_schema(path).names if with_media or c not in _MEDIA]
    rows = parquet.read_table(path, columns=columns).to_pylist()
    return MappingProxyType({str(row["question_id"]): row for row in rows})


def document_of(task: str, sample: Sample, with_media: bool = False) -> Mapping[str, Any]:
    """The document a sample was asked about. Raises SmoothGuardError where the log and the data do not belong together."""
    found = documents(task, with_media).get(sample.question_id)
    if found is None or (sample.question and sample.question.strip() != str(found["question"]).strip()):
        asked = "no such question" if found is None else repr(found["question"])
        raise SmoothGuardError(
            f"{task}[{sample.question_id}] asked {sample.question!r} in the log, but the data have {asked}; the data have "
            "changed since the run, so run it again"
        )
    return found


def scenes_of(task: str, samples: Sequence[Sample]) -> list[str | None]:
    """The scene or recording each sample is about; None of one left out of an attack, whose question no score names."""
    known = documents(task)
    nameless = [sample.left_out is not None and sample.question_id not in known for sample in samples]
    return [
        None if unknown else _source(document_of(task, sample))
        for sample, unknown in zip(samples, nameless, strict=True)
    ]


def _source(document: Mapping[str, Any]) -> str:
    return str(next(document[name] for name in ("image_source", "audio_source") if name in document))
