"""Parity's table, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SIDES = ("lmms-smoothguard", "ART", "torchattacks")
_HEADINGS = (
    "budget",
    "attack",
    "n",
    *(f"ASR, %: {side}" for side in SIDES),
    *(f"ours - {side}, points" for side in SIDES[1:]),
    *(f"step : bare pass, {side}" for side in SIDES),
)


def lines(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One line an attack and budget; "-" where a library does not have it."""
    found: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["norm"], row["attack"], row["loss"]), {})[row["side"]] = row
    return [_line(sides, result["steps"]) for sides in found.values()]


def markdown(result: Mapping[str, Any]) -> str:
    """For the README."""
    listed = [_HEADINGS, ("---",) * len(_HEADINGS), *lines(result)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in listed)


def print_table(result: Mapping[str, Any]) -> None:
    """The same, on a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Attack success rates on the embedded model", caption="brackets: 95 % intervals")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _HEADINGS[:2] else "right")
    for cells in lines(result):
        table.add_row(*cells)
    console = Console()
    Console(width=max(console.width, 230)).print(table)


def _line(sides: Mapping[str, Mapping[str, Any]], steps: int) -> tuple[str, ...]:
    ours = sides[SIDES[0]]
    budget = f"L-inf {ours['eps'] * 255:g}/255" if ours["norm"] == "linf" else f"L2 {ours['eps']:g}"
    return (
        budget,
        f"{ours['attack'].upper()}-{steps}, {ours['loss']}",
        str(ours["asr"]["count"]),
        *(_scaled(sides, side, "asr", 100, ".1f") for side in SIDES),
        *(_scaled(sides, side, "ours_minus_theirs", 100, "+.1f") for side in SIDES[1:]),
        *(_scaled(sides, side, "step_to_bare", 1, ".2f") for side in SIDES),
    )


def _scaled(sides: Mapping[str, Mapping[str, Any]], side: str, field: str, factor: float, form: str) -> str:
    if side not in sides:
        return "-"
    value, low, high = (format(factor * sides[side][field][name], form) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if "+" in form else f"{value} ({low}-{high})"
