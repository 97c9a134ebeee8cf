"""FCSB and certified shares against the radius: the numbers, and their picture as SVG and PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmms_smoothguard.certify import ABSTAIN
from lmms_smoothguard.certifying.asked import FEATURES, Certification
from lmms_smoothguard.certifying.figures import Records, cosine
from lmms_smoothguard.certifying.workers import Worker
from lmms_smoothguard.evaluation.rates import wilson
from lmms_smoothguard.sweeps.canvas import BLUE, GREEN, GREY, VERMILLION, panels, save, style

if TYPE_CHECKING:
    from lmms_smoothguard.certifying.records import CertificateRecord

_POINTS = 121
_QUARTILES = (0.25, 0.5, 0.75)
_COSINES = (0.0, 0.5, 0.9)

Curves = dict[str, list[float | None]]


def curves(asked: Certification, records: Records, worker: Worker) -> Curves:
    """Over `radius`, from 0 to beyond what is certified. Of features: quartiles of FCSB over pictures, an abstaining one below all
    others, and the shares whose cosine is certified to be 0, .5 or .9 at least; of classes and answers: shares certified, and
    certified and right. None where n and alpha can certify nothing."""
    largest = worker.largest(0.0)
    end = max([1.1 * (largest or 0.0), *asked.radii])
    radii = np.linspace(0, end, _POINTS)
    made: Curves = {"radius": [float(radius) for radius in radii]}
    if asked.what == FEATURES:
        lowers = [record["certificate"]["lower"] for record in records]
        found = [[cosine(lower, radius, asked.sigma) for lower in lowers] for radius in radii]
        for quartile in _QUARTILES:
            made[f"fcsb_q{round(100 * quartile)}"] = [_quantile(values, quartile) for values in found]
        for similarity in _COSINES:
            most = worker.largest(similarity) or 0.0
            made[f"cos{similarity:g}"] = [
                None if radius >= most else float(np.mean([v is not None and v >= similarity for v in values]))
                for radius, values in zip(radii, found, strict=True)
            ]
        return made
    reached = [record["certificate"]["radius"] for record in records]
    right = [record["right"] for record in records]
    held = [[found is not None and found > radius for found in reached] for radius in radii]
    beyond = [radius >= (largest or 0.0) for radius in radii]
    made["certified"] = [None if far else float(np.mean(one)) for far, one in zip(beyond, held, strict=True)]
    if all(fine is not None for fine in right):
        made["certified_accuracy"] = [
            None if far else float(np.mean(np.logical_and(one, right))) for far, one in zip(beyond, held, strict=True)
        ]
    return made


def _quantile(values: list[float | None], share: float) -> float | None:
    """The smallest value that so many lie at or below, abstaining ones first: a value that is one of a certificate's."""
    ordered = sorted(-1.0 if value is None else value for value in values)
    found = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    return None if found < 0 else found


# -- the picture -------------------------------------------------------------------------------------------------------


def draw(record: CertificateRecord, directory: Path) -> list[Path]:
    """Writes certify.svg and certify.png. Raises SmoothGuardError where they cannot be drawn or written."""
    features = record.settings["certificate"]["what"] == FEATURES
    heard = "noise_space" in record.settings["certificate"]
    units = "amplitude of the waveform" if heard else "pixel units at the model's resolution"
    with style():
        figure, axes = panels(1, 2 if features else 1, 7.8 if features else 4.4, 3.7)
        radii = np.array(record.curves["radius"])
        if features:
            _fcsb_panel(axes[0][0], radii, record.curves)
        _share_panel(axes[0][-1], radii, record)
        for axis in axes[0]:
            axis.set_xlabel(f"L2 radius, {units}")
            axis.set_ylim(-0.03, 1.03)
            axis.set_xlim(0, radii[-1])
            _limit(axis, record.largest["0"])
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8)
    return [save(figure, directory / "certify.svg"), save(figure, directory / "certify.png")]


def _floats(values: list[float | None]) -> Any:
    return np.array([np.nan if value is None else value for value in values])


def _fcsb_panel(axis: Any, radii: Any, made: Curves) -> None:
    low, middle, high = (_floats(made[f"fcsb_q{round(100 * quartile)}"]) for quartile in _QUARTILES)
    axis.fill_between(
        radii, np.nan_to_num(low), np.nan_to_num(high), where=~np.isnan(high), color=BLUE, alpha=0.18, linewidth=0
    )
    axis.plot(radii, middle, color=BLUE, label="median (band: quartiles)")
    axis.set_ylabel("FCSB: the least cosine with u")


def _share_panel(axis: Any, radii: Any, record: CertificateRecord) -> None:
    count = record.data.count
    named = {
        "cos0": (BLUE, "-", "cosine 0 or more"), "cos0.5": (GREEN, "--", "cosine .5 or more"),
        "cos0.9": (VERMILLION, ":", "cosine .9 or more"), "certified": (GREY, "--", "certified, right or wrong"),
        "certified_accuracy": (BLUE, "-", "certified and right"),
    }  # fmt: skip
    for name, (colour, line, label) in named.items():
        if name not in record.curves:
            continue
        values = _floats(record.curves[name])
        ends = np.array([(np.nan, np.nan) if np.isnan(value) else wilson(value, count) for value in values])
        axis.fill_between(radii, ends[:, 0], ends[:, 1], color=colour, alpha=0.15, linewidth=0)
        axis.plot(radii, values, color=colour, linestyle=line, label=f"{label} (n = {count})")
    axis.set_ylabel("share certified")


def _limit(axis: Any, largest: float | None) -> None:
    """From where on nothing can be certified with these n and alpha, whatever the model."""
    axis.axvline(largest or 0.0, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)))
    axis.annotate(ABSTAIN, (largest or 0.0, 0.02), xytext=(2, 0), textcoords="offset points", rotation=90,
                  fontsize=7, color=GREY, ha="left", va="bottom")  # fmt: skip
