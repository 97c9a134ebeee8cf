"""Tables of sweeps, in Markdown: rates with intervals, differences from a vote, poisoned copies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.sweeps.grid import CLEAN
from lmms_smoothguard.sweeps.records import PointRecord, SweepRecord

Rows = Sequence[Sequence[str]]


def describe(record: SweepRecord) -> str:
    """Every main point of a sweep and its rates, for a terminal and for a page."""
    heads, columns = ["defence"], []
    for task, stored in record.tasks.items():
        heads.append(f"accuracy, {task}")
        columns.append((task, "accuracy"))
        if stored.attack is not None:
            heads.append(f"ASR, {task}")
            columns.append((task, "asr"))
    rows = [
        [point.name, *(rate(record.figure(point, task, name)) for task, name in columns)]
        for point in record.points
        if point.main
    ]
    count = next(iter(record.tasks.values())).data.count
    return f"{record.about}, {count} questions\n\n{markdown(heads, rows)}"


def sigma_table(standard: SweepRecord, adaptive: SweepRecord | None, *, both: bool = False) -> str:
    """Against sigma: clean accuracy, ASR of the standard attack, and of the adaptive one where it was run; both: these alone.

    Without noise the adaptive attack has nothing to average: it is the standard one.
    """
    attacked = next(task for task, stored in standard.tasks.items() if stored.attack is not None)
    adapted = {} if adaptive is None else _by_name(adaptive)
    eot = None if adaptive is None else next(iter(adaptive.tasks))
    none = "undefended" if _space(standard) == "snr" else "0 (undefended)"
    rows = []
    for point in (p for p in standard.points if p.main):
        twin = adapted.get(point.name)
        if both and twin is None:
            continue
        asr = None if adaptive is None or twin is None or eot is None else adaptive.figure(twin, eot, "asr")
        row = [
            f"{point.size:g}" if point.defense is not None else none,
            rate(standard.figure(point, CLEAN, "accuracy")),
            rate(standard.figure(point, attacked, "asr")),
        ]
        through = rate(asr) if twin is None or point.defense is not None else "the standard attack"
        rows.append([*row, through] if eot else row)
    heads = [_axis(_space(standard)), "clean accuracy", f"ASR, {attacked}", *([f"ASR, {eot}"] if eot else [])]
    return markdown(heads, rows)


def votes_table(
    standard: SweepRecord, adaptive: SweepRecord | None, keep: Callable[[PointRecord], bool] | None = None
) -> str:
    """What aggregation adds: every way to vote on the same copies, and paired differences of ASR from the plain vote.

    Ways whose figures are all the same share a line.
    """
    attacked = next(task for task, stored in standard.tasks.items() if stored.attack is not None)
    eot = None if adaptive is None else next(iter(adaptive.tasks))
    adapted = {} if adaptive is None else _by_name(adaptive)
    lines: dict[tuple[str, ...], list[PointRecord]] = {}
    for point in standard.points:
        if point.defense is None or (keep is not None and not keep(point)):
            continue
        cells = [
            rate(standard.figure(point, CLEAN, "accuracy")),
            rate(standard.figure(point, attacked, "asr")),
            difference(standard.figure(point, attacked, "asr - vote")),
        ]
        twin = adapted.get(point.name)
        for name, form in (("asr", rate), ("asr - vote", difference)):
            cells.append(
                form(None if twin is None or adaptive is None or eot is None else adaptive.figure(twin, eot, name))
            )
        lines.setdefault(
            (*map(str, (point.defense["num_samples"], point.defense["include_clean"])), *cells), []
        ).append(point)
    heads = ["vote", "clean accuracy", f"ASR, {attacked}", "minus vote"]
    if eot is not None:
        heads += [f"ASR, {eot}", "minus vote"]
    return markdown(heads, [[_ways(points), *cells[2:]][: len(heads)] for cells, points in lines.items()])


def budgets_table(standard: SweepRecord, adaptive: SweepRecord | None) -> str:
    """Where it breaks: ASR undefended and defended at every budget, standard and adaptive."""
    rows = []
    twins = {} if adaptive is None else {_budget(stored.attack): task for task, stored in adaptive.tasks.items()}
    for task, stored in standard.tasks.items():
        plain = next((p for p in standard.points if p.defense is None), None)
        guarded = next(p for p in standard.points if p.main and p.defense is not None)
        twin = twins.get(_budget(stored.attack))
        through = None
        if adaptive is not None and twin is not None:
            through = adaptive.figure(_by_name(adaptive)[guarded.name], twin, "asr")
        undefended = None if plain is None else standard.figure(plain, task, "asr")
        rows.append([task, rate(undefended), rate(standard.figure(guarded, task, "asr")), rate(through)])
    return markdown(["attack", "ASR undefended", "ASR defended", "ASR defended, adaptive (EOT)"], rows)


def poisoned_table(records: Sequence[SweepRecord]) -> str:
    """How often the vote is wrong, by how many noisy copies are: a line for each defence and attack, with all their samples.

    Raises ValueError where defences have different numbers of noisy copies, as their columns would.
    """
    lines, sizes = [], set()
    for record in records:
        for point in (p for p in record.points if p.main and p.defense is not None):
            sizes.add(_noisy(point))
            for task in (task for task, stored in record.tasks.items() if stored.attack is not None):
                lines.append((point, task))
    if len(sizes) != 1:
        raise ValueError(f"defences with {sorted(sizes)} noisy copies; expected one number for one table")
    bins = _quarters(*sizes)
    rows = [[point.name, task, *(rate(_pooled(point, task, within)) for within in bins)] for point, task in lines]
    return markdown(["defence", "attack", *(f"{_span(within)} wrong" for within in bins)], rows)


def poisoned_split(record: SweepRecord) -> tuple[tuple[int, int], tuple[int, int]]:
    """(wrong votes, samples) with fewer than half of the noisy copies wrong, and with more; of all defences and attacks."""
    counts = [[0, 0], [0, 0]]
    for point in (p for p in record.points if p.main and p.defense is not None):
        for task in (task for task, stored in record.tasks.items() if stored.attack is not None):
            for k in range(_noisy(point) + 1):
                if (figure := point.figures.get(task, {}).get(f"wrong[{k}]")) is not None:
                    side = counts[2 * k >= _noisy(point)]
                    side[0] += figure.hits or 0
                    side[1] += figure.count
    (low, n), (high, m) = counts
    return (low, n), (high, m)


def _noisy(point: PointRecord) -> int:
    defense = point.defense or {}
    return int(defense["num_samples"]) - bool(defense["include_clean"])


def _quarters(copies: int) -> list[range]:
    """No copy, then the four quarters of 1..copies; the middle lies between two of them."""
    edges = [0, copies // 4, (copies - 1) // 2, 3 * copies // 4, copies]
    spans = [range(low + 1, high + 1) for low, high in itertools.pairwise(edges)]
    return [range(1), *(span for span in spans if span)]


def _span(within: range) -> str:
    return str(within[0]) if len(within) == 1 else f"{within[0]}-{within[-1]}"


def _pooled(point: PointRecord, task: str, within: range) -> Figure | None:
    """Samples taken as independent, as those of one scene nearly are (`docs/measured.md`)."""
    found = [figure for k in within if (figure := point.figures.get(task, {}).get(f"wrong[{k}]")) is not None]
    return Rate(sum(f.hits or 0 for f in found), sum(f.count for f in found)).figure() if found else None


def rate(figure: Figure | None) -> str:
    """`93.0 % (90.1-95.1), n = 300`."""
    if figure is None or figure.value is None:
        return "-"
    value = f"{100 * figure.value:.1f} %"
    if figure.low is None or figure.high is None:
        return value
    return f"{value} ({100 * figure.low:.1f}-{100 * figure.high:.1f}), n = {figure.count}"


def difference(figure: Figure | None) -> str:
    """`+1.2 (-0.4 to +2.8)`, in percentage points."""
    if figure is None or figure.value is None:
        return "-"
    value = f"{100 * figure.value:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0")
    if figure.low is None or figure.high is None:
        return value
    return f"{value} ({100 * figure.low:+.1f} to {100 * figure.high:+.1f})"


def intervals(records: Iterable[SweepRecord], place: str) -> str:
    """How the files' rates have their intervals, for a legend; place: what several questions share, such as a scene."""
    methods = {
        figure.method
        for record in records
        for point in record.points
        for figures in point.figures.values()
        for name, figure in figures.items()
        if name in ("accuracy", "asr")
    }
    if any("over groups" in method for method in methods):
        return f"Wilson's of rates, at n / design effect where several questions are about one {place}"
    return "Wilson's of rates"


