"""The table of a run, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmms_smoothguard.certify import ABSTAIN
from lmms_smoothguard.certifying.asked import ANSWERS, FEATURES
from lmms_smoothguard.certifying.records import CertificateRecord
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure


def print_certificates(record: CertificateRecord, file: Any = None) -> None:
    """Raises SmoothGuardError where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise SmoothGuardError(
            "the table needs rich, which is not installed; pip install 'lmms-smoothguard[report]'"
        ) from error
    heads, rows = cells(record)
    table = Table(title=record.about, title_justify="left", caption=record.scope, caption_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(file=file)
    console.print(table)
    for line in said(record):
        console.print(line, highlight=False)


def cells(record: CertificateRecord) -> tuple[list[str], list[list[str]]]:
    """Heads and rows, a row a radius."""
    asked, found = record.asked, record.figures
    if record.settings["certificate"]["what"] == FEATURES:
        similarity = f"{asked['similarity']:g}"
        heads = {
            "inner": "bound of <u, f^>, mean", "cos0": "cosine certified (FCSB >= 0)",
            f"cos{similarity}": f"cosine >= {similarity} certified", "served0": f"mean of {asked['n0']} draws, cosine >= 0",
        }  # fmt: skip
    else:
        heads = {"certified_accuracy": "certified accuracy", "certified": "certified, right or wrong"}
        heads = {name: head for name, head in heads.items() if f"{name}@{asked['radii'][0]:g}" in found}
    rows = [
        [f"{radius:g}", *(_shown(found[f"{name}@{radius:g}"], name == "inner") for name in heads)]
        for radius in asked["radii"]
    ]
    return ["L2 radius", *heads.values()], rows


def said(record: CertificateRecord) -> Iterator[str]:
    """The figures that hang on no radius, and what the run was."""
    made, found = record.settings["certificate"], record.figures
    yield (
        f"sigma {made['sigma']:g}, n = {made['n']}, selection {made['n_select']}, alpha {made['alpha']:g} each, seed {made['seed']}"
    )
    if made["what"] == FEATURES:
        yield f"S, mean over {found['S'].count} pictures: {_shown(found['S'], True)}; its lower bounds: {_shown(found['lower'], True)}"
    else:
        if "accuracy" in found:
            yield f"right (what the selection draws chose): {_shown(found['accuracy'])}"
        yield f"abstained: {_shown(found['abstained'])}"
    if made["what"] == ANSWERS:
        yield "Certified is the noisy vote (its whole distribution), not an answer of a few copies."
    for similarity, largest in record.largest.items():
        about = f" at cosine {similarity}" if made["what"] == FEATURES else ""
        most = "no radius at all" if largest is None else f"no radius of {largest:.3g} or more"
        yield f"With this n and alpha {most} can be certified{about}, whatever the model."


def _shown(figure: Figure, number: bool = False) -> str:
    if figure.value is None:
        return ABSTAIN
    scale, unit, digits = (1, "", 3) if number else (100, " %", 1)
    ends = "" if figure.low is None or figure.high is None else (
        f" ({scale * figure.low:.{digits}f} to {scale * figure.high:.{digits}f})"
    )  # fmt: skip
    return f"{scale * figure.value:.{digits}f}{unit}{ends}"
