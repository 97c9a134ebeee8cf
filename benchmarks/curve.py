"""Robustness and utility of feature smoothing against its cost: the table and the figure of results/booster_curve.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_smoothguard.sweeps.canvas import BLUE, GREEN, GREY, VERMILLION, panels, style

_SHOWN = (("clean", "clean"), ("faint", "faint objects"), ("eps4", "PGD 4/255"), ("eps8", "PGD 8/255"))
_LOOK = {"none": (GREY, "o"), "psm": (BLUE, "s"), "small": (GREEN, "^"), "large": (VERMILLION, "D")}
_NAMES = {"none": "no booster", "psm": "psm, as it ships", "small": "a smaller one", "large": "a larger one"}
Point = Mapping[str, Any]


def curve_markdown(result: Mapping[str, Any]) -> str:
    """One line a point: what is varied, what it costs in bare passes of the tower, accuracies in percent with 95 % intervals."""
    heads = [
        "booster",
        "parameters",
        "sigma",
        "n0",
        "cost, bare passes",
        *(f"accuracy, {about}" for _, about in _SHOWN),
    ]
    lines = [heads, ["---"] * len(heads)]
    for point in result["points"]:
        shares = [_percent(point[f"accuracy_{name}"]) for name, _ in _SHOWN]
        size = f"{point['parameters'] / 1e6:.2f} M" if point["parameters"] else "-"
        about = [_NAMES.get(point["booster"], point["booster"]), size, f"{point['sigma']:g}", str(point["num_samples"])]
        lines.append([*about, f"{point['passes']:.1f}", *shares])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def curve_figure(result: Mapping[str, Any]) -> Any:
    """Accuracy under attack and on faint objects: against cost over n0, then against sigma at the n0 that is served."""
    sigma, count = result["setting"]["sigma"], result["setting"]["num_samples"]
    with style():
        figure, axes = panels(1, 2, 8.6, 3.6)
        for name, (colour, marker) in _LOOK.items():
            if not (mine := [point for point in result["points"] if point["booster"] == name]):
                continue
            over_passes = [point for point in mine if point["sigma"] == sigma]
            over_sigma = [point for point in mine if point["num_samples"] == count]
            for axis, points, key in ((axes[0, 0], over_passes, "passes"), (axes[0, 1], over_sigma, "sigma")):
                _draw(axis, sorted(points, key=lambda point: float(point[key])), key, colour, marker, name)
        axes[0, 0].set_xscale("log")
        axes[0, 0].set_xlabel(f"cost of a picture in bare passes of the tower (sigma {sigma:g}, n0 varied)")
        axes[0, 1].set_xlabel(f"sigma (n0 = {count})")
        axes[0, 0].set_ylabel("accuracy")
        axes[0, 0].legend(fontsize=8)
    return figure


def _draw(axis: Any, points: Sequence[Point], key: str, colour: str, marker: str, name: str) -> None:
    for share, line, about in (("eps8", "-", "PGD 8/255"), ("faint", ":", "faint")):
        values = [point[f"accuracy_{share}"]["value"] for point in points]
        axis.plot(
            [point[key] for point in points],
            values,
            line,
            color=colour,
            marker=marker,
            label=f"{_NAMES[name]}: {about}",
        )


def _percent(found: Mapping[str, float]) -> str:
    return f"{100 * found['value']:.1f} ({100 * found['low']:.1f}-{100 * found['high']:.1f})"
