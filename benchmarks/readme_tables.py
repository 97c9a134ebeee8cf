"""Writes the README's tables from the committed result files.

python benchmarks/readme_tables.py          # rewrite
python benchmarks/readme_tables.py --check  # exit 1 if the README says anything else
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from lmms_smoothguard.report.demo import DEMO
from lmms_smoothguard.report.tables import markdown_table
from timing.table import markdown as costs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GROUPS = {
    "demo": [experiment.name for experiment in DEMO],
    "standard": ["published", "one_noisy_copy", "n20", "n20_noisy_only", "plain_eps2", "smoothguard_eps2", "plain_eps8", "smoothguard_eps8"],
    "adaptive": ["smoothguard_eot40", "smoothguard_eot100"],
    "utility": ["faint_plain", "faint_smoothguard", "caption_plain", "caption_smoothguard"],
}  # fmt: skip


def stored(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def filled(text: str) -> str:
    """The README with every `<!-- table NAME -->` block made anew."""
    for group, names in GROUPS.items():
        table = markdown_table([stored(name) for name in names], baseline=stored("plain"))
        text = _with_block(text, group, table)
    measured = [name for name in ("bench", "bench_cuda") if (RESULTS / f"{name}.json").exists()]
    return _with_block(text, "bench", costs(*map(stored, measured))) if measured else text


def _with_block(text: str, group: str, table: str) -> str:
    block = f"<!-- table {group} -->\n{table}\n<!-- end -->"
    return re.sub(rf"<!-- table {group} -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)


def main() -> int:
    """Rewrites or checks."""
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = filled(old)
    if "--check" in sys.argv:
        return int(old != new)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
