"""Writes the tables of the README, of docs/measured.md and of docs/serving.md from the committed result files.

python benchmarks/readme_tables.py          # rewrite
python benchmarks/readme_tables.py --check  # exit 1 if a page says anything else
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from curve import curve_markdown
from findings import findings
from lmms_smoothguard.certifying.records import read_certificates
from lmms_smoothguard.evaluation.records import Record, read_record, read_run
from lmms_smoothguard.report.demo import DEMO, EXPERIMENTS
from lmms_smoothguard.report.documents import base_task
from lmms_smoothguard.report.experiments import SEEING
from lmms_smoothguard.report.smoothed import CERTIFICATIONS, SMOOTHED
from lmms_smoothguard.report.smoothed_table import attacks_markdown, certificates_markdown
from lmms_smoothguard.report.tables import attacks_table, markdown_table
from lmms_smoothguard.sweeps.presets import AUDIO
from lmms_smoothguard.sweeps.presets import README as SWEEPS
from lmms_smoothguard.sweeps.records import PointRecord, read_sweep
from lmms_smoothguard.sweeps.tables import sigma_table, votes_table
from peers.table import markdown as parity
from smoothed_findings import smoothed_findings
from sound_findings import sound_headlines
from timing.table import markdown as costs
from timing.table import parts_markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "measured.md", ROOT / "docs" / "serving.md")
GROUPS = {
    "demo": [experiment.name for experiment in DEMO],
    "standard": ["published", "one_noisy_copy", "n20", "n20_noisy_only", "plain_eps2", "smoothguard_eps2", "plain_eps8", "smoothguard_eps8"],
    "adaptive": ["smoothguard_eot40", "smoothguard_eot100"],
    "levels": ["smoothguard", "token", "early_exact", "early_rate", "caption_smoothguard", "caption_token", "caption_early_exact", "faint_smoothguard", "faint_token"],
    "utility": ["faint_plain", "faint_smoothguard", "caption_plain", "caption_smoothguard"],
}  # fmt: skip
ATTACKS = [
    ("plain", "smoothguard", "smoothguard_eot40"),
    ("plain_restarts", "smoothguard_restarts", None),
    *(
        (f"plain_{name}", f"smoothguard_{name}", f"smoothguard_{name}_eot")
        for name in ("apgd", "l2", "patch", "feature")
    ),
    ("plain_square", "smoothguard_square", None),
    ("plain_square_answers", "smoothguard_square_answers", None),
    *((f"plain_{name}", f"smoothguard_{name}", f"smoothguard_{name}_eot") for name in ("universal", "universal_free")),
]
"""Names of the records: undefended, defended, and crafted through the defence."""

SWEPT = {"votes": "Yes / no questions", "captions": "Sentences"}


def stored(name: str) -> dict[str, Any]:
    """A committed measurement of costs or precision."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def _exists(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def record(name: str) -> Record:
    """A committed run's record."""
    return read_record(RESULTS / f"{name}.json")


def filled(text: str) -> str:
    """A page with every `<!-- table NAME -->` block made anew."""
    for group, names in GROUPS.items():
        text = _with_block(text, group, markdown_table([record(name) for name in names]))
    text = _with_block(text, "attacks", _attacks())
    if all(_exists(f"sweep_{name}{form}") for name in SWEPT for form in ("", "_eot")):
        text = _with_block(text, "votes", _votes())
    runs = {name: record(name) for names in ATTACKS for name in names if name is not None and _exists(name)}
    sweeps = {part.name: read_sweep(RESULTS / f"{part.name}.json") for part in SWEEPS if _exists(part.name)}
    if "smoothguard_universal_free_eot" in runs and len(sweeps) == len(SWEEPS):
        text = _with_block(text, "findings", findings(sweeps, runs))
    text = _with_block(text, "clusters", _clusters([record(e.name) for e in EXPERIMENTS if _exists(e.name)]))
    text = _with_block(text, "precision", _precision(stored("precision")["flips"]))
    text = _smoothing(text)
    if _exists("parity"):
        text = _with_block(text, "parity", parity(stored("parity")))
    if _exists("proxy_load"):
        text = _with_block(text, "load", _load(stored("proxy_load")))
    if _exists("startup"):
        text = _with_block(text, "startup", _startup(stored("startup")))
    heard = {part.name: read_sweep(RESULTS / f"{part.name}.json") for part in AUDIO if _exists(part.name)}
    if len(heard) == len(AUDIO):
        text = _with_block(text, "sounds", sigma_table(heard["audio_sigma"], heard["audio_sigma_eot"], both=True))
        text = _with_block(text, "heard", sound_headlines(heard))
    measured = [name for name in ("bench", "bench_cuda") if _exists(name)]
    text = _with_block(text, "bench", costs(*map(stored, measured)))
    return _with_block(text, "parts", parts_markdown(*map(stored, measured)))


