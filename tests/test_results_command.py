"""Which experiments `smoothguard results` runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.records import read_run, write_run
from lmms_smoothguard.report import demo

COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The names of what was run; `plain` has a result file already."""
    listed = []

    def run(experiment, out):
        listed.append(experiment.name)
        return read_run(COMMITTED / f"{experiment.name}.json")

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(demo, "EXPERIMENTS", demo.EXPERIMENTS[:3])
    write_run(tmp_path, *read_run(COMMITTED / "plain.json"))
    return listed


@pytest.mark.parametrize(
    ("only", "expected"),
    [([], ["smoothguard", "published"]), (["plain"], ["plain"]), (["published"], ["published"])],
)
def test_what_is_missing_or_what_is_named(tmp_path, made, only, expected):
    demo.run_results(tmp_path / "runs", tmp_path, only)
    assert made == expected
    assert {path.stem for path in tmp_path.glob("*.json")} == {"plain", *expected}


def test_an_unknown_name_runs_nothing(tmp_path, made):
    with pytest.raises(SmoothGuardError, match="unknown experiment 'plian'; known: plain, published, smoothguard"):
        demo.run_results(tmp_path / "runs", tmp_path, ["plain", "plian"])
    assert made == []
