"""Draws the figures of the README's sweeps into docs/, and writes docs/sweeps.md, from the committed result files alone.

python benchmarks/sweep_pages.py          # rewrite
python benchmarks/sweep_pages.py --check  # exit 1 if docs/sweeps.md says anything else
"""

from __future__ import annotations

import sys
from pathlib import Path

from lmms_smoothguard.aggregation.embedders import EmbedderContext, load_embedder
from lmms_smoothguard.sweeps.answer_plot import answers_figure
from lmms_smoothguard.sweeps.canvas import save
from lmms_smoothguard.sweeps.plots import pareto_figure, sigma_figure
from lmms_smoothguard.sweeps.presets import README, minilm
from lmms_smoothguard.sweeps.records import SweepRecord, read_sweep, read_sweep_samples
from lmms_smoothguard.sweeps.tables import budgets_table, intervals, poisoned_table, sigma_table, votes_table

ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
PAGE = DOCS / "sweeps.md"


def stored() -> dict[str, SweepRecord]:
    """The committed sweeps by name."""
    return {part.name: read_sweep(RESULTS / f"{part.name}.json") for part in README}


def page(found: dict[str, SweepRecord]) -> str:
    """All tables, with what they count."""
    sigma, sigma_eot = found["sweep_sigma"], found["sweep_sigma_eot"]
    parts = [
        "# Sweeps on the embedded model",
        "Every table is written by `benchmarks/sweep_pages.py` from `benchmarks/results/sweep*.json`; `smoothguard sweep --preset "
        f"readme`\nmakes those. Brackets are 95 % intervals: {intervals(found.values(), 'scene')}; paired differences from the vote on all ten "
        "copies, in percentage\npoints, by a bootstrap over scenes. ASR counts questions that the undefended model gets right "
        "when clean. The adaptive\nattacker averages over the defence's noise (EOT, 8 draws a step).",
        "## Noise\n\n![Accuracy and ASR against sigma, standard and adaptive](sigma.svg)\n\n" + sigma_table(sigma, sigma_eot),
        "## Utility, robustness, cost\n\n![Clean accuracy against robustness, by copies and sigma](pareto.svg)",
        "## What clustering adds: yes / no questions\n\n" + votes_table(found["sweep_votes"], found["sweep_votes_eot"]),
        "## What clustering adds: sentences\n\n" + votes_table(found["sweep_captions"], found["sweep_captions_eot"])
        + "\n\n![Answers of ten copies, clean and attacked, in embedding space](answers.svg)",
        "## Where it breaks\n\n" + budgets_table(found["sweep_eps"], found["sweep_eps_eot"]),
        "## The majority already poisoned\n\nHow often the vote is wrong, by how many of the nine noisy copies are:\n\n"
        + poisoned_table([found[name] for name in ("sweep_eps", "sweep_eps_eot", "sweep_captions", "sweep_captions_eot")]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def draw(found: dict[str, SweepRecord]) -> None:
    """The three figures."""
    sigma = [found["sweep_sigma"], found["sweep_sigma_eot"]]
    captions = RESULTS / "sweep_captions.json"
    samples = read_sweep_samples(captions, found["sweep_captions"])
    answers = answers_figure(samples, load_embedder(EmbedderContext(minilm())), "MiniLM")
    for name, figure in (("sigma", sigma_figure(sigma)), ("pareto", pareto_figure(sigma)), ("answers", answers)):
        if figure is not None:
            save(figure, DOCS / f"{name}.svg")


def main() -> int:
    """Rewrites or checks."""
    found = stored()
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text() != page(found))
    draw(found)
    PAGE.write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
