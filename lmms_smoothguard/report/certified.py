"""The certificates of the feature-smoothing table: runs of `smoothguard certify`, their records, and their curves in one figure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmms_smoothguard.certifying.records import RECORD, CertificateRecord, read_certificates
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.report.smoothed import CERTIFIED, Certification
from lmms_smoothguard.sweeps.canvas import BLUE, GREEN, GREY, ORANGE, VERMILLION, panels, style
from lmms_smoothguard.tiny.clip_testsets import write_certified_sets


def run_certification(certification: Certification, out: Path, results: Path) -> CertificateRecord:
    """Runs it in a process of its own and keeps its record. Raises SmoothGuardError when it fails."""
    model, data, *options = certification.arguments
    if certification.generated:
        write_certified_sets(out / "data")
        data = str(out / "data" / f"{data}.parquet")
    directory = out / certification.name
    command = ["certify", model, data, *options, "--out", str(directory)]
    done = subprocess.run([sys.executable, "-m", "lmms_smoothguard", *command], check=False)
    if done.returncode:
        raise SmoothGuardError(
            f"smoothguard failed (exit code {done.returncode}), see above: smoothguard {' '.join(command)}"
        )
    (results / f"{certification.name}.json").write_bytes((directory / RECORD).read_bytes())
    return read_certificates(directory / RECORD)


def certified_figure(records: Mapping[str, CertificateRecord]) -> Any:
    """Certified cosine (median over pictures) and certified accuracy against the radius, a line a defence; records by name."""
    colours = (GREY, ORANGE, BLUE, GREEN, VERMILLION, VERMILLION)
    lines = ("-", "--", "-", ":", "-.", "-")
    with style():
        figure, ((felt, voted),) = panels(1, 2, 8.6, 3.6)
        for (about, features, votes), colour, line in zip(CERTIFIED, colours, lines, strict=True):
            for axis, name, curve in ((felt, features, "fcsb_q50"), (voted, votes, "certified_accuracy")):
                if name in records and curve in records[name].curves:
                    found = records[name].curves
                    values = np.array([np.nan if value is None else value for value in found[curve]])
                    axis.plot(found["radius"], values, color=colour, linestyle=line, label=about)
        felt.set_ylabel("certified cosine with the clean feature (median)")
        voted.set_ylabel("certified accuracy")
        for axis in (felt, voted):
            axis.set_xlabel("L2 radius, pixel units at the model's resolution")
            axis.set_ylim(-0.02, 1.02)
            axis.set_xlim(0, None)
            axis.legend(fontsize=8)
    return figure
