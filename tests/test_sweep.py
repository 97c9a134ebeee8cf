"""Sweeps: cached answers are those of the real defence, nothing is asked twice, and figures are what they say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launching import on_two
from typer.testing import CliRunner

from lmms_smoothguard.aggregation.verdict import aggregate
from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.cli import app
from lmms_smoothguard.errors import ConfigError, SmoothGuardError
from lmms_smoothguard.evaluation.questions import load_questions
from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.evaluation.records import ModelRecord, write_with_samples
from lmms_smoothguard.evaluation.samples import SampleRecord
from lmms_smoothguard.processes import Processes
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.sweeps import grid as grids
from lmms_smoothguard.sweeps import tables
from lmms_smoothguard.sweeps.answers import AnswerCache, Answerer
from lmms_smoothguard.sweeps.canvas import save
from lmms_smoothguard.sweeps.collect import Collector, is_right
from lmms_smoothguard.sweeps.figures import by_poisoned_copies, differences, rates
from lmms_smoothguard.sweeps.grid import Grid, conditions
from lmms_smoothguard.sweeps.noises import Noise
from lmms_smoothguard.sweeps.plots import Trade, pareto_figure, sigma_figure, trades, undominated
from lmms_smoothguard.sweeps.presets import PRESETS, README, parts_of, run_preset
from lmms_smoothguard.sweeps.records import read_sweep, read_sweep_samples
from lmms_smoothguard.sweeps.replay import Replay
from lmms_smoothguard.sweeps.session import sweep
from lmms_smoothguard.sweeps.tables import poisoned_table

datasets = pytest.importorskip("datasets")
ROOT = Path(__file__).parent.parent
POPE, CAPTION = (str(ROOT / "tasks" / "shapes" / "data" / f"{name}.parquet") for name in ("pope", "caption"))


@pytest.fixture(autouse=True)
def own_arrow_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture(scope="module")
def tiny():
    return Subject("tiny-llava", device="cpu")


def collected(subject, grid, cache, data=POPE, limit=2, tokens=32):
    collector = Collector(subject, grid, cache, max_new_tokens=tokens, quiet=True)
    answers = collector.collect(load_questions(data, limit=limit))
    return answers, Replay(subject.model, subject.tokenizer, collector.texts)


CLEAN_ONLY = conditions(("none",), ("4/255",))


# -- the same answers as the defence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("space, sigma", [("pixel", 0.5), ("normalized", 0.9)])
def test_cached_copies_are_voted_on_as_the_defence_does(tiny, tmp_path, space, sigma):
    """Captions under heavy noise, so that copies disagree: every N, with and without the clean copy, from one set of answers."""
    grid = Grid(sigmas=(sigma,), noise_spaces=(space,), num_samples=(1, 2, 4, 7), clean_copy=(True, False),
                aggregators=("kmeans", "vote"), seeds=(3,), conditions=CLEAN_ONLY)  # fmt: skip
    answers, replay = collected(tiny, grid, tmp_path, CAPTION)
    questions, distinct = load_questions(CAPTION, limit=2), set()
    for point in grid.points():
        for question, sample in zip(questions, replay.samples(answers, "clean", point, 3, "run"), strict=True):
            reply = tiny.answer(tiny.inputs(question), 32, Choice("smoothguard", point.config))
            assert sample.answer == reply.text
            assert sample.candidates == tuple(text.strip() for text in reply.verdict.texts)
            assert sample.labels == reply.verdict.labels
            assert (sample.agreement, sample.suspicion) == (reply.verdict.agreement, reply.verdict.suspicion)
            distinct |= set(sample.candidates)
    assert len(distinct) > 4  # else this would hold for any noise


def test_without_noise_the_answer_is_the_undefended_one(tiny, tmp_path):
    grid = Grid(sigmas=(0.0,), conditions=CLEAN_ONLY)
    answers, replay = collected(tiny, grid, tmp_path)
    (point,) = grid.points()
    samples = replay.samples(answers, "clean", point, 0, "run")
    assert [s.answer for s in samples] == [tiny.answer(tiny.inputs(q)).text for q in load_questions(POPE, limit=2)]
    assert samples[0].candidates is None


# -- nothing twice -----------------------------------------------------------------------------------------------------


def answerer(subject, root):
    return Answerer(subject.model, subject.processor, AnswerCache(root))


@pytest.fixture
def arguments(tiny):
    return {**tiny.inputs(load_questions(CAPTION, limit=1)[0]), "max_new_tokens": 24, "do_sample": False}


NOISE = Noise(0.5, "pixel", 0)


def test_more_copies_answer_only_the_missing_ones(tiny, arguments, tmp_path):
    first = answerer(tiny, tmp_path)
    three = first.noisy(arguments, NOISE, 3)
    assert first.answered == 3
    assert first.noisy(arguments, NOISE, 3) == three and first.answered == 3
    seven = first.noisy(arguments, NOISE, 7)
    assert first.answered == 7 and seven[:3] == three
    assert answerer(tiny, tmp_path / "other").noisy(arguments, NOISE, 7) == seven


def test_what_changes_an_answer_has_a_key_of_its_own(tiny, arguments, tmp_path):
    asking = answerer(tiny, tmp_path)
    asking.noisy(arguments, NOISE, 1)
    others = [NOISE._replace(seed=1), NOISE._replace(sigma=0.4), NOISE._replace(space="normalized")]
    for count, noise in enumerate(others, start=2):
        asking.noisy(arguments, noise, 1)
        assert asking.answered == count
    asking.noisy({**arguments, "max_new_tokens": 3}, NOISE, 1)
    asking.noisy({**arguments, "pixel_values": arguments["pixel_values"] + 1e-3}, NOISE, 1)
    assert asking.answered == 6
    weight = tiny.model.get_output_embeddings().weight
    before = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += 1
    try:
        other = answerer(tiny, tmp_path)
        other.noisy(arguments, NOISE, 1)
    finally:
        with torch.no_grad():
            weight[0, 0] = before
    assert other.answered == 1


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_entry_is_reported_and_given_again(tiny, arguments, tmp_path, caplog, damage):
    right = answerer(tiny, tmp_path / "answers").noisy(arguments, NOISE, 2)
    (file,) = (tmp_path / "answers").rglob("*.json")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        stored = json.loads(file.read_text())
        stored["answers"]["1"][0] += 1
        file.write_text(json.dumps(stored))
    again = answerer(tiny, tmp_path / "answers")
    assert again.noisy(arguments, NOISE, 2) == right
    assert again.answered == 2 and "damaged" in caplog.text
    assert answerer(tiny, tmp_path / "answers").noisy(arguments, NOISE, 2) == right


ATTACKED = Grid(sigmas=(0.0, 0.1, 0.2), num_samples=(2, 3), aggregators=("vote", "kmeans"),
                conditions=conditions(("none", "pgd", "pgd+eot2"), ("4/255",), {"steps": "2"}))  # fmt: skip


def test_pictures_are_crafted_once_an_attack_and_with_eot_once_a_sigma(tiny, tmp_path):
    answers, _ = collected(tiny, ATTACKED, tmp_path, limit=1)
    kept = [AttackCache(tmp_path / "attacks").get(path.stem) for path in (tmp_path / "attacks").rglob("*.json")]
    known = sorted((entry.record["randomness"] or {}).get("sigma", 0.0) for entry in kept)
    assert known == [0.0, 0.1, 0.2]
    plain = {key: cells[0].attack for key, cells in answers.cells.items()}
    assert {entry.key for (name, _), entry in plain.items() if name == "pgd 4/255"} == {
        plain["pgd+eot2 4/255", noise].key for _, noise in plain if noise.sigma == 0 for _ in [0]
    }
    again, _ = collected(tiny, ATTACKED, tmp_path, limit=1)
    assert answers.answered > 0 and again.answered == 0


def test_a_question_without_a_clean_answer_is_asked_as_it_is_and_in_no_asr(tiny, tmp_path, monkeypatch):
    """One empty answer used to end a sweep, and every later start of it."""
    own, empty = Answerer.clean, tiny.inputs(load_questions(POPE, limit=1)[0])
    monkeypatch.setattr(
        Answerer,
        "clean",
        lambda self, asked: () if all(torch.equal(asked[k], v) for k, v in empty.items()) else own(self, asked),
    )
    grid = Grid(sigmas=(0.0, 0.2), num_samples=(2,), conditions=conditions(("pgd",), ("4/255",), {"steps": "2"}))
    answers, replay = collected(tiny, grid, tmp_path, limit=3)
    for point in grid.points():
        samples = replay.samples(answers, "pgd 4/255", point, 0, "run")
        assert [sample.attack_key is None for sample in samples] == [True, False, False]
        assert (samples[0].clean_answer, samples[0].clean_right) == ("", False)
        figures = rates({0: samples})
        assert (figures["accuracy"].count, figures["asr"].count) == (3, 2)


def test_pictures_are_not_kept_with_the_answers(tiny, tmp_path):
    answers, _ = collected(tiny, ATTACKED, tmp_path, limit=1)
    kept = [cell.attack for cells in answers.cells.values() for cell in cells if cell.attack is not None]
    assert kept and not any(entry.images for entry in kept)


def test_questions_with_several_right_answers_are_refused(tiny, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "0.png")], "question": ["?"], "label": [["two", "2"]]})
    load_questions(POPE, limit=1)[0].images[0].save(tmp_path / "0.png")
    rows.to_json(tmp_path / "t.jsonl")
    asked = load_questions(str(tmp_path / "t.jsonl"), columns={"label": "label"})
    with pytest.raises(ConfigError, match="several right answers, the first: 0; expected one for each"):
        Collector(tiny, ATTACKED, tmp_path, max_new_tokens=4, quiet=True).collect(asked)


def test_an_interrupted_sweep_goes_on(tiny, tmp_path, monkeypatch):
    whole, _ = collected(tiny, ATTACKED, tmp_path / "whole")
    given, own = [], Answerer.noisy

    def until_the_fifth(self, *rest):
        given.append(rest)
        if len(given) == 5:
            raise KeyboardInterrupt
        return own(self, *rest)

    monkeypatch.setattr(Answerer, "noisy", until_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        collected(tiny, ATTACKED, tmp_path / "cut")
    monkeypatch.undo()
    resumed, _ = collected(tiny, ATTACKED, tmp_path / "cut")
    assert 0 < resumed.answered < whole.answered
    assert {key: [(c.plain, c.noisy) for c in cells] for key, cells in resumed.cells.items()} == {
        key: [(c.plain, c.noisy) for c in cells] for key, cells in whole.cells.items()
    }


def command(out, cache, *more):
    return ["sweep", "tiny-llava", POPE, "--limit", "3", "--sigma", "0,0.1,0.2", "--num-samples", "1..3", "--set", "steps=20",
            "--out", str(out), "--cache", str(cache), *more]  # fmt: skip


@pytest.mark.slow
def test_kill_minus_nine_at_any_moment(tmp_path):
    """Killed again and again, each time a little later, it ends with the figures of a run that was left alone."""
    words = [sys.executable, "-m", "lmms_smoothguard", *command(tmp_path / "cut", tmp_path / "cache")]
    kills = 0
    for entries in (2, 5, 9):
        process = subprocess.Popen(
            words, start_new_session=True, env={**os.environ, "SMOOTHGUARD_CACHE": str(tmp_path)}
        )
        while process.poll() is None and len(list((tmp_path / "cache").rglob("*.json"))) < entries:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == 3
    subprocess.run(words, check=True)
    subprocess.run(
        [sys.executable, "-m", "lmms_smoothguard", *command(tmp_path / "whole", tmp_path / "new")], check=True
    )
    cut, whole = (read_sweep(tmp_path / name / "sweep.json") for name in ("cut", "whole"))
    assert cut.points == whole.points
    assert not list((tmp_path / "cut").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchrun", "accelerate"])
def test_two_processes_find_what_one_finds(tmp_path, kind):
    for name, launcher in (("two", on_two(kind)), ("one", ())):
        words = [
            sys.executable,
            *launcher,
            "-m",
            "lmms_smoothguard",
            *command(tmp_path / name, tmp_path / f"{name} cache"),
        ]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("sweep.json") == 1  # the main process alone speaks
        assert "were given again" not in done.stderr
    two, one = (read_sweep(tmp_path / name / "sweep.json") for name in ("two", "one"))
    assert two.points == one.points and two.command == one.command
    kept = {
        name: [
            dataclasses.replace(sample, attack_seconds=None)
            for sample in read_sweep_samples(tmp_path / name / "sweep.json", record)
        ]
        for name, record in (("two", two), ("one", one))
    }
    assert kept["two"] and kept["two"] == kept["one"]
    pictures = [
        {path.name: path.read_bytes() for path in (tmp_path / f"{name} cache" / "attacks").rglob("*.png")}
        for name in ("two", "one")
    ]
    assert pictures[0] and pictures[0] == pictures[1]


def test_the_main_process_says_that_the_others_answers_are_not_here(tiny, tmp_path, monkeypatch, caplog):
    """As on two machines whose cache directories are not one: nothing is lost, but work is done twice."""

    class First(Processes):
        def __init__(self):
            super().__init__()
            self.count = 2

        def wait(self):
            assert len(list((tmp_path / "answers").rglob("*.json"))) == 2  # its share: the first and the third question

    questions = load_questions(POPE, limit=3)
    options = {"name": "sweep", "about": "a trial", "command": "c"}
    grid = Grid(sigmas=(0.0,), conditions=CLEAN_ONLY)
    record, samples = sweep(tiny, questions, grid, tmp_path, processes=First(), **options)
    assert "1 answers of the other processes are not in" in caplog.text
    alone, own = sweep(tiny, questions, grid, tmp_path / "alone", **options)
    assert record.points == alone.points and samples == own


# -- figures -----------------------------------------------------------------------------------------------------------


def sample(name, candidates, answer, clean_right=True, group=None):
    return SampleRecord(id=name, task="t", run="r", question="?", answer=answer, target="yes", group=group,
                        candidates=tuple(candidates), labels=(0,) * len(candidates), agreement=1.0, suspicion=0.0,
                        clean_answer="yes", right=answer == "yes", clean_right=clean_right, attack_key="k")  # fmt: skip


def test_asr_by_poisoned_copies_counts_noisy_copies_of_questions_that_were_right():
    listed = [
        sample("a", ["no", "yes", "yes"], "yes"),  # copy 0 is the unperturbed one and does not count
        sample("b", ["no", "no", "yes"], "no"),
        sample("c", ["no", "no", "yes"], "yes"),
        sample("d", ["no", "no", "no"], "no", clean_right=False),
    ]
    found = by_poisoned_copies({0: listed})
    assert {name: (f.hits, f.count) for name, f in found.items()} == {"wrong[0]": (0, 1), "wrong[1]": (1, 2)}
    assert rates({0: listed})["poisoned"].value == pytest.approx((0 + 0.5 + 0.5 + 1) / 4)
    assert (rates({0: listed})["asr"].hits, rates({0: listed})["asr"].count) == (1, 3)


def test_the_table_of_poisoned_copies_pools_without_loss(swept):
    record, _ = swept
    table = poisoned_table([record])
    lines = [line.split(" | ") for line in table.splitlines()[2:]]
    attacked = {task for task, stored in record.tasks.items() if stored.attack is not None}
    guarded = [point for point in record.points if point.main and point.defense is not None]
    assert len(lines) == len(guarded) * len(attacked) > 0
    for point in guarded:
        for task in attacked:
            (line,) = (cells for cells in lines if cells[0] == f"| {point.name}" and cells[1] == task)
            told = sum(int(cell.split("n = ")[1].rstrip(" |")) for cell in line[2:] if "n = " in cell)
            assert told == point.figures[task]["asr"].count


def test_the_split_at_half_of_the_noisy_copies(swept):
    record, _ = swept
    point = next(p for p in record.points if p.main and p.defense is not None and p.defense["num_samples"] == 3)
    figures = {"wrong[0]": Rate(1, 7).figure(), "wrong[1]": Rate(2, 5).figure(), "wrong[2]": Rate(3, 4).figure()}
    for clean, expected in ((True, ((1, 7), (5, 9))), (False, ((3, 12), (3, 4)))):  # 1 of 2 is half, 1 of 3 is less
        one = dataclasses.replace(
            point, figures={"pgd 4/255": figures}, defense=point.defense | {"include_clean": clean}
        )
        assert tables.poisoned_split(dataclasses.replace(record, points=[one])) == expected


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 5, 9, 10, 31])
def test_bins_of_poisoned_copies_have_every_number_once_and_part_at_the_majority(copies):
    spans = tables._quarters(copies)
    assert [k for span in spans for k in span] == list(range(copies + 1))
    assert spans[0] == range(1)
    assert copies < 2 or any(span[-1] < copies / 2 <= after[0] for span, after in itertools.pairwise(spans))


def test_differences_pair_questions():
    first = [
        sample("a", ["no"] * 2, "no"),
        sample("b", ["yes"] * 2, "yes"),
        sample("c", ["no"] * 2, "no", clean_right=False),
    ]
    vote = [
        sample("a", ["yes"] * 2, "yes"),
        sample("b", ["yes"] * 2, "yes"),
        sample("c", ["no"] * 2, "yes", clean_right=False),
    ]
    found = differences({0: first}, {0: vote})
    assert found["accuracy - vote"].value == pytest.approx(-2 / 3)
    assert found["asr - vote"].value == pytest.approx(1 / 2)
    assert found["asr - vote"].low <= 0.5 <= found["asr - vote"].high


def test_asr_by_poisoned_copies_takes_several_seeds_of_a_question_for_a_cluster():
    listed = [sample(str(n), ["yes", "no"], "no" if n < 5 else "yes", group=str(n)) for n in range(10)]
    one, three = (by_poisoned_copies(dict.fromkeys(range(count), listed))["wrong[1]"] for count in (1, 3))
    assert (one.hits, one.count, three.hits, three.count, three.groups) == (5, 10, 15, 30, 10)
    assert three.high - three.low >= one.high - one.low  # the same questions again tell nothing new


def test_rates_of_questions_about_one_scene_are_over_scenes():
    outcomes = ["no"] * 12 + ["yes"] * 18
    alone = [sample(str(n), ["yes", answer], answer) for n, answer in enumerate(outcomes)]
    shared = [dataclasses.replace(one, group=str(n // 3)) for n, one in enumerate(alone)]
    for name, figures in (("accuracy", rates), ("asr", rates), ("wrong[1]", by_poisoned_copies)):
        apart, together = (figures({0: listed})[name] for listed in (alone, shared))
        assert together.value == apart.value and together.count == apart.count
        assert name == "wrong[1]" or together.high - together.low > 1.5 * (apart.high - apart.low)
    none = rates({0: [sample(str(n), ["yes"] * 2, "yes", group=str(n // 3)) for n in range(30)]})["asr"]
    assert none.high > 1.96**2 / (10 + 1.96**2)  # of ten scenes, not of thirty questions


def test_tables_say_how_their_intervals_were_made_and_what_was_not_run(swept):
    record, _ = swept
    told = tables.intervals([record], "scene")
    methods = {f.method for p in record.points for task in p.figures.values() for n, f in task.items() if n == "asr"}
    assert ("scene" in told) == any("over groups" in method for method in methods)
    heads, _, *rows = tables.sigma_table(record, None).splitlines()
    assert heads.count(" | ") == 2 and all(row.count(" | ") == 2 for row in rows)
    heads, _, *rows = tables.sigma_table(record, record).splitlines()
    assert rows[0].endswith("| the standard attack |") and not any("standard" in row for row in rows[1:])


def test_seeds_are_pooled_over_questions():
    one = [sample(str(n), ["yes"] * 2, "yes") for n in range(4)]
    other = [sample(str(n), ["no"] * 2, "no") for n in range(4)]
    pooled = rates({0: one, 1: other})["asr"]
    assert (pooled.value, pooled.count, pooled.groups) == (0.5, 8, 4)
    assert (pooled.seeds.min, pooled.seeds.max) == (0.0, 1.0)


@pytest.mark.parametrize("answer, label, right", [
    ("Yes, there is.", "yes", True), ("No.", "yes", False), ("Perhaps", "yes", False), ("A red circle.", "a red circle", True),
    ("yes", "a red circle", False),
])  # fmt: skip
def test_right_answers(answer, label, right):
    assert is_right(answer, label) is right


def test_an_aggregator_may_be_asked_in_spite_of_a_majority():
    import numpy as np

    places = {"a": (1, 0), "b": (0, 10), "c": (-100, 0)}
    answers = ["a"] * 6 + ["b"] + ["c"] * 3
    embed = lambda: lambda texts: np.array([places[text] for text in texts], float)  # noqa: E731
    assert answers[aggregate(answers, embed).chosen] == "a"
    assert answers[aggregate(answers, embed, majority_first=False).chosen] == "b"  # nearer its cluster's centroid


# -- files, tables, figures --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    datasets.config.HF_DATASETS_CACHE, before = folder / "arrow", datasets.config.HF_DATASETS_CACHE
    grid = dataclasses.replace(ATTACKED, seeds=(0, 1))
    record, samples = sweep(
        tiny, load_questions(POPE, limit=3), grid, folder, name="sweep", about="a trial", command="c"
    )
    datasets.config.HF_DATASETS_CACHE = before
    return record, samples


def test_a_sweep_can_be_read_back_and_each_point_is_a_record(swept, tmp_path):
    record, samples = swept
    path = write_with_samples(tmp_path, record, samples)
    again = read_sweep(path)
    assert dataclasses.replace(again, samples=None) == record
    assert read_sweep_samples(path, again) == samples
    assert str(ROOT) not in path.read_text()
    run = again.run(again.points[-1])
    assert run.defense["sigma"] == 0.2 and run.tasks["pgd 4/255"].attack.settings["steps"] == 2
    assert run.tasks["pgd+eot2 4/255"].attack.adaptive and run.tasks["pgd 4/255"].figures["asr"].count == 6
    path.write_text(
        path.read_text().replace('"accuracy"', '"accuracy": {}, "accuracy"', 1).replace('"count": 3', '"count": "3"', 1)
    )
    with pytest.raises(SmoothGuardError, match="count"):
        read_sweep(path)
    (tmp_path / "x.json").write_text('{"kind": "run"}')
    with pytest.raises(SmoothGuardError, match="expected 'sweep'"):
        read_sweep(tmp_path / "x.json")


def test_figures_are_the_same_bytes_and_say_n(swept, tmp_path):
    record, _ = swept
    first, second = (save(sigma_figure([record]), tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert first == second
    assert "standard attack" in first and "adaptive attack" in first and "n = 3" in first.replace("&#160;", " ")


def test_undominated():
    listed = [
        Trade("plain", 99, 10, 1, 0),
        Trade("five", 98, 90, 5, 0.1),
        Trade("ten", 98, 90, 10, 0.1),
        Trade("worse", 90, 9, 1, 0.5),
    ]
    assert undominated(listed) == {"plain", "five"}


def test_a_trade_s_accuracy_is_of_the_record_with_most_clean_questions(swept):
    record, _ = swept

    def with_clean(count, value):
        clean = Rate(int(count * value), count).figure()
        points = [dataclasses.replace(p, figures=p.figures | {"clean": {"accuracy": clean}}) for p in record.points]
        return dataclasses.replace(record, points=points)

    for records in ([with_clean(10, 0.5), with_clean(100, 0.9)], [with_clean(100, 0.9), with_clean(10, 0.5)]):
        assert {trade.utility for trade in trades(records, "pgd 4/255")} == {90.0}


def test_noise_in_other_units_has_lines_of_its_own(swept):
    record, _ = swept
    other = [
        dataclasses.replace(
            p, name=p.name.replace("pixel", "normalized"), defense=p.defense | {"noise_space": "normalized"},
            noise=("normalized", p.size),
        )
        for p in record.points
        if p.defense is not None
    ]  # fmt: skip
    both = dataclasses.replace(record, points=[*record.points, *other])
    named = [[text.get_text() for text in pareto_figure([r]).legends[0].get_texts()][:5] for r in (record, both)]
    assert named[0][:4] == ["undefended", "sigma 0.1", "sigma 0.2", "N = 1"]
    assert named[1] == [
        "undefended",
        "sigma 0.1 normalized",
        "sigma 0.2 normalized",
        "sigma 0.1 pixel",
        "sigma 0.2 pixel",
    ]


# -- what users write --------------------------------------------------------------------------------------------------


def test_points_that_could_not_differ_are_one():
    grid = Grid(sigmas=(0.0, 0.1), num_samples=(1, 10), clean_copy=(True, False), aggregators=("vote", "kmeans"),
                embedders=("lexical", "model"), conditions=CLEAN_ONLY)  # fmt: skip
    names = [point.name for point in grid.points()]
    assert len(names) == len(set(names)) == 1 + 1 + 2 * 3
    assert "sigma 0.1 pixel, N 1 noisy, vote" in names
    assert grid.copies() == 10  # without the clean copy all ten are noisy
    assert [point.name for point in grid.points() if point.main] == ["undefended", "sigma 0.1 pixel, N 10, vote"]


@pytest.mark.parametrize("options, message", [
    (["--sigma", "0,x"], "'x' is no number"),
    (["--sigma", "-0.1"], "sigma is -0.1"),
    (["--sigma", "0.1,0.1"], "value twice"),
    (["--noise-space", "pixels"], "did you mean 'pixel'"),
    (["--num-samples", "3..1"], "goes backwards"),
    (["--num-samples", "0"], "num_samples is 0"),
    (["--attack", "pdg"], "did you mean 'pgd'"),
    (["--attack", "pgd+eot0"], "at least one draw"),
    (["--attack", "universal"], "one change for all images"),
    (["--attack", "pgd+eto"], "expected none, an attack such as pgd"),
    (["--eps", "4"], "grey levels are written as 4/255"),
    (["--set", "step=3"], "did you mean 'steps'"),
    (["--set", "eps=1/255"], "expected it in --attack"),
    (["--aggregator", "kmean"], "did you mean 'kmeans'"),
    (["--embedder", "lexcal"], "did you mean 'lexical'"),
    (["--clean-copy", "yes"], "with, without or both"),
    (["--seeds", "-1"], "no whole number"),
    (["--preset", "readme"], "model and data of its own"),
    (["--only", "sweep_eps"], "--preset readme"),
    (["--column", "label=none"], "no right answer"),
    (["--column", "label=answers"], "did you mean 'answer'"),
    (["--limit", "0"], "limit is 0"),
])  # fmt: skip
def test_bad_options_are_refused_with_the_mend(tmp_path, tiny, monkeypatch, options, message):
    monkeypatch.setattr("lmms_smoothguard.subject.Subject", lambda *_: tiny)
    done = CliRunner().invoke(
        app, ["sweep", "tiny-llava", POPE, "--limit", "2", "--out", str(tmp_path / "out"), *options]
    )
    assert isinstance(done.exception, SmoothGuardError), done.output
    assert message in str(done.exception)


def test_directories_that_cannot_be_written_to_are_refused_first(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("lmms_smoothguard.subject.Subject", lambda *_: tiny)
    file = tmp_path / "file"
    file.write_text("")
    done = CliRunner().invoke(app, ["sweep", "tiny-llava", POPE, "--out", str(file)])
    assert "out is" in str(done.exception) and "another directory" in str(done.exception)
    done = CliRunner().invoke(app, command(tmp_path / "out", file))
    assert "cannot be written to" in str(done.exception)


def test_a_place_among_the_questions_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    for option in ("--out", "--cache"):
        words = ["sweep", "tiny-llava", str(tmp_path / "data"), option, str(tmp_path / "data" / "x")]
        words += [] if option == "--out" else ["--out", str(tmp_path / "out")]
        done = CliRunner().invoke(app, words)
        assert f"{option[2:]} is {tmp_path / 'data' / 'x'}, inside the data" in str(done.exception)
        assert not (tmp_path / "data" / "x").exists()


def test_a_preset_takes_no_settings_of_a_grid(tmp_path):
    done = CliRunner().invoke(app, ["sweep", "--preset", "readme", "--sigma", "0.1", "--out", str(tmp_path)])
    assert isinstance(done.exception, ConfigError) and "sigma is given, and preset 'readme'" in str(done.exception)


def test_a_trial_s_file_is_not_taken_for_a_result(swept, tmp_path, monkeypatch):
    record, samples = swept

    def swept_again(*_, name, **__):
        asked.append(name)
        return dataclasses.replace(record, name=name), [dataclasses.replace(s, run=name) for s in samples]

    monkeypatch.setattr("lmms_smoothguard.subject.Subject", lambda *_: None)
    monkeypatch.setattr("lmms_smoothguard.sweeps.session.sweep", swept_again)
    asked: list[str] = []
    for limit, expected in ((3, []), (4, ["one"])):
        part = dataclasses.replace(README[0], name="one", limit=limit)
        monkeypatch.setitem(PRESETS, "readme", (part,))
        write_with_samples(tmp_path, *swept_again(name="one"))
        asked.clear()
        run_preset("readme", tmp_path / "cache", tmp_path)
        assert asked == expected


def test_empty_data_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["sweep", "tiny-llava", str(tmp_path / "empty"), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, ConfigError) and "in it; expected" in str(done.exception)


@pytest.mark.parametrize("change, named", [
    ({"model": ModelRecord(name="other", fingerprint="f" * 64)}, "with model other, ffff"),
    ({}, "this one has caption.parquet"),
])  # fmt: skip
def test_a_sweep_of_something_else_is_not_replaced(swept, tmp_path, change, named):
    record, samples = swept
    path = write_with_samples(tmp_path, dataclasses.replace(record, **change), samples)
    before, data = path.read_bytes(), POPE if change else CAPTION
    done = CliRunner().invoke(app, ["sweep", "tiny-llava", data, "--limit", "3", "--out", str(tmp_path)])
    assert isinstance(done.exception, SmoothGuardError) and "is a sweep with" in str(done.exception)
    assert named in str(done.exception)
    assert path.read_bytes() == before


def test_presets():
    assert len({part.name for part in README}) == len(README)
    assert [part.name for part in parts_of("readme", ["sweep_eps"])] == ["sweep_eps"]
    with pytest.raises(SmoothGuardError, match="did you mean 'sweep_eps'"):
        parts_of("readme", ["sweep_epss"])
    with pytest.raises(SmoothGuardError, match="unknown preset"):
        parts_of("readmes")
    assert grids.whole_numbers("n", "1..3, 7") == (1, 2, 3, 7)
    with pytest.raises(ConfigError, match="expected key=value"):
        grids.pairs("--set", ["steps"])


def test_the_page_of_sweeps_is_that_of_the_result_files():
    names = [ROOT / "benchmarks" / "results" / f"{part.name}.json" for part in README]
    if not all(path.exists() for path in names):
        pytest.skip("the sweeps were not run yet: smoothguard sweep --preset readme")
    script = ROOT / "benchmarks" / "sweep_pages.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0
