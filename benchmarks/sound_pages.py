"""Draws the figure of the sweeps over sounds into docs/, and writes docs/sounds.md, from the committed result files alone.

python benchmarks/sound_pages.py          # rewrite
python benchmarks/sound_pages.py --check  # exit 1 if docs/sounds.md says anything else
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmms_smoothguard.certifying.records import CertificateRecord, read_certificates
from lmms_smoothguard.report.smoothed import CERTIFICATIONS_OF_SOUNDS
from lmms_smoothguard.report.smoothed_table import votes_markdown
from lmms_smoothguard.sweeps.canvas import save
from lmms_smoothguard.sweeps.plots import sigma_figure
from lmms_smoothguard.sweeps.presets import AUDIO
from lmms_smoothguard.sweeps.records import SweepRecord, read_sweep
from lmms_smoothguard.sweeps.tables import budgets_table, intervals, sigma_table, votes_table
from sound_findings import sound_findings

ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
PAGE = DOCS / "sounds.md"
_HEAD = """\
# Sounds: what noise on the waveform does

SmoothGuard's paper names audio and leaves it as its first open question: the official code adds noise to clean clips and measures nothing. These are
the first figures, on the embedded [tiny-audio](../lmms_smoothguard/tiny/audio/README.md).

"""
_LIMITS = """
**What this is not.** A forecast for another model: tiny-audio has 2.2 million parameters, hears two seconds of generated tones, noises and spoken
digits, was trained to be as fragile as large models are when clean, and with noise of up to sigma 0.06 so that it can be defended at all. Real
speech, music and rooms were not measured, nor any large model; the tables show that the code works, and how settings compare under one protocol.

Every table is written by `benchmarks/sound_pages.py` from result files in `benchmarks/results`, which `make sounds` makes. Brackets are 95 %
intervals: {intervals} (three yes / no questions are about one, captions have one each). Paired differences from the
vote on all copies are in percentage points, by a bootstrap over clips; where no answer differs, Wilson's interval of none in as many trials
as there are clips. ASR counts questions that the undefended model gets right when clean. Attacks change the waveform, their results are 16-bit
PCM and scored through the ordinary path. A budget such as 0.001 is L-inf, in amplitude (full scale 1); one in dB is L2, so far below each
clip's own power. The adaptive attacker averages over the defence's noise (EOT, 8 draws a step), with draws of its own. A dash was not run;
ABSTAIN: no number of equal draws among those taken would certify that radius."""


class Measured(NamedTuple):
    """What is committed. cost: what benchmarks/sound_cost.py wrote."""

    sweeps: Mapping[str, SweepRecord]
    certificates: Mapping[str, CertificateRecord]
    cost: Mapping[str, Any]


def stored() -> Measured:
    """All of it. Raises FileNotFoundError where a part is missing."""
    return Measured(
        {part.name: read_sweep(RESULTS / f"{part.name}.json") for part in AUDIO},
        {one.name: read_certificates(RESULTS / f"{one.name}.json") for one in CERTIFICATIONS_OF_SOUNDS},
        json.loads((RESULTS / "sound_cost.json").read_text()),
    )


def page(found: Measured) -> str:
    """The findings, their limits, and all tables."""
    sweeps = found.sweeps
    votes = [
        f"## What clustering adds: {title}\n\n{votes_table(sweeps[name], sweeps.get(f'{name}_eot'))}"
        for name, title in (("audio_votes", "yes / no questions"), ("audio_captions", "sentences"))
    ]
    certified = {f"sigma {record.settings['certificate']['sigma']:g}": record for record in found.certificates.values()}
    parts = [
        _HEAD + sound_findings(*found) + "\n" + _LIMITS.format(intervals=intervals(sweeps.values(), "clip")),
        "## Noise of a set amplitude\n\n![Accuracy and ASR against sigma](sounds.svg)\n\n"
        + sigma_table(sweeps["audio_sigma"], sweeps["audio_sigma_eot"]),
        "## Noise below each clip's own power\n\n" + sigma_table(sweeps["audio_snr"], None),
        "## Where it breaks: sigma 0.02, N = 10\n\n" + budgets_table(sweeps["audio_eps"], sweeps["audio_eps_eot"]),
        *votes,
        _certificates(certified),
        "## What it costs\n\n" + cost_table(found.cost),
    ]
    return "\n\n".join(parts) + "\n"


def _certificates(certified: Mapping[str, CertificateRecord]) -> str:
    asked = next(iter(certified.values())).settings["certificate"]
    return (
        "## Certificates in waveform L2\n\n"
        f"Of the smoothed vote (the answer that most noisy copies give), from {asked['n']} draws a question, alpha = {asked['alpha']:g} each, in "
        "percent; intervals count questions about one clip as dependent. Radii are L2 norms over all samples, full scale 1; r = 0.179 is a change of 0.001 in every sample of two seconds. "
        "[What a certificate promises, and what not](certificates.md): a vote of ten copies is not this vote.\n\n"
        + votes_markdown(certified)
    )


def cost_table(found: Mapping[str, Any]) -> str:
    """Medians over rounds, and paired ratios."""
    where = found["environment"]
    lines = [
        f"A clip of {found['setting']['clip_seconds']:g} s, {found['setting']['rounds']} rounds in a shuffled order, {where['processor']}, "
        f"{where['torch_threads']} threads. The naive loop is N calls of `generate`, each with features of its own.\n",
        "| new tokens | what | ms | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for tokens, measured in found["tokens"].items():
        for name, one in measured.items():
            ratio = one.get("ratio")
            said = f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) of {one['to']}" if ratio else "-"
            lines.append(f"| {tokens} | {name} | {1000 * one['seconds']['value']:.1f} | {said} |")
    return "\n".join(lines)


def main() -> int:
    """Rewrites or checks."""
    found = stored()
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text() != page(found))
    save(sigma_figure([found.sweeps["audio_sigma"], found.sweeps["audio_sigma_eot"]]), DOCS / "sounds.svg")
    PAGE.write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
