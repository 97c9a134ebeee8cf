"""What every figure of a sweep is drawn with: colours, look, axes, SVG files without dates or chance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError

BLUE, VERMILLION, GREY, GREEN, ORANGE, SKY, PURPLE = (
    "#0072B2", "#D55E00", "#595959", "#009E73", "#E69F00", "#56B4E9", "#CC79A7",
)  # fmt: skip
"""Okabe and Ito's (2008) colours, which colour-blind readers tell apart; shapes and line styles differ as well."""
_DPI = 160


def save(figure: Any, path: Path) -> Path:
    """Writes a figure as SVG, or PNG where the path says so, without dates or chance. Raises SmoothGuardError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with style():
            if path.suffix == ".png":
                figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})
            else:
                figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    except OSError as error:
        raise SmoothGuardError(f"{path} cannot be written: {error.strerror}") from error
    return path


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of every figure; text stays text."""
    import matplotlib

    with matplotlib.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": "smoothguard", "font.family": "sans-serif", "font.size": 9,
        "figure.facecolor": "white", "axes.facecolor": "white", "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": "#8c8c8c", "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True,
        "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False, "lines.linewidth": 1.6,
        "lines.markersize": 4.5,
    }):  # fmt: skip
        yield


def panels(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure and its (rows, columns) axes, drawn by no global state."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise SmoothGuardError(
            "figures need matplotlib, which is not installed; pip install 'lmms-smoothguard[report]'"
        ) from error
    figure = Canvas(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)
