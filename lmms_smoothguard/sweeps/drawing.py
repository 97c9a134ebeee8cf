"""All figures of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmms_smoothguard.evaluation.samples import SampleRecord
from lmms_smoothguard.sweeps.answer_plot import answers_figure
from lmms_smoothguard.sweeps.canvas import save
from lmms_smoothguard.sweeps.plots import pareto_figure, sigma_figure
from lmms_smoothguard.sweeps.records import SweepRecord


def draw_all(records: Sequence[SweepRecord], samples: Sequence[SampleRecord], out: Path) -> list[Path]:
    """Draws what there is to draw of these records into `out` and returns the files.

    `sigma.svg` and `pareto.svg` where there are several points, `answers.svg` where copies disagree.
    """
    drawn = {"sigma": sigma_figure(records), "pareto": pareto_figure(records), "answers": answers_figure(samples)}
    return [save(figure, out / f"{name}.svg") for name, figure in drawn.items() if figure is not None]
