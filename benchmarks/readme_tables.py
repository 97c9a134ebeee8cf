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

ROOT = Path(__file__).parent.parent
GROUPS = {
    "demo": [experiment.name for experiment in DEMO],
    "standard": ["published", "one_noisy_copy", "n20", "n20_noisy_only", "plain_eps2", "smoothguard_eps2", "plain_eps8", "smoothguard_eps8"],
    "adaptive": ["smoothguard_eot40", "smoothguard_eot100"],
    "utility": ["faint_plain", "faint_smoothguard", "caption_plain", "caption_smoothguard"],
}  # fmt: skip


def stored(name: str) -> dict[str, Any]:
    """A committed result."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def filled(text: str) -> str:
    """The README with every `<!-- table NAME -->` block made anew."""
    for group, names in GROUPS.items():
        table = markdown_table([stored(name) for name in names], baseline=stored("plain"))
        block = f"<!-- table {group} -->\n{table}\n<!-- end -->"
        text = re.sub(rf"<!-- table {group} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


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
