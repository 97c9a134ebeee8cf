"""The table of feature smoothing: what is run for it can be meant, and its cells are the records' own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import typer

from lmms_smoothguard.certifying.command import certify
from lmms_smoothguard.certifying.records import CertificateRecord, read_certificates
from lmms_smoothguard.choice import choose
from lmms_smoothguard.defenses.feature_smoothing import CombinedConfig
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.records import read_record
from lmms_smoothguard.report import demo
from lmms_smoothguard.report.smoothed import (
    ADAPTIVE,
    CERTIFICATIONS,
    CERTIFICATIONS_OF_SOUNDS,
    CERTIFIED,
    ROWS,
    SMOOTHED,
)
from lmms_smoothguard.report.smoothed_table import attacks_markdown, certificates_markdown, votes_markdown
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.tiny.clip_model import PROMPT
from lmms_smoothguard.tiny.sounds.clips import RATE, SECONDS

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.mark.parametrize("experiment", SMOOTHED, ids=lambda one: one.name)
def test_every_experiment_is_one_that_lmms_eval_takes(experiment):
    from lmms_smoothguard.harness.options import take_options

    arguments = dict(experiment.model_args)
    options = take_options(arguments)
    assert not arguments  # nothing is left that upstream's wrapper would have to know
    row = next(row for row in ROWS if experiment.name.partition("_eot")[0] == row.name)
    assert (options.defense is None) == (row.model_args.get("defense") == "none")
    assert (options.vision_tower is not None) == ("ARE" in row.about or "TeCoA" in row.about)
    tasks = Path(__file__).parent.parent / "tasks" / "shapes"
    assert all((tasks / f"{task}.yaml").exists() for task in experiment.tasks)


def test_the_rows_differ_in_what_their_names_say():
    configs = {
        row.name: choose({k: _value(v) for k, v in row.model_args.items() if k != "vision_tower"}) for row in ROWS
    }
    assert [name for name, choice in configs.items() if choice is None] == ["fs_plain", "fs_fare", "fs_tecoa"]
    fs, p, pm = (configs[name].config for name in ("fs", "fs_p", "fs_pm"))
    assert isinstance(fs, FeatureSmoothingConfig)
    assert (fs.booster, p.booster, p.mapper, pm.booster, pm.mapper) == (None, "psm", False, "psm", True)
    assert configs["fs_fare_pm"].config == pm
    assert isinstance(configs["fs_both"].config, CombinedConfig)
    assert {row.name for row in ROWS if row.adaptive} == {one.name.removesuffix("_eot") for one in ADAPTIVE}


def _value(text):
    from lmms_smoothguard.config import parse_scalar

    return parse_scalar(text)


@pytest.mark.parametrize("certification", CERTIFICATIONS, ids=lambda one: one.name)
def test_every_certification_is_a_command_line(certification, monkeypatch):
    run = asked_by(certification, monkeypatch)
    served = 0.2 if run.what == "answers" else 0.3  # SmoothGuard's noise, feature smoothing's
    radii = (0.1, 0.25, 0.5) if run.what == "features" else (0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
    assert (run.sigma, run.alpha, run.radii) == (served, 0.001, radii)
    assert run.prompts == (PROMPT,)  # of which tiny-clip was taught
    about = next(about for about, features, votes in CERTIFIED if certification.name in (features, votes))
    assert (run.booster is not None) == ("P" in about.replace("SmoothGuard", "") and "+" in about)
    assert (run.vision_tower is not None) == ("FARE" in about)


def asked_by(certification, monkeypatch):
    """What the command line asks for."""
    asked = []
    monkeypatch.setattr(
        "lmms_smoothguard.certifying.run.run_certify", lambda run, command: asked.append(run) or (None, [])
    )
    monkeypatch.setattr("lmms_smoothguard.certifying.tables.print_certificates", lambda record: None)
    app = typer.Typer()
    app.command()(certify)
    app([*certification.arguments, "--out", "somewhere"], standalone_mode=False)
    (run,) = asked
    return run


def test_only_what_is_missing_is_run(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(demo, "_run", lambda experiment, out: ran.append(experiment.name) or ("record",))
    monkeypatch.setattr(demo, "write_run", lambda results, record: None)
    monkeypatch.setattr(demo, "run_certification", lambda one, out, results: ran.append(one.name))
    monkeypatch.setattr(demo, "print_table", lambda records: None)
    monkeypatch.setattr(demo, "read_record", lambda path: None)
    (tmp_path / "fs.json").write_text("{}")
    demo.run_results(tmp_path, tmp_path, smoothing=True)
    assert ran == [one.name for one in (*SMOOTHED, *CERTIFICATIONS) if one.name != "fs"]
    ran.clear()
    demo.run_results(tmp_path, tmp_path, ["fs", "certified_fs"], smoothing=True)
    assert ran == ["fs", "certified_fs"]
    with pytest.raises(SmoothGuardError, match="unknown experiment 'fs'"):
        demo.run_results(tmp_path, tmp_path, ["fs"])
    ran.clear()
    demo.run_results(tmp_path, tmp_path, sounds=True)
    assert ran == ["certified_sounds_0.02", "certified_sounds_0.08"]
    with pytest.raises(SmoothGuardError, match="both --smoothing and --sounds"):
        demo.run_results(tmp_path, tmp_path, smoothing=True, sounds=True)


@pytest.mark.parametrize("certification", CERTIFICATIONS_OF_SOUNDS, ids=lambda one: one.name)
def test_the_certificates_of_sounds_reach_as_far_as_the_attack(certification, monkeypatch):
    """The largest radius is the L2 norm of the standard attack's budget in every sample of a clip."""
    run = asked_by(certification, monkeypatch)
    assert certification.name == f"certified_sounds_{run.sigma:g}"
    assert (run.what, run.alpha, run.limit, run.data) == ("answers", 0.001, 100, "sounds_pope")
    assert run.radii[-1] == pytest.approx(0.001 * (SECONDS * RATE) ** 0.5, abs=1e-3)


