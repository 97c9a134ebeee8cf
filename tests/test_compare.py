"""`smoothguard record`, `compare` and `pool`: on handwritten logs, the committed results and runs of several seeds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_differences import a_run
from test_logs import GUARD, attack_info, judged, pope, row, write
from typer.testing import CliRunner

from lmms_smoothguard.cli import app
from lmms_smoothguard.evaluation.records import read_record, write_run

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def ask(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def told(*arguments):
    done = ask(*arguments)
    assert done.exit_code == 0, done.exception
    return done.stdout


def refused(*arguments):
    return str(ask(*arguments).exception)


def test_runs_of_lmms_eval_are_recorded_and_compared(tmp_path):
    def attacked(*rights):
        outcomes = [{"question_id": str(n), "right": bool(r), "clean_right": True} for n, r in enumerate(rights)]
        words = ["Yes" if r else "No" for r in rights]
        return [row(n, word, attack_info(), **pope(word, number=n), asr=outcomes[n]) for n, word in enumerate(words)]

    for name, rights in (("plain", (0, 0, 0, 1)), ("mine", (1, 1, 0, 1))):
        write(
            tmp_path / name,
            {"t": attacked(*rights)},
            arguments="sigma=0.2,judge=guard//home/me/guard,attack_cache=/home/me/c",
        )
        done = told(
            "record", tmp_path / name, "--tasks", "t", "--name", name, "--out", tmp_path, "--cache", tmp_path / "c"
        )
        assert done.split() == [str(tmp_path / f"{name}.json")]
    assert "/home" not in (tmp_path / "mine.json").read_text()
    assert read_record(tmp_path / "mine.json").command.startswith(
        "lmms-eval --model smoothguard_... --model_args pretrained="
    )
    assert told("compare", tmp_path / "plain.json", tmp_path / "mine.json").startswith(
        "asr of t, plain minus mine: +50.0"
    )
    assert "expected each task once" in refused("record", tmp_path / "mine", "--tasks", "t,t", "--name", "x")
    assert "no samples of u in the newest run" in refused("record", tmp_path / "mine", "--tasks", "u", "--name", "x")


def test_unsafe_rates_are_compared_where_every_answer_has_an_opinion(tmp_path):
    for name, words in (("a", ("unsafe", "unsafe")), ("b", ("safe", "unsafe")), ("c", ("safe", "unjudged"))):
        write(tmp_path / name, {"t": [judged(n, refused=False, guard=word) for n, word in enumerate(words)]})
        told("record", tmp_path / name, "--tasks", "t", "--name", name, "--out", tmp_path)
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    assert told("compare", a, b, "--rate", "unsafe_rate").startswith("unsafe_rate of t, a minus b: +50.0")
    assert f"c: t[1] has no verdict ({GUARD}: unjudged)" in refused("compare", a, c, "--rate", "unsafe_rate")


def test_two_runs_are_compared_by_the_samples_they_share():
    first, second = (RESULTS / f"{name}.json" for name in ("plain", "smoothguard"))
    asr = [read_record(path).tasks["shapes_pope_pgd"].figures["asr"].value for path in (first, second)]
    text = told("compare", first, second, "--task", "shapes_pope_pgd")
    assert text.startswith(
        f"asr of shapes_pope_pgd, plain minus smoothguard: {100 * (asr[0] - asr[1]):+.1f} points (+8"
    )
    assert "n = 420 in 140 groups" in text
    found = json.loads(told("compare", second, first, "--task", "shapes_pope", "--rate", "accuracy", "--json"))
    assert found["value"] == pytest.approx(-1 / 420)
    assert found["low"] < found["value"] < found["high"]


def test_what_cannot_be_compared_is_refused_by_name(tmp_path):
    plain, captions = RESULTS / "plain.json", RESULTS / "caption_plain.json"
    assert "--task is None" in refused("compare", plain, RESULTS / "smoothguard.json")
    assert "in common: there is none" in refused("compare", plain, captions)
    assert "--task is 'nothing'" in refused("compare", plain, plain, "--task", "nothing")
    assert "--rate is 'asrr'; did you mean 'asr'" in refused(
        "compare", plain, plain, "--task", "shapes_pope_pgd", "--rate", "asrr"
    )
    assert "no record at" in refused("compare", plain, tmp_path / "none.json")
    assert "samples are missing from the second run" in refused(
        "compare", plain, RESULTS / "smoothguard_eot100.json", "--task", "shapes_pope_pgd"
    )
    assert "has no verdict" in refused("compare", plain, plain, "--task", "shapes_pope", "--rate", "unsafe_rate")


def seeds_in(directory, *rights, **more):
    return [write_run(directory, *a_run(f"seed{seed}", right, seed=seed, **more)) for seed, right in enumerate(rights)]


def test_seeds_are_pooled_and_their_spread_is_told(tmp_path):
    paths = seeds_in(tmp_path, [1, 0, 1, 1], [1, 0, 0, 1])
    text = told("pool", *paths, "--rate", "accuracy")
    assert text.startswith("accuracy of t, 2 runs: 62.5 % (")
    assert "n = 8 in 2 groups" in text
    assert "by seed: 50.0 to 75.0 %, standard deviation 17.7 points" in text
    assert json.loads(told("pool", *paths, "--json"))["value"] == 3 / 8


def test_runs_that_are_no_seeds_of_one_setting_are_not_pooled(tmp_path):
    paths = seeds_in(tmp_path, [1, 0], [1, 1])
    assert "is named twice" in refused("pool", paths[0], paths[0])
    assert "1 seeds to pool; expected at least two" in refused("pool", paths[0])
    other = dataclasses.replace(a_run("other", [1, 0], seed=2, eps=8 / 255).record)
    path = write_run(tmp_path, other, [dataclasses.replace(s, run="other") for s in a_run("other", [1, 0]).samples])
    assert "differ in attack: settings eps" in refused("pool", paths[0], path)
