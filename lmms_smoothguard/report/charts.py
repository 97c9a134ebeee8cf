"""Coordinates of the page's charts: the template draws them as SVG, so that their text follows the page's theme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_smoothguard.evaluation.detection import roc_points
from lmms_smoothguard.evaluation.figures import Figure

PLOT = 280.0
"""Side of the ROC's square, in units of its viewBox."""
_BAR, _BARS_HIGH, _BINS_WIDE = 340.0, 258.0, 300.0


def percent(rate: Figure) -> dict[str, str]:
    """`92.4 %` and its interval `89.4-94.6 %`. Raises ValueError for a rate of nothing."""
    value, low, high = _ends(rate)
    return {
        "value": f"{100 * value:.1f} %",
        "interval": f"{100 * low:.1f}\u2013{100 * high:.1f} %",
        "hits": f"{rate.hits} of {rate.count}",
    }


def rates_chart(rates: Mapping[str, Figure]) -> list[dict[str, Any]]:
    """One bar a rate, with its interval as a whisker; x in units of the chart."""
    bars = []
    for name, rate in rates.items():
        value, low, high = (_BAR * end for end in _ends(rate))
        bars.append({"name": name, **percent(rate), "width": value, "low": low, "high": high})
    return bars


def _ends(rate: Figure) -> tuple[float, float, float]:
    if rate.value is None or rate.low is None or rate.high is None:
        raise ValueError(f"{rate} has no value or no interval; expected a rate of at least one sample")
    return rate.value, rate.low, rate.high


def roc_chart(
    clean: Sequence[float], attacked: Sequence[float], figures: Mapping[str, Mapping[str, Figure]]
) -> dict[str, Any]:
    """The curve of suspicion, its corners, and the point at which `suspected` stands. `figures`: the defended run's, of its tasks
    "clean" and "attacked", by name."""
    points = [{"threshold": h, "false": f, "true": t, **_place(f, t)} for h, f, t in roc_points(clean, attacked)]
    false, true = (_ends(figures[task]["suspected"])[0] for task in ("clean", "attacked"))
    found = figures["attacked"]["detection_auroc"]
    auroc, low, high = _ends(found)
    return {
        "points": points,
        "line": " ".join(f"{point['x']:.1f},{point['y']:.1f}" for point in points),
        "area": " ".join(f"{point['x']:.1f},{point['y']:.1f}" for point in points) + f" {PLOT:.1f},{PLOT:.1f}",
        "suspected": {
            "false": figures["clean"]["suspected"],
            "true": figures["attacked"]["suspected"],
            **_place(false, true),
        },
        "size": PLOT,
        "ticks": [{"label": f"{20 * n}", "x": PLOT * n / 5, "y": PLOT * (1 - n / 5)} for n in range(6)],
        "auroc": auroc,
        "low": low,
        "high": high,
        "clean": len(clean),
        "attacked": len(attacked),
        "groups": found.groups,
        "method": found.method,
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
