"""Findings are refused where the results say something else."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from findings import findings
from lmms_smoothguard.evaluation.records import read_record, read_run
from lmms_smoothguard.sweeps.presets import README
from lmms_smoothguard.sweeps.records import read_sweep
from readme_tables import ATTACKS
from smoothed_findings import adaptive, faint, purified, smoothed_findings, unseen

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.fixture
def results():
    runs = {name: read_record(RESULTS / f"{name}.json") for names in ATTACKS for name in names if name is not None}
    return {part.name: read_sweep(RESULTS / f"{part.name}.json") for part in README}, runs


def test_every_finding_has_its_numbers_with_intervals(results):
    told = findings(*results).splitlines()
    assert len(told) == 7
    assert all(line.startswith("- **") for line in told)
    assert all(re.search(r"\(\d+\.\d-\d+\.\d, n = \d+\)|\([-+]\d+\.\d to [-+]\d+\.\d\)", line) for line in told)
    l2 = next(task for task in results[1]["smoothguard_l2"].tasks.values() if task.attack is not None).figures["asr"]
    assert f"{100 * l2.value:.1f} % ({100 * l2.low:.1f}-{100 * l2.high:.1f}, n = {l2.count})" in told[1]
    assert "An L2 budget of 1.5 is less than 4/255 everywhere amounts to (1.74)" in told[1]
    assert "A patch of 5 % of the picture" in told[1]


def test_a_result_that_says_otherwise_is_an_error(results):
    sweeps, runs = results
    other = {**runs, "smoothguard_l2": dataclasses.replace(runs["smoothguard"], name="smoothguard_l2")}
    with pytest.raises(ValueError, match="an L2 ball is harder"):
        findings(sweeps, other)
    votes = sweeps["sweep_votes"]
    moved = [
        dataclasses.replace(
            point,
            figures={
                task: {
                    name: dataclasses.replace(f, value=0.1) if name == "asr - vote" else f for name, f in found.items()
                }
                for task, found in point.figures.items()
            },
        )
        for point in votes.points
    ]
    with pytest.raises(ValueError, match="every aggregator answers as a vote does"):
        findings({**sweeps, "sweep_votes": dataclasses.replace(votes, points=moved)}, runs)


def test_findings_of_feature_smoothing_are_refused_too():
    runs = {name: read_record(RESULTS / f"{name}.json") for name in ("fs_plain", "fs", "fs_pm")}
    told = purified(runs)
    asr = runs["fs_pm"].tasks["shapes_pope_pgd"].figures["asr"]
    assert (
        f"{100 * asr.value:.1f} % ({100 * asr.low:.1f}-{100 * asr.high:.1f}, n = {asr.count}) with the booster" in told
    )
    with pytest.raises(ValueError, match="down to 2 %"):
        purified({**runs, "fs_pm": runs["fs"]})
    measured = {name: read_run(RESULTS / f"{name}.json") for name in runs}
    rest = [s for s in measured["fs_pm"].of("shapes_pope_pgd") if int(s.id) >= 150]
    wrong = sum(s.right is False for s in rest)
    assert len(rest) == 270
    assert f"{100 * wrong / 270:.1f} % (" in unseen(measured)
    with pytest.raises(ValueError, match="not chosen on"):
        unseen({**measured, "fs_pm": measured["fs"]})
    with pytest.raises(ValueError, match="faint objects are lost"):
        faint({**runs, "fs_pm": runs["fs_plain"]})
    crafted_through = {
        f"{name}_eot": read_record(RESULTS / f"{name}_eot.json") for name in ("fs", "fs_pm", "fs_smoothguard")
    }
    with pytest.raises(ValueError, match="adaptive attacker"):
        adaptive({**crafted_through, "fs_pm_eot": crafted_through["fs_eot"]})


def test_a_finding_waits_for_all_of_its_results():
    names = ("fs_plain", "fs", "fs_pm", "fs_eot", "fs_pm_eot")
    some = {name: read_run(RESULTS / f"{name}.json") for name in names}
    told = smoothed_findings(some, {})
    assert told.count("\n") == 2  # three lines
    assert "knows the defence" not in told
    assert "knows the defence" in smoothed_findings(
        some | {"fs_smoothguard_eot": read_run(RESULTS / "fs_smoothguard_eot.json")}, {}
    )