def markdown(heads: Sequence[str], rows: Rows) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _by_name(record: SweepRecord) -> Mapping[str, PointRecord]:
    return {point.name: point for point in record.points}


def _space(record: SweepRecord) -> str:
    return next(p.space for p in record.points if p.defense is not None)


def _axis(space: str) -> str:
    return "noise, dB below the sound" if space == "snr" else f"sigma ({space})"


def _budget(attack: Any) -> tuple[Any, ...]:
    return attack.settings["norm"], attack.settings.get("eps"), attack.settings.get("snr")


def _ways(points: Sequence[PointRecord]) -> str:
    """What a line stands for: `N = 10, without the clean copy: kmeans (lexical, model), medoid (lexical)`."""
    first = points[0].defense or {}
    if first["num_samples"] == 1:
        return "one noisy copy alone"
    names: dict[str, list[str]] = {}
    for point in points:
        defense = point.defense or {}
        aggregator = str(defense["aggregator"]) + ("" if point.majority_first else ", always asked")
        embedder = str(defense["embedder"])
        names.setdefault(aggregator, []).append("MiniLM" if "minilm" in embedder.lower() else embedder)
    listed = "; ".join(name if name == "vote" else f"{name} ({', '.join(over)})" for name, over in names.items())
    clean = "" if first["include_clean"] else ", without the clean copy"
    return f"N = {first['num_samples']}{clean}: {listed}"