def _smoothing(text: str) -> str:
    """The tables of feature smoothing, of whatever is measured."""
    runs = {one.name: record(one.name) for one in SMOOTHED if _exists(one.name)}
    if runs and _exists("smoothing_cost"):
        text = _with_block(text, "smoothing", attacks_markdown(runs, stored("smoothing_cost")))
        text = _with_block(text, "passes", _passes(stored("smoothing_cost")))
    if _exists("booster_curve"):
        text = _with_block(text, "curve", curve_markdown(stored("booster_curve")))
    certified = {
        one.name: read_certificates(RESULTS / f"{one.name}.json") for one in CERTIFICATIONS if _exists(one.name)
    }
    if certified:
        text = _with_block(text, "certified", certificates_markdown(certified))
    if "<!-- table smoothed -->" in text:
        measured = {name: read_run(RESULTS / f"{name}.json") for name in runs}
        text = _with_block(text, "smoothed", smoothed_findings(measured, certified))
    return text


def _attacks() -> str:
    measured = [
        names for names in ATTACKS if all(name is None or (RESULTS / f"{name}.json").exists() for name in names)
    ]
    return attacks_table([tuple(None if name is None else record(name) for name in names) for names in measured])


def _votes() -> str:
    """Every aggregator with the clean copy among its ten, and one noisy copy alone; `docs/sweeps.md` has the rest."""
    tables = []
    for name, title in SWEPT.items():
        standard, adaptive = (read_sweep(RESULTS / f"sweep_{name}{form}.json") for form in ("", "_eot"))
        tables.append(f"{title}:\n\n{votes_table(standard, adaptive, _is_headline)}")
    return "\n" + "\n\n".join(tables) + "\n"


def _is_headline(point: PointRecord) -> bool:
    defense = point.defense or {}
    return defense["num_samples"] == 1 or (bool(defense["include_clean"]) and point.majority_first)


def _clusters(results: list[Record]) -> str:
    """How far off the intervals are because questions about one scene depend on each other."""
    tasks = [task for result in results for name, task in result.tasks.items() if base_task(name) == SEEING.clean]
    rates = [task.figures["asr"] for task in tasks if "asr" in task.figures]
    effects = [rate.design_effect for rate in rates if rate.design_effect is not None]
    return (
        "Wilson's interval takes questions as independent, but three share a scene here (captions have one each). Counted by\n"
        f"scene, ASR's variance is {min(effects):.2f} to {max(effects):.2f} times what that assumes (`design_effect` in each file): "
        f"no interval of\nASR is too narrow by more than a factor of {max(effects) ** 0.5:.2f}."
    )


def _precision(flips: dict[str, Any]) -> str:
    def percent(rate: dict[str, float]) -> str:
        return f"{100 * rate['value']:.1f} % ({100 * rate['low']:.1f}-{100 * rate['high']:.1f})"

    lines = ["| answers changed | plain | single copies | defended |", "| --- | --- | --- | --- |"]
    for name, rates in flips.items():
        lines.append(
            f"| {name} | {percent(rates['plain'])} | {percent(rates['copies'])} | {percent(rates['defended'])} |"
        )
    return "\n".join(lines)


def _passes(cost: dict[str, Any]) -> str:
    """Whole answers over a plain one, then the tower over one bare batch."""
    lines = ["| what | ms | over the first line of its kind |", "| --- | --- | --- |"]
    for name, found in (cost["answers"] | cost["towers"]).items():
        seconds, above = found["seconds"], found["ratio"]
        times = f"{1000 * seconds['value']:.0f} ({1000 * seconds['low']:.0f}-{1000 * seconds['high']:.0f})"
        kind = "an answer" if name in cost["answers"] else "features"
        lines.append(f"| {kind}: {name} | {times} | {above['value']:.2f} ({above['low']:.2f}-{above['high']:.2f}) |")
    return "\n".join(lines)


def _load(found: dict[str, Any]) -> str:
    """Requests a second of each engine, and what the proxy costs."""
    engines = found["engines"].values()
    rates, ratios = (list(next(iter(engines))[part]) for part in ("requests_a_second", "ratios"))
    heads = [
        "engine",
        "users",
        "picture",
        *(f"{way}, requests a second" for way in rates),
        *(f"time, {way}" for way in ratios),
    ]
    lines = [heads, ["---"] * len(heads)]
    for name, engine in found["engines"].items():
        setting = engine["setting"]
        cells = [
            _spread(engine[part][way])
            for part, ways in (("requests_a_second", rates), ("ratios", ratios))
            for way in ways
        ]
        lines.append([name, str(setting["users"]), f"{setting['side']} x {setting['side']}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _startup(found: dict[str, Any]) -> str:
    """Seconds of a start, and what the plugin adds."""
    lines = ["| start of | seconds | with the plugin : without |", "| --- | --- | --- |"]
    for name, figure in found["figures"].items():
        lines.append(f"| {name} | {_spread(figure['seconds'])} | {_spread(figure['ratio'])} |")
    return "\n".join(lines)


def _spread(found: dict[str, float]) -> str:
    return f"{found['value']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def _with_block(text: str, group: str, table: str) -> str:
    block = f"<!-- table {group} -->\n{table}\n<!-- end -->"
    return re.sub(rf"<!-- table {group} -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)


def main() -> int:
    """Rewrites or checks."""
    new = {page: filled(page.read_text()) for page in PAGES}
    if "--check" in sys.argv:
        return int(any(page.read_text() != text for page, text in new.items()))
    for page, text in new.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
