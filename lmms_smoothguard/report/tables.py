"""Tables of experiments: on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.records import Record, TaskRecord
from lmms_smoothguard.evaluation.titles import attack_title
from lmms_smoothguard.report.documents import base_task, is_embedded
from lmms_smoothguard.report.experiments import HEARING, SEEING

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
        "-" if attacked is None or attacked.attack is None else attack_title(attacked.attack.settings),
        _count(either),
        *(_percent(figures, name) for figures, name in ((clean, "accuracy"), (under, "accuracy"), (under, "asr"))),
        _mean(either["agreement"], ".2f") if "agreement" in either else "-",
        " / ".join(copies) or "-",
        f"{seconds:.3f}",
        f"{seconds / plain[note]:.1f}" if note in plain else "-",
    )


def _count(figures: Mapping[str, Figure]) -> str:
    """The samples, and where ASR leaves out those that are wrong when clean: `145 of 150`. A task without right answers has
    judged or changed ones."""
    counts = [figures[name].count for name in ("accuracy", "unsafe_rate", "recovery", "asr") if name in figures]
    if not counts:
        return "-"
    return str(counts[0]) if counts[-1] == counts[0] or "asr" not in figures else f"{counts[-1]} of {counts[0]}"


def _task_note(record: Record) -> str:
    """What the questions are, the demo's unsaid. A clean task and its attacked twins have one note, so that their times can be
    compared."""
    first, stored = next(iter(record.tasks.items()))
    base = base_task(first)
    if not is_embedded(first) and stored.attack is not None:
        ends = (stored.attack.settings["name"], *(["eot"] if stored.attack.adaptive else []))
        base = next((first.removesuffix(f"_{end}") for end in ends if first.endswith(f"_{end}")), first)
    notes = {
        SEEING.clean: "",
        HEARING.clean: "",
        "shapes_pope_faint": " (faint scenes)",
        "sounds_pope_faint": " (faint sounds)",
        "shapes_caption": " (captions)",
        "sounds_caption": " (captions)",
        "shapes_safety": " (requests)",
        "sounds_safety": " (requests)",
    }
    return notes.get(base, f" ({base})")


def _seconds(record: Record) -> float:
    times = [task.figures["seconds_per_answer"].value for task in record.tasks.values()]
    return fmean(time for time in times if time is not None)


def _mean(found: Figure, form: str) -> str:
    """A mean with its interval; alone where all values are one, or there is but one."""
    if found.value is None or found.low is None or found.high is None:
        return "-" if found.value is None else format(found.value, form)
    value, low, high = (format(end, form) for end in (found.value, found.low, found.high))
    return value if found.low == found.high else f"{value} ({low}-{high})"


def _percent(figures: Mapping[str, Figure] | None, name: str) -> str:
    found = None if figures is None else figures.get(name)
    if found is None or found.value is None or found.low is None or found.high is None:
        return "-"
    return f"{100 * found.value:.1f} % ({100 * found.low:.1f}-{100 * found.high:.1f})"


def markdown_table(records: Sequence[Record]) -> str:
    """The same table in Markdown, without the times: runs minutes apart are no measurement of cost."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *table_rows(records)]
    return "\n".join("| " + " | ".join(cells[:-2]) + " |" for cells in lines)


def attacks_table(rows: Sequence[tuple[Record, Record | None, Record | None]]) -> str:
    """Every attack's ASR in Markdown: undefended, against the defence, and crafted through the defence."""
    heads = ("attack", "ASR, undefended", "ASR, SmoothGuard", "ASR, SmoothGuard, adaptive attack")
    lines: list[tuple[str, ...]] = [heads, ("---",) * len(heads)]
    for row in rows:
        attacked = [None if record is None else _attacked(record) for record in row]
        first = attacked[0]
        assert first is not None and first.attack is not None
        lines.append((attack_title(first.attack.settings) + _task_note(row[0]), *map(_asr, attacked)))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _attacked(record: Record) -> TaskRecord:
    return next(task for task in record.tasks.values() if task.attack is not None)


def _asr(task: TaskRecord | None) -> str:
    """With its count, and the steps of an attack that needs its own to go through the defence."""
    if task is None or task.attack is None:
        return "-"
    steps = f", {task.attack.settings['steps']} steps" if task.attack.adaptive else ""
    return f"{_percent(task.figures, 'asr')}, n = {task.figures['asr'].count}{steps}"
