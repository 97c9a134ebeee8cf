"""Tables of experiments: on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.records import Record
from lmms_smoothguard.report.experiments import CLEAN

HEADINGS = (
    "defence",
    "attack",
    "n",
    "clean accuracy",
    "accuracy under attack",
    "ASR",
    "agreement",
    "copies",
    "s / answer",
    "x plain",
)


def print_table(records: Sequence[Record]) -> None:
    """The table, on a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="The embedded model under attack",
        caption="brackets: 95 % intervals, Wilson's for ASR and accuracy, Student's for means",
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for cells in table_rows(records):
        table.add_row(*cells)
    console = Console()
    Console(width=max(console.width, 150)).print(table)


def table_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The cells of the table, one row a run. Times are compared with the undefended run of the same questions."""
    plain = {_task_note(record): _seconds(record) for record in records if record.defense is None}
    if (first := next((record for record in records if record.name == "plain"), None)) is not None:
        plain[_task_note(first)] = _seconds(first)  # not the one at another budget
    return [_row(record, plain) for record in records]


def _row(record: Record, plain: Mapping[str, float]) -> tuple[str, ...]:
    clean = next((task.figures for task in record.tasks.values() if task.attack is None), None)
    attacked = next((task for task in record.tasks.values() if task.attack is not None), None)
    under = attacked.figures if attacked is not None else None
    either = under or clean or {}
    note, seconds = _task_note(record), _seconds(record)
    copies = [_mean(figures["copies"], ".3g") for figures in (clean, under) if figures and "copies" in figures]
    return (
        record.about + note,
        "-" if attacked is None or attacked.attack is None else attack_name(attacked.attack.settings),
        _count(either),
        "-" if clean is None else _percent(clean["accuracy"]),
        "-" if under is None else _percent(under["accuracy"]),
        "-" if under is None else _percent(under["asr"]),
        _mean(either["agreement"], ".2f") if "agreement" in either else "-",
        " / ".join(copies) or "-",
        f"{seconds:.3f}",
        f"{seconds / plain[note]:.1f}" if note in plain else "-",
    )


def _count(figures: Mapping[str, Figure]) -> str:
    """The samples, and where ASR leaves out those that are wrong when clean: `145 of 150`."""
    samples = figures["accuracy"].count
    counted = figures.get("asr", figures["accuracy"]).count
    return str(samples) if counted == samples else f"{counted} of {samples}"


def _task_note(record: Record) -> str:
    first = next(iter(record.tasks)).removesuffix("_pgd")
    return {CLEAN: "", "shapes_pope_faint": " (faint scenes)", "shapes_caption": " (captions)"}.get(
        first, f" ({first})"
    )


def attack_name(settings: Mapping[str, Any]) -> str:
    """`PGD-40, 4/255`, with EOT's draws; `L2 0.5` for a budget in L2."""
    draws = f", EOT {settings['eot']}" if settings["eot"] else ""
    eps = settings["eps"]
    budget = f"{eps * 255:g}/255" if settings["norm"] == "linf" else f"{settings['norm'].upper()} {eps:g}"
    return f"{settings['name'].upper()}-{settings['steps']}{draws}, {budget}"


def _seconds(record: Record) -> float:
    times = [task.figures["seconds_per_answer"].value for task in record.tasks.values()]
    return fmean(time for time in times if time is not None)


def _mean(found: Figure, form: str) -> str:
    """A mean with its interval; alone where all values are one, or there is but one."""
    if found.value is None or found.low is None or found.high is None:
        return "-" if found.value is None else format(found.value, form)
    value, low, high = (format(end, form) for end in (found.value, found.low, found.high))
    return value if found.low == found.high else f"{value} ({low}-{high})"


def _percent(found: Figure) -> str:
    if found.value is None or found.low is None or found.high is None:
        return "-"
    return f"{100 * found.value:.1f} % ({100 * found.low:.1f}-{100 * found.high:.1f})"


def markdown_table(records: Sequence[Record]) -> str:
    """The same table in Markdown, without the times: runs minutes apart are no measurement of cost."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *table_rows(records)]
    return "\n".join("| " + " | ".join(cells[:-2]) + " |" for cells in lines)
