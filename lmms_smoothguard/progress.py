"""Progress of a training on a terminal: a bar a stage, with what its last step said."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lmms_smoothguard.errors import SmoothGuardError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


def console() -> Console:
    """Where a training speaks. Raises SmoothGuardError where rich is not installed."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise SmoothGuardError(
            "training shows its progress with rich; pip install 'lmms-smoothguard[training]'"
        ) from error
    return Console()


class Bars:
    """A bar for every stage."""

    def __init__(self, progress: Progress, rows: Sequence[TaskID]) -> None:
        self._progress, self._rows = progress, rows

    def show(self, stage: int, done: int, said: str) -> None:
        """`done` steps of a stage; `said` is shown at every tenth, where it can be read."""
        self._progress.update(self._rows[stage], completed=done, said=said if done % 10 == 1 else None)


@contextlib.contextmanager
def training_bars(where: Console, stages: Sequence[tuple[str, int]], stage: int, step: int) -> Iterator[Bars]:
    """stages: (name, steps); stage, step: where the training begins, all stages before being done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=where) as progress:
        done = [steps if place < stage else step if place == stage else 0 for place, (_, steps) in enumerate(stages)]
        rows = [
            progress.add_task(name, total=steps, completed=begun, said="")
            for (name, steps), begun in zip(stages, done, strict=True)
        ]
        yield Bars(progress, rows)
