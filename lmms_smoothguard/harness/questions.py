"""Questions by whatever a user names: a path, a task of lmms-eval, a data set on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.questions import Questions, load_questions


def find_questions(
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    question: str | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> Questions:
    """As `load_questions`; a name that is no path here and has no slash may also be a task of lmms-eval.

    A task has its own split, texts and columns: saying them again is a ConfigError.
    """
    if "/" not in source and not Path(source).expanduser().exists():
        from lmms_smoothguard.harness.lmms_eval import questions as tasks

        if tasks.is_task(source):
            given = {"split": split, "question": question, "columns": columns}
            if said := [name for name, value in given.items() if value]:
                raise ConfigError(
                    f"{source!r} is a task of lmms-eval, which has its own {said[0]}; expected none beside it"
                )
            return tasks.load_task(source, limit=limit)
    return load_questions(source, split=split, limit=limit, question=question, columns=columns)
