"""Tables of experiments: on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

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


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The table, on a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="The embedded model under attack",
        caption="brackets: 95 % intervals, Wilson's for ASR and accuracy, Student's for means",
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for cells in table_rows(rows):
        table.add_row(*cells)
    console = Console()
    Console(width=max(console.width, 150)).print(table)


def table_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table, one row an experiment. Times are compared with the undefended row of the same questions."""
    plain = {_task_note(row): _seconds(row) for row in rows if "defense=none" in row["command"]}
    if (first := next((row for row in rows if row["name"] == "plain"), None)) is not None:
        plain[_task_note(first)] = _seconds(first)  # not the one at another budget
    cells: list[tuple[str, ...]] = []
    for row in rows:
        clean = next((row["figures"][t] for t in row["figures"] if not t.endswith("_pgd")), None)
        attacked = next((row["figures"][t] for t in row["figures"] if t.endswith("_pgd")), None)
        either: dict[str, Any] = attacked or clean or {}
        cells.append((
            row["about"] + _task_note(row),
            "-" if attacked is None else attack_name(attacked["attack"]),
            _count(either),
            "-" if clean is None else _percent(clean["accuracy"]),
            "-" if attacked is None else _percent(attacked["accuracy"]),
            "-" if attacked is None else _percent(attacked["asr"]),
            _mean(either["agreement"], ".2f") if "agreement" in either else "-",
            " / ".join(_mean(figures["copies"], ".3g") for figures in (clean, attacked) if figures and "copies" in figures) or "-",
            f"{_seconds(row):.3f}",
            f"{_seconds(row) / plain[_task_note(row)]:.1f}" if _task_note(row) in plain else "-",
        ))  # fmt: skip
    return cells


def _count(figures: dict[str, Any]) -> str:
    """The samples, and where ASR leaves out those that are wrong when clean: `145 of 150`."""
    samples = figures["accuracy"]["count"]
    counted = figures.get("asr", figures["accuracy"])["count"]
    return str(samples) if counted == samples else f"{counted} of {samples}"


def _task_note(row: dict[str, Any]) -> str:
    first = next(iter(row["figures"])).removesuffix("_pgd")
    return {CLEAN: "", "shapes_pope_faint": " (faint scenes)", "shapes_caption": " (captions)"}.get(
        first, f" ({first})"
    )


def attack_name(attack: dict[str, Any]) -> str:
    """`PGD-40, 4/255`, with EOT's draws."""
    draws = f", EOT {attack['eot']}" if attack["eot"] else ""
    return f"{attack['name'].upper()}-{attack['steps']}{draws}, {attack['eps'] * 255:g}/255"


def _seconds(row: dict[str, Any]) -> float:
    return fmean(figures["seconds_per_answer"] for figures in row["figures"].values())


def _mean(found: dict[str, float | None], form: str) -> str:
    """A mean with its interval; alone where all values are one, or there is but one."""
    if found["low"] is None or found["low"] == found["high"]:
        return format(found["value"], form)
    value, low, high = (format(found[name], form) for name in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['value']:.1f} % ({100 * value['low']:.1f}-{100 * value['high']:.1f})"


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same table in Markdown, without the times: runs minutes apart are no measurement of cost."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *table_rows(rows)]
    return "\n".join("| " + " | ".join(cells[:-2]) + " |" for cells in lines)
