"""Draws the curves of the certificates, and of robustness against cost, into docs/, from the committed result files alone.

python benchmarks/smoothing_pages.py
"""

from __future__ import annotations

import json
from pathlib import Path

from curve import curve_figure
from lmms_smoothguard.certifying.records import CertificateRecord, read_certificates
from lmms_smoothguard.report.certified import certified_figure
from lmms_smoothguard.report.smoothed import CERTIFICATIONS
from lmms_smoothguard.sweeps.canvas import save

ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"


def stored() -> dict[str, CertificateRecord]:
    """The committed certificates by name."""
    places = {one.name: RESULTS / f"{one.name}.json" for one in CERTIFICATIONS}
    return {name: read_certificates(place) for name, place in places.items() if place.exists()}


if __name__ == "__main__":
    if found := stored():
        save(certified_figure(found), DOCS / "certified.svg")
    if (RESULTS / "booster_curve.json").exists():
        save(curve_figure(json.loads((RESULTS / "booster_curve.json").read_text())), DOCS / "booster.svg")
    if not found:
        print("no certificates among the results; `smoothguard results --smoothing` makes them")
