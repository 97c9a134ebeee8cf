"""The tables of feature smoothing in Markdown: attacks and utility, then certificates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmms_smoothguard.certify import ABSTAIN
from lmms_smoothguard.certifying.records import CertificateRecord
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.records import Record
from lmms_smoothguard.report.smoothed import CERTIFIED, ROWS

_COLUMNS = (
    ("clean accuracy", "shapes_pope", "accuracy"),
    ("faint objects", "shapes_pope_faint", "accuracy"),
    ("captions exact", "shapes_caption", "accuracy"),
    ("PGD 4/255", "shapes_pope_pgd", "asr"),
    ("APGD 4/255", "shapes_pope_apgd", "asr"),
    ("PGD L2 1.74", "shapes_pope_pgd_l2_matched", "asr"),
    ("feature 8/255", "shapes_pope_feature", "asr"),
    ("PGD 8/255", "shapes_pope_pgd_eps8", "asr"),
    ("captions, PGD 4/255", "shapes_caption_pgd", "asr"),
)
"""(heading, task, figure)."""


def attacks_markdown(records: Mapping[str, Record], costs: Mapping[str, Any]) -> str:
    """One line a defence: utility, ASR of standard and adaptive attacks, cost. Percent with 95 % intervals; records by name; costs:
    what benchmarks/smoothing_cost.py wrote, each answer's time over a plain one's."""
    present = [row for row in ROWS if row.name in records]
    heads = ["defence", *(head for head, _, _ in _COLUMNS), "adaptive: PGD-100, 4/255, EOT 8", "time : plain"]
    lines = [heads, ["---"] * len(heads)]
    for row in present:
        record, adaptive = records[row.name], records.get(f"{row.name}_eot")
        cells = [_of(record, task, figure) for _, task, figure in _COLUMNS]
        through = "-" if adaptive is None else _of(adaptive, "shapes_pope_eot", "asr")
        ratio = costs["answers"].get(row.cost, {}).get("ratio")
        lines.append([row.about, *cells, through, "-" if ratio is None else _ratio(ratio)])
    return _table(lines)


def certificates_markdown(records: Mapping[str, CertificateRecord]) -> str:
    """One line a certified smoothing: S and the certified cosine of features; below it, certified accuracy of classes and answers."""
    felt = {about: records[features] for about, features, _ in CERTIFIED if features in records}
    voted = {about: records[votes] for about, _, votes in CERTIFIED if votes in records}
    return "\n\n".join([*([_certified(felt, _cosines)] if felt else []), *([votes_markdown(voted)] if voted else [])])


def votes_markdown(records: Mapping[str, CertificateRecord]) -> str:
    """One line a certified vote, by what the table calls it: its accuracy, and what of that is certified within each radius."""
    return _certified(records, _votes)


_Cells = Callable[[Mapping[str, Figure], Sequence[float]], dict[str, str]]


def _certified(records: Mapping[str, CertificateRecord], cells: _Cells) -> str:
    made = {about: cells(record.figures, record.asked["radii"]) for about, record in records.items()}
    heads = ["defence", *next(iter(made.values()))]
    return _table([heads, ["---"] * len(heads), *([about, *row.values()] for about, row in made.items())])


def _cosines(figures: Mapping[str, Figure], radii: Sequence[float]) -> dict[str, str]:
    bounds = {f"certified cosine, mean, r = {r:g}": _bound(figures, r) for r in radii}
    return {"S": _number(figures["S"]), **bounds}


def _votes(figures: Mapping[str, Figure], radii: Sequence[float]) -> dict[str, str]:
    shares = {f"certified accuracy, r = {r:g}": _percent(figures[f"certified_accuracy@{r:g}"]) for r in radii}
    return {"accuracy of the smoothed vote": _percent(figures["accuracy"]), **shares}


def _of(record: Record, task: str, figure: str) -> str:
    found = record.tasks.get(task)
    return "-" if found is None or figure not in found.figures else _percent(found.figures[figure])


def _percent(found: Figure) -> str:
    if found.value is None and found.method.startswith(ABSTAIN):
        return ABSTAIN
    if found.value is None or found.low is None or found.high is None:
        return "-"
    return f"{100 * found.value:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})"


def _ratio(found: Mapping[str, float]) -> str:
    if found["low"] == found["high"]:
        return f"{found['value']:g}"
    return f"{found['value']:.1f} ({found['low']:.1f}-{found['high']:.1f})"


def _number(found: Figure) -> str:
    if found.value is None or found.low is None or found.high is None:
        return "-"
    return f"{found.value:.3f} ({found.low:.3f}-{found.high:.3f})"


def _bound(figures: Mapping[str, Figure], radius: float) -> str:
    """The mean bound; where that is below 0, which says nothing, the share of pictures of which something is certified."""
    mean, share = figures[f"inner@{radius:g}"], figures[f"cos0@{radius:g}"]
    if mean.value is None or mean.value >= 0:
        return _number(mean)
    return f">= 0 for {_percent(share)} %" if share.value else ABSTAIN


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