def test_the_tables_cells_are_the_records_figures():
    source = read_record(RESULTS / "smoothguard.json")
    record = dataclasses.replace(source, name="fs")
    costs = {"answers": {"FS, n0 = 8": {"ratio": {"value": 3.21, "low": 3.0, "high": 3.48}}}}
    head, _, line = attacks_markdown({"fs": record}, costs).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
    assert cells["defence"] == "FS"
    assert cells["clean accuracy"] == "99.8 (98.7-100.0)"
    assert cells["PGD 4/255"] == "4.3 (2.7-6.7)"
    assert cells["APGD 4/255"] == "-"
    assert cells["time : plain"] == "3.2 (3.0-3.5)"


def certificates(**figures) -> CertificateRecord:
    """Handmade."""
    from lmms_smoothguard.evaluation.records import DataRecord, ModelRecord

    made = {
        name: Figure(value=v, low=v - 0.01, high=v + 0.01, count=9, method="by hand") for name, v in figures.items()
    }
    return CertificateRecord(
        name="certify", about="", command="", model=ModelRecord(name="m", fingerprint="f"),
        data=DataRecord(source="d", count=9, revision=None, sha256=None, split=None),
        settings={}, asked={"radii": [0.1]}, figures=made, curves={}, largest={}, seeds={}, versions={}, environment={},
    )  # fmt: skip


def test_certificates_of_features_and_of_votes_have_a_table_each():
    found = {
        "certified_fs": certificates(S=0.8, **{"inner@0.1": 0.5, "cos0@0.1": 1.0}),
        "certified_classes": certificates(accuracy=0.9, **{"certified_accuracy@0.1": 0.7}),
        "certified_answers": certificates(accuracy=0.95, **{"certified_accuracy@0.1": 0.6}),
    }
    felt, voted = (table.splitlines() for table in certificates_markdown(found).split("\n\n"))
    assert felt[2:] == ["| FS | 0.800 (0.790-0.810) | 0.500 (0.490-0.510) |"]
    assert voted[2] == "| FS | 90.0 (89.0-91.0) | 70.0 (69.0-71.0) |"
    assert voted[3].endswith("| 95.0 (94.0-96.0) | 60.0 (59.0-61.0) |")
    assert len(voted) == 4
    assert len(felt[0].split("|")) == len(felt[2].split("|")) == len(voted[3].split("|"))


def test_a_mean_bound_below_zero_is_told_as_what_it_certifies():
    for share, told in ((0.42, ">= 0 for 42.0 (41.0-43.0) %"), (0.0, "ABSTAIN")):
        found = certificates(S=0.8, **{"inner@0.1": -0.2, "cos0@0.1": share})
        assert f"| {told} |" in certificates_markdown({"certified_fs": found}).splitlines()[2]


def test_a_radius_that_no_draws_would_certify_is_no_dash():
    found = certificates(accuracy=0.9, **{"certified_accuracy@0.1": 0.7})
    beyond = Figure(value=None, low=None, high=None, count=9, method="ABSTAIN: no radius of 0.05 or more ...")
    found = dataclasses.replace(found, figures={**found.figures, "certified_accuracy@0.1": beyond})
    assert votes_markdown({"sigma 0.02": found}).endswith("| sigma 0.02 | 90.0 (89.0-91.0) | ABSTAIN |")


def test_the_sets_that_certificates_are_of_are_read_as_they_were_written(tmp_path):
    from lmms_smoothguard.harness.questions import find_questions
    from lmms_smoothguard.tiny import clip_model, clip_testsets

    clip_testsets.write_certified_sets(tmp_path)
    scenes, single, questions = (
        find_questions(str(tmp_path / f"{name}.parquet")) for name in ("scenes", "single", "questions")
    )
    assert (len(scenes), len(single), len(questions)) == (400, 420, 420)
    assert len({scenes[number].images[0].tobytes() for number in range(len(scenes))}) == 400
    labels = [words.label for words in single.words]
    assert {labels.count(label) for label in set(labels)} == {14}
    assert {clip_model.PROMPT.format(label) for label in labels} == set(clip_model.class_prompts())
    assert questions[0].right


def test_stored_results_are_of_what_is_run_now():
    """A record made by other settings must not stand in the table."""
    for experiment in SMOOTHED:
        if (RESULTS / f"{experiment.name}.json").exists():
            record = read_record(RESULTS / f"{experiment.name}.json")
            assert record.command == " ".join(
                experiment.command("$(smoothguard model tiny-llava)", f"runs/{experiment.name}")
            )
    for certification in CERTIFICATIONS:
        if (RESULTS / f"{certification.name}.json").exists():
            record = read_certificates(RESULTS / f"{certification.name}.json")
            assert set(certification.arguments[2:]) <= set(record.command.split())
