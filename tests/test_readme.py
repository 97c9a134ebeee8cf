"""Every number in the README comes from a committed result file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.evaluation.records import read_record, read_run
from lmms_smoothguard.evaluation.samples import sha256_of
from lmms_smoothguard.evaluation.summaries import figures_of
from lmms_smoothguard.report.demo import DEMO, EXPERIMENTS
from lmms_smoothguard.report.documents import documents
from lmms_smoothguard.report.tables import table_rows

ROOT = Path(__file__).parent.parent


RESULTS = ROOT / "benchmarks" / "results"


def result(name):
    return read_record(RESULTS / f"{name}.json")


def test_the_tables_are_those_of_the_result_files():
    script = ROOT / "benchmarks" / "readme_tables.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


def test_every_result_has_its_command_count_and_interval():
    for experiment in EXPERIMENTS:
        stored = result(experiment.name)
        asked = experiment.command("$(smoothguard model tiny-llava)", f"runs/{experiment.name}")
        assert stored.command == " ".join(asked)  # made with the settings that the experiment has now
        assert stored.environment["cores"] >= 1
        assert stored.model.name == "tiny-llava"
        for task in stored.tasks.values():
            for name in ("accuracy", "asr", "agreement", "copies", "robust_accuracy", "f1"):
                if name in task.figures:
                    found = task.figures[name]
                    assert found.low <= found.value <= found.high
                    assert found.count >= 0.95 * experiment.limit or name == "f1"  # which counts no right "no"
            if task.attack is not None:
                budget = task.attack.settings["eps"] * 255
                assert task.figures["largest_linf_in_grey_levels"].value <= budget + 1e-3


def test_every_figure_comes_from_the_samples_beside_it():
    """Computed again from the table alone, bootstraps included."""
    for experiment in EXPERIMENTS:
        record, samples = run = read_run(RESULTS / f"{experiment.name}.json")
        clean = [sample for sample in samples if record.tasks[sample.task].attack is None]
        for name, task in record.tasks.items():
            again = figures_of(run.of(name), clean if task.attack is not None else ())
            assert set(again) == set(task.figures)
            for key, figure in task.figures.items():
                ends = [(figure.value, again[key].value), (figure.low, again[key].low), (figure.high, again[key].high)]
                assert all(one == pytest.approx(other, abs=1e-9) for one, other in ends), (experiment.name, name, key)


def test_the_committed_samples_are_of_the_shipped_questions():
    """What a record's digest says of the data: their own questions and right answers, and no others."""
    for experiment in EXPERIMENTS:
        run = read_run(RESULTS / f"{experiment.name}.json")
        for name, task in run.record.tasks.items():
            assert task.data.sha256 == sha256_of(ROOT / task.data.source)
            asked = documents(name)
            for sample in run.of(name):
                right = asked[sample.id].get("answer") or asked[sample.id].get("caption")
                assert (sample.question, sample.target) == (asked[sample.id]["question"], right)
                if right is not None:  # a judge decides elsewhere
                    assert sample.right == (normalize_answer(sample.answer) == normalize_answer(right))


def test_the_demo_reached_what_was_fixed_beforehand():
    plain, defended = (result(e.name).tasks for e in DEMO)
    assert plain["shapes_pope_pgd"].figures["asr"].count >= 400
    assert plain["shapes_pope_pgd"].figures["asr"].value >= 0.90
    assert defended["shapes_pope_pgd"].figures["asr"].value <= 0.10
    kept = plain["shapes_pope"].figures["accuracy"].value - defended["shapes_pope"].figures["accuracy"].value
    assert kept <= 0.02


def test_times_are_compared_with_the_plain_run():
    rows = table_rows([result("plain"), result("smoothguard")])
    assert rows[0][-1] == "1.0"
    ours, plain = (
        sum(task.figures["seconds_per_answer"].value for task in result(name).tasks.values())
        for name in ("smoothguard", "plain")
    )
    assert float(rows[1][-1]) == pytest.approx(ours / plain, abs=0.05)
