"""Draws the figure of the sweeps over sounds into docs/, and writes docs/sounds.md, from the committed result files alone.

python benchmarks/sound_pages.py          # rewrite
python benchmarks/sound_pages.py --check  # exit 1 if docs/sounds.md says anything else
"""

from __future__ import annotations

import sys
from pathlib import Path

from lmms_smoothguard.sweeps.canvas import save
from lmms_smoothguard.sweeps.plots import sigma_figure
from lmms_smoothguard.sweeps.presets import AUDIO
from lmms_smoothguard.sweeps.records import SweepRecord, read_sweep
from lmms_smoothguard.sweeps.tables import budgets_table, sigma_table, votes_table

ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
PAGE = DOCS / "sounds.md"
_HEAD = """\
# Sounds: what noise on the waveform does

SmoothGuard's paper names audio and measures none. These are the first figures here, on the embedded
[tiny-audio](../lmms_smoothguard/tiny/audio/README.md), which was trained to be as fragile as large models are: they show that the code works and how
settings compare under one protocol, and forecast nothing for another model.

Every table is written by `benchmarks/sound_pages.py` from `benchmarks/results/audio_*.json`, which `make sounds` makes. Brackets are 95 %
intervals: Wilson's for rates; paired differences from the vote on all copies, in percentage points, by a bootstrap over clips. ASR counts questions
that the undefended model gets right when clean. Attacks change the waveform, their results are 16-bit PCM and scored through the ordinary path. A budget
such as 0.001 is L-inf, in amplitude (full scale 1); one in dB is L2, so far below each clip's own power. The adaptive attacker averages over
the defence's noise (EOT, 8 draws a step), with draws of its own; where a table has a dash that was not run yet."""


def stored() -> dict[str, SweepRecord]:
    """The committed sweeps by name."""
    paths = {part.name: RESULTS / f"{part.name}.json" for part in AUDIO}
    return {name: read_sweep(path) for name, path in paths.items() if path.exists()}


def page(found: dict[str, SweepRecord]) -> str:
    """All tables whose sweeps are there, with what they count."""
    parts = [_HEAD]
    if "audio_sigma" in found:
        table = sigma_table(found["audio_sigma"], found.get("audio_sigma_eot"))
        parts.append(f"## Noise of a set amplitude\n\n![Accuracy and ASR against sigma](sounds.svg)\n\n{table}")
    if "audio_snr" in found:
        parts.append("## Noise below each clip's own power\n\n" + sigma_table(found["audio_snr"], None))
    if "audio_eps" in found:
        parts.append("## Where it breaks\n\n" + budgets_table(found["audio_eps"], found.get("audio_eps_eot")))
    for name, title in (("audio_votes", "yes / no questions"), ("audio_captions", "sentences")):
        if name in found:
            table = votes_table(found[name], found.get(f"{name}_eot"))
            parts.append(f"## What clustering adds: {title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Rewrites or checks."""
    found = stored()
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text() != page(found))
    drawn = [found[name] for name in ("audio_sigma", "audio_sigma_eot") if name in found]
    figure = sigma_figure(drawn) if drawn else None
    if figure is not None:
        save(figure, DOCS / "sounds.svg")
    PAGE.write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
