"""What an installed plugin costs those who do not ask for it: the start of lmms-eval and of transformers, with it and without.

python benchmarks/startup.py        # results/startup.json: ten minutes, on a machine left alone

"Without" is the same interpreter whose entry points have lost ours.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from bench import hardware
from lmms_smoothguard.evaluation.machine import environment
from timing.paired import median, ratio, run_paired

ROOT = Path(__file__).parent.parent
WITHOUT = ROOT / "tests" / "hidden_plugin.py"
STARTS = {
    "lmms-eval's list of models": "import lmms_eval.models",
    "lmms-eval's models and tasks": (
        "import lmms_eval.models; from lmms_eval.tasks import TaskManager; TaskManager('ERROR', model_name='llava_hf')"
    ),
    "transformers, a model's class": "from transformers import LlavaForConditionalGeneration",
}
ROUNDS = 15


def start(code: str, hidden: bool, _: int) -> None:
    """A process from its start to its end."""
    command = [sys.executable, *([str(WITHOUT)] if hidden else ["-c"]), code]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def main() -> None:
    """Measures every start, and writes."""
    figures = {}
    for name, code in STARTS.items():
        tasks = {"with": functools.partial(start, code, False), "without": functools.partial(start, code, True)}
        seconds = run_paired(tasks, ROUNDS).seconds
        figures[name] = {
            "ratio": ratio(seconds["with"], seconds["without"]).to_dict(),
            "seconds": median(seconds["with"]).to_dict(),
        }
        print(name, figures[name])
    result = {
        "about": "start with the plugin installed : without it, pair by pair; medians",
        "command": "python benchmarks/startup.py",
        "figures": figures,
        "hardware": hardware("cpu"),
        "environment": environment(),
    }
    (ROOT / "benchmarks" / "results" / "startup.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
