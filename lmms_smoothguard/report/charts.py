"""Coordinates of the page's charts: the template draws them as SVG, so that their text follows the page's theme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_smoothguard.evaluation.metrics import roc_points
from lmms_smoothguard.report.experiments import ATTACKED, CLEAN

PLOT = 280.0
"""Side of the ROC's square, in units of its viewBox."""
_BAR, _BARS_HIGH, _BINS_WIDE = 340.0, 258.0, 300.0


def percent(value: Mapping[str, float]) -> dict[str, str]:
    """`92.4 %` and its interval `89.4-94.6 %`."""
    return {
        "value": f"{100 * value['value']:.1f} %",
        "interval": f"{100 * value['low']:.1f}\u2013{100 * value['high']:.1f} %",
        "hits": f"{value['hits']:.0f} of {value['count']:.0f}",
    }


def rates_chart(rates: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """One bar a rate, with its interval as a whisker; x in units of the chart."""
    return [
        {
            "name": name,
            **percent(rate),
            "width": _BAR * rate["value"],
            "low": _BAR * rate["low"],
            "high": _BAR * rate["high"],
        }
        for name, rate in rates.items()
    ]


def roc_chart(clean: Sequence[float], attacked: Sequence[float], figures: Mapping[str, Any]) -> dict[str, Any]:
    """The curve of suspicion, its corners, and the point at which `suspected` stands. `figures`: the defended run's."""
    points = [{"threshold": h, "false": f, "true": t, **_place(f, t)} for h, f, t in roc_points(clean, attacked)]
    false, true = (figures[task]["suspected"]["value"] for task in (CLEAN, ATTACKED))
    return {
        "points": points,
        "line": " ".join(f"{point['x']:.1f},{point['y']:.1f}" for point in points),
        "area": " ".join(f"{point['x']:.1f},{point['y']:.1f}" for point in points) + f" {PLOT:.1f},{PLOT:.1f}",
        "suspected": {
            "false": figures[CLEAN]["suspected"],
            "true": figures[ATTACKED]["suspected"],
            **_place(false, true),
        },
        "size": PLOT,
        "ticks": [{"label": f"{20 * n}", "x": PLOT * n / 5, "y": PLOT * (1 - n / 5)} for n in range(6)],
        **figures[ATTACKED]["detection"],
    }


def suspicion_chart(clean: Sequence[float], attacked: Sequence[float], noisy: int) -> dict[str, Any]:
    """How often each value of suspicion occurs, clean beside attacked; heights in units of the chart.

    `noisy`: noisy copies of a request; suspicion is a whole number of them over all.
    """
    values = range(noisy + 1)
    counts = {
        "clean": Counter(round(value * noisy) for value in clean),
        "attacked": Counter(round(value * noisy) for value in attacked),
    }
    totals = {"clean": len(clean), "attacked": len(attacked)}
    most = max(counts[kind][value] / totals[kind] for kind in counts for value in values)
    slot = _BINS_WIDE / len(values)
    bars = [
        {
            "kind": kind,
            "value": value / noisy,
            "count": counts[kind][value],
            "share": counts[kind][value] / totals[kind],
            "x": slot * (value + 0.1) + (0 if kind == "clean" else slot * 0.4),
            "width": slot * 0.4,
            "height": _BARS_HIGH * counts[kind][value] / totals[kind] / most,
        }
        for value in values
        for kind in counts
    ]
    labels = [{"x": slot * (value + 0.5), "text": f"{value / noisy:.2f}"} for value in values]
    return {
        "bars": bars,
        "labels": labels,
        "every": -(-len(labels) // 10),
        "high": _BARS_HIGH,
        "wide": _BINS_WIDE,
        "totals": totals,
        "noisy": noisy,
    }


def _place(false: float, true: float) -> dict[str, float]:
    return {"x": PLOT * false, "y": PLOT * (1 - true)}
