"""Figures of sweeps: rates against sigma, and utility against robustness and cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.sweeps.canvas import BLUE, GREY, VERMILLION, panels, style
from lmms_smoothguard.sweeps.grid import CLEAN
from lmms_smoothguard.sweeps.noises import UNITS
from lmms_smoothguard.sweeps.records import PointRecord, SweepRecord

_STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))


class Line(NamedTuple):
    """One rate of one task over sigma: (sigma, figure) in order."""

    record: SweepRecord
    task: str
    places: list[tuple[float, Figure]]

    @property
    def asked(self) -> int:
        """The samples behind it (the fewest, where sigmas differ)."""
        return min(figure.count for _, figure in self.places)


# -- against sigma -----------------------------------------------------------------------------------------------------


def sigma_figure(records: Sequence[SweepRecord]) -> Any:
    """Accuracy and ASR against sigma, standard attacks beside adaptive ones, a row a noise space; None for one sigma only."""
    spaces = sorted({p.space for r in records for p in r.points if p.defense}, reverse=True)
    attacked = [
        (space, adaptive) for space in spaces for adaptive in (False, True) if _lines(records, space, "asr", adaptive)
    ]
    most = max(
        (len(line.places) for space, kind in attacked for line in _lines(records, space, "asr", kind)), default=0
    )
    if most < 2:
        return None
    columns = sorted({adaptive for _, adaptive in attacked})
    with style():
        figure, axes = panels(len(spaces), len(columns), 3.9 * len(columns), 3.3 * len(spaces), sharey=True)
        for row, space in zip(axes, spaces, strict=True):
            for axis, adaptive in zip(row, columns, strict=True):
                _sigma_panel(axis, records, space, adaptive)
        for row in axes:
            row[0].set_ylabel("share of questions, %")
    return figure


def _sigma_panel(axis: Any, records: Sequence[SweepRecord], space: str, adaptive: bool) -> None:
    asr = _lines(records, space, "asr", adaptive)
    for number, line in enumerate(_lines(records, space, "accuracy", None)[:1]):
        _draw(axis, line, GREY, _STYLES[number], f"clean accuracy (n = {line.asked})")
    for number, line in enumerate(_lines(records, space, "accuracy", adaptive)):
        _draw(axis, line, BLUE, _STYLES[number % 4], f"accuracy, {line.task} (n = {line.asked})")
    for number, line in enumerate(asr):
        _draw(axis, line, VERMILLION, _STYLES[number % 4], f"ASR, {line.task} (n = {line.asked})")
    axis.set_title("adaptive attack (EOT over the noise)" if adaptive else "standard attack")
    axis.set_xlabel(f"{'noise' if space == 'snr' else 'sigma'}, {UNITS[space]} (0: undefended)")
    axis.set_ylim(-3, 103)
    axis.set_xticks(sorted({sigma for line in asr for sigma, _ in line.places}))
    axis.xaxis.set_major_formatter(lambda sigma, _: f"{sigma:g}")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8)


def _draw(axis: Any, line: Line, colour: str, how: tuple[str, str], label: str) -> None:
    told = [(sigma, f) for sigma, f in line.places if f.value is not None]
    values = [100 * (f.value or 0.0) for _, f in told]
    low = [v - 100 * (f.low if f.low is not None else f.value or 0.0) for v, (_, f) in zip(values, told, strict=True)]
    high = [
        100 * (f.high if f.high is not None else f.value or 0.0) - v for v, (_, f) in zip(values, told, strict=True)
    ]
    bars = [[max(0.0, part) for part in side] for side in (low, high)]
    axis.errorbar(
        [sigma for sigma, _ in told], values, yerr=bars, color=colour, linestyle=how[0], marker=how[1], capsize=2.5,
        elinewidth=1.0, label=label,
    )  # fmt: skip


def _lines(records: Sequence[SweepRecord], space: str, name: str, adaptive: bool | None) -> list[Line]:
    """The lines of tasks with such an attack (None: without one), each over all the sigmas that its record has."""
    lines = []
    for record in records:
        for task, stored in record.tasks.items():
            kind = None if stored.attack is None else stored.attack.adaptive
            if kind is not adaptive:
                continue
            found = [(_sigma(p), record.figure(p, task, name)) for p in record.points if p.main and _in(p, space)]
            places = sorted(((s, f) for s, f in found if f is not None), key=lambda place: place[0])
            if places:
                lines.append(Line(record, task, places))
    return sorted(lines, key=lambda line: -line.asked)


def _sigma(point: PointRecord) -> float:
    return point.size


def _in(point: PointRecord, space: str) -> bool:
    return point.defense is None or point.space == space


# -- utility, robustness, cost -----------------------------------------------------------------------------------------


class Trade(NamedTuple):
    """A defence by its name: accuracy on clean pictures and 1 - ASR, in percent, copies answered, sigma in units of `space`."""

    name: str
    utility: float
    robustness: float
    copies: int
    sigma: float
    space: str = ""

    @property
    def noise(self) -> tuple[float, str]:
        """What its line and colour stand for; none of no size."""
        return self.sigma, self.space if self.sigma else ""


def trades(records: Sequence[SweepRecord], task: str) -> list[Trade]:
    """Every defence that has both figures: clean accuracy from whichever record asked the most clean questions."""
    made: dict[str, Trade] = {}
    for record in sorted(records, key=lambda r: -max(t.data.count for t in r.tasks.values())):
        for point in record.points:
            asr = record.figure(point, task, "asr")
            every = [f for r in records for p in r.points if p.name == point.name
                     and (f := r.figure(p, CLEAN, "accuracy")) is not None]  # fmt: skip
            clean = max(every, key=lambda figure: figure.count, default=None)
            if asr is None or clean is None or asr.value is None or clean.value is None or point.name in made:
                continue
            copies = 1 if point.defense is None else int(point.defense["num_samples"])
            space = point.space
            made[point.name] = Trade(point.name, 100 * clean.value, 100 * (1 - asr.value), copies, _sigma(point), space)
    return list(made.values())


def undominated(found: Iterable[Trade]) -> set[str]:
    """The names of defences that no other one beats in utility, robustness or cost without losing in another."""
    listed = list(found)

    def beats(one: Trade, other: Trade) -> bool:
        ahead = (one.utility - other.utility, one.robustness - other.robustness, other.copies - one.copies)
        return all(by >= 0 for by in ahead) and any(by > 0 for by in ahead)

    return {trade.name for trade in listed if not any(beats(other, trade) for other in listed)}


def pareto_figure(records: Sequence[SweepRecord]) -> Any:
    """Clean accuracy against 1 - ASR, one panel a task: a line a noise, larger marks for more copies, a dark ring for what
    nothing else beats in all three. None where no defence has both figures."""
    tasks = list(dict.fromkeys(task for record in records for task, t in record.tasks.items() if t.attack is not None))
    shown = [(task, found) for task in tasks if len(found := trades(records, task)) > 2]
    if not shown:
        return None
    noises = sorted({trade.noise for _, found in shown for trade in found}, key=lambda noise: noise[::-1])
    from matplotlib import colormaps

    colours = {s: colormaps["cividis"](0.1 + 0.85 * n / max(1, len(noises) - 1)) for n, s in enumerate(noises)}
    with style():
        figure, axes = panels(1, len(shown), 3.9 * len(shown), 3.7)
        for axis, (task, found) in zip(axes[0], shown, strict=True):
            _pareto_panel(axis, found, colours)
            axis.set_title(task)
            axis.set_xlabel("accuracy on clean pictures, %")
        axes[0][0].set_ylabel("robustness (1 - ASR), %")
        figure.legend(
            *_pareto_key(colours, sorted({t.copies for _, found in shown for t in found})),
            loc="outside lower center", ncols=6, fontsize=8,
        )  # fmt: skip
    return figure


def _pareto_panel(axis: Any, found: Sequence[Trade], colours: dict[tuple[float, str], Any]) -> None:
    best = undominated(found)
    for noise, colour in colours.items():
        line = sorted((trade for trade in found if trade.noise == noise), key=lambda trade: trade.copies)
        axis.plot([t.utility for t in line], [t.robustness for t in line], color=colour, linewidth=0.8, zorder=1)
        for trade in line:
            ring = "black" if trade.name in best else "white"
            axis.scatter(trade.utility, trade.robustness, s=_area(trade.copies), color=colour, edgecolors=ring,
                         linewidths=1.4 if trade.name in best else 0.5, zorder=3 if trade.name in best else 2,
                         marker="X" if noise[0] == 0 else "o")  # fmt: skip
    axis.margins(0.12)
    axis.set_xlim(right=min(axis.get_xlim()[1], 100.6))
    axis.set_ylim(top=min(axis.get_ylim()[1], 101.5))


def _pareto_key(colours: dict[tuple[float, str], Any], copies: Sequence[int]) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    def mark(colour: Any, area: float, ring: str = "white", shape: str = "o") -> Any:
        return Line2D([], [], linestyle="", marker=shape, color=colour, markersize=area**0.5, markeredgecolor=ring)

    handles = [mark(colour, 40, shape="X" if s == 0 else "o") for (s, _), colour in colours.items()]
    several = len({space for s, space in colours if s}) > 1
    names = ["undefended" if s == 0 else f"sigma {s:g}{f' {space}' if several else ''}" for s, space in colours]
    handles += [mark(GREY, _area(count)) for count in copies] + [mark("white", 40, "black")]
    return handles, [*names, *(f"N = {count}" for count in copies), "nothing better"]


def _area(copies: int) -> float:
    return 14 + 9 * copies
