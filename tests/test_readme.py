"""Every number in the README comes from a committed result file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmms_smoothguard.report.demo import DEMO, REST
from lmms_smoothguard.report.tables import table_rows

ROOT = Path(__file__).parent.parent


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_tables_are_those_of_the_result_files():
    script = ROOT / "benchmarks" / "readme_tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


def test_every_result_has_its_command_count_and_interval():
    for experiment in (*DEMO, *REST):
        stored = result(experiment.name)
        assert stored["command"].startswith("lmms-eval --model smoothguard_llava")
        assert stored["environment"]["cores"] >= 1
        for figures in stored["figures"].values():
            for name in ("accuracy", "asr", "agreement", "copies"):
                if name in figures:
                    value = figures[name]
                    assert value["low"] <= value["value"] <= value["high"]
                    assert value["count"] >= 100
            if "attack" in figures:
                budget = figures["attack"]["eps"] * 255
                assert figures["largest_linf_in_grey_levels"] <= budget + 1e-3


def test_the_demo_reached_what_was_fixed_beforehand():
    plain, defended = (result(e.name)["figures"] for e in DEMO)
    assert plain["shapes_pope_pgd"]["asr"]["count"] >= 400
    assert plain["shapes_pope_pgd"]["asr"]["value"] >= 0.90
    assert defended["shapes_pope_pgd"]["asr"]["value"] <= 0.10
    assert defended["shapes_pope"]["accuracy"]["value"] >= plain["shapes_pope"]["accuracy"]["value"] - 0.02


def test_times_are_compared_with_the_plain_run():
    rows = table_rows([result("plain"), result("smoothguard")])
    assert rows[0][-1] == "1.0"
    ours, plain = (
        sum(f["seconds_per_answer"] for f in result(name)["figures"].values()) for name in ("smoothguard", "plain")
    )
    assert float(rows[1][-1]) == pytest.approx(ours / plain, abs=0.05)
