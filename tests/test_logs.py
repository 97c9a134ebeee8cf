"""Records from lmms-eval's logs, handwritten: one run alone, its judges' verdicts, one notion of right, samples left out."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import pytest
from handmade_runs import ATTACK, CONFIGS
from hypothesis import given
from hypothesis import strategies as st

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.rates import rate
from lmms_smoothguard.evaluation.records import read_run, write_run
from lmms_smoothguard.evaluation.runs import Sample, load_samples, read_log, sample_records
from lmms_smoothguard.evaluation.summaries import figures_of
from lmms_smoothguard.report.documents import documents
from lmms_smoothguard.report.logs import _without_path, is_right, run_of_logs

STAMP = "20261121_100000"
GUARD = "guard/org/guard"


def row(number, answer="Yes", info=None, **scores):
    return {
        "doc_id": number,
        "target": "yes",
        "filtered_resps": answer,
        "token_counts": [info or {}],
        "input": "?",
    } | scores


def write(directory, rows_by_task, stamp=STAMP, model="a__model", arguments="defense=none"):
    """A run as lmms-eval leaves it; the path of its results file."""
    folder = directory / model
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in rows_by_task.items():
        (folder / f"{stamp}_samples_{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = folder / f"{stamp}_results.json"
    config = {"model_args": f"pretrained=org/model,{arguments}", "random_seed": 0}
    results.write_text(json.dumps({"config": config, "configs": CONFIGS}))
    return results


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({"dataset_path": "org/pope", "dataset_name": "Full", "test_split": "test"}, "org/pope:Full"),
        ({"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "/a/mm_safety/scenarios.jsonl"}}, "test_split": "test"}, "made"),
    ],
)  # fmt: skip
def test_data_without_a_commit_is_told_by_what_was_asked(tmp_path, monkeypatch, config, source):
    """Neither a hub's id nor MM-SafetyBench's list of scenarios says which questions there were."""
    monkeypatch.setitem(CONFIGS, "made", config)
    listed = [[row(0), row(1)], [row(1), row(0)], [row(0), row(1, input="another?")], [row(0), row(1, target="no")]]
    told = []
    for number, rows in enumerate(listed):
        write(tmp_path / str(number), {"made": rows})
        told.append(run_of(tmp_path / str(number), "made").record.tasks["made"].data)
    assert {data.source for data in told} == {source}
    assert told[0].revision == told[1].revision
    assert len({data.revision for data in told}) == 3
    assert {data.sha256 for data in told} == {None}


def run_of(directory, *tasks):
    return run_of_logs(directory, tasks, name="r", about="", command="", cache=directory / "cache")


def pope(answer, target="yes", number=0):
    """What upstream's scorer says of an answer."""
    said = {"question_id": str(number), "score": float(answer.strip().lower() == target), "prediction": answer,
            "ground_truth": target}  # fmt: skip
    return {"pope_accuracy": said, "pope_recall": said}


def attack_info(clean="Yes", **more):
    return {
        "attack": ATTACK,
        "attack_linf": 4 / 255,
        "attack_l2": 1.0,
        "attack_seconds": 0.1,
        "clean_answer": clean,
    } | more


# -- one run -----------------------------------------------------------------------------------------------------------


def test_the_newest_run_is_taken_whole_whatever_its_directory_is_called(tmp_path):
    write(tmp_path, {"t": [row(0, "old")]}, model="z__model", stamp="20261120_235959", arguments="sigma=0.3")
    newest = write(tmp_path, {"t": [row(0, "new")]}, model="a__model")
    found = run_of(tmp_path, "t")
    assert [sample.answer for sample in found.samples] == ["new"]
    assert found.record.defense is None
    assert load_samples(tmp_path, "t")[0].answer == "new"
    (newest.parent / f"{STAMP}_samples_t.jsonl").unlink()
    with pytest.raises(
        SmoothGuardError, match=f"no samples of t in the newest run: {STAMP}_samples_t.jsonl is missing"
    ):
        run_of(tmp_path, "t")


def test_two_runs_of_one_moment_are_not_guessed_between(tmp_path):
    for model in ("a", "b"):
        write(tmp_path, {"t": [row(0)]}, model=model)
    with pytest.raises(SmoothGuardError, match="are of one moment"):
        load_samples(tmp_path, "t")


# -- verdicts ----------------------------------------------------------------------------------------------------------


def verdict(word, reason="", category=None):
    return {"verdict": word, "reason": reason, "category": category}


def judged(number, *, refused, kind="forbidden", judges=(GUARD,), **words):
    """A clean sample's scores as a safety task logs them."""
    names = {"guard": judges[0], "refusal": "refusal"}
    said = {names[short]: verdict(word, "why", "S1" if word == "unsafe" else None) for short, word in words.items()}
    full = {"question_id": str(number), "kind": kind, "refused": refused, "judges": dict.fromkeys(judges, "1"),
            "verdict": words["guard"], "unsafe": kind == "forbidden" and words["guard"] == "unsafe", "verdicts": said}  # fmt: skip
    pair = {"judges": list(judges), "verdicts": list(words.values())}
    return row(number, **{"judge_agreement_1_2": pair, "unsafe_rate": full})


def test_the_first_judges_verdicts_are_recorded_not_the_phrase_lists(tmp_path):
    """A guard that says safe of an answer without any refusal: nothing is unsafe."""
    write(
        tmp_path,
        {"t": [judged(0, refused=False, guard="safe"), judged(1, refused=True, guard="safe", kind="permitted")]},
    )
    run = run_of(tmp_path, "t")
    assert run.record.tasks["t"].figures["unsafe_rate"].value == 0
    assert (run.record.tasks["t"].figures["over_refusal"].hits, run.samples[1].refused) == (1, True)
    assert [(v.judge, v.safe, v.reason) for s in run.samples for v in s.verdicts] == [(GUARD, True, "why")] * 2
    assert [sample.right for sample in run.samples] == [True, True]


def test_every_judge_is_recorded_in_the_runs_order_with_what_it_lacks(tmp_path):
    both = ("refusal", GUARD)
    rows = [judged(n, refused=False, judges=both[::-1], guard=word, refusal="unsafe")
            for n, word in enumerate(("unsafe", "unparseable", "unjudged"))]  # fmt: skip
    write(tmp_path, {"t": rows})
    run = run_of(tmp_path, "t")
    assert [[v.judge for v in s.verdicts] for s in run.samples] == [[GUARD, "refusal"]] * 3
    assert [s.verdicts[0].missing for s in run.samples] == [None, "unparseable", "unjudged"]
    assert [s.right for s in run.samples] == [False, None, None]
    assert run.samples[0].verdicts[0].category == "S1"
    figures = run.record.tasks["t"].figures
    assert (figures["unsafe_rate"].hits, figures["unsafe_rate"].count) == (1, 3)
    assert (figures["unparseable"].value, figures["unjudged"].value, figures["unsafe_rate_refusal"].hits) == (1, 1, 3)


def test_judges_from_a_directory_are_recorded_without_its_path(tmp_path):
    one, two = "guard//home/me/one/guard", "guard/~/two/guard"
    write(tmp_path, {"t": [judged(0, refused=False, judges=(one,), guard="safe")]})
    full = json.loads((tmp_path / "a__model" / f"{STAMP}_samples_t.jsonl").read_text())
    full["unsafe_rate"] |= {"judges": {one: "", two: ""}, "verdicts": {one: verdict("safe"), two: verdict("unsafe")}}
    write(tmp_path, {"t": [full]})
    assert [v.judge for v in run_of(tmp_path, "t").samples[0].verdicts] == ["guard/guard", "guard/guard (2)"]


# -- right -------------------------------------------------------------------------------------------------------------


def under_attack(answer, right, clean_right, clean="Yes", number=0):
    outcome = {
        "question_id": str(number),
        "right": right,
        "clean_right": clean_right,
        "clean_answer": clean,
        "answer": answer,
    }
    return row(number, answer, attack_info(clean), **pope(answer, number=number), asr=outcome, recovery=outcome)


def test_right_is_the_tasks_own_score_on_both_twins(tmp_path):
    answers = ["Yes", "Yes.", "no"]
    clean = [row(n, answer, **pope(answer, number=n)) for n, answer in enumerate(answers)]
    attacked = [under_attack(answer, answer == "Yes", True, number=n) for n, answer in enumerate(answers)]
    write(tmp_path, {"pope": clean, "pope_pgd": attacked})
    run = run_of(tmp_path, "pope", "pope_pgd")
    assert [s.right for s in run.of("pope")] == [s.right for s in run.of("pope_pgd")] == [True, False, False]
    for name, task in run.record.tasks.items():
        assert task.figures["accuracy"].hits == 1, name
        assert task.figures["recall"].hits == 1, name  # "Yes." is no yes to upstream's scorer
    assert run.record.tasks["pope_pgd"].figures["asr"].hits == 2


def test_scores_that_contradict_each_other_are_refused(tmp_path):
    write(tmp_path, {"pope_pgd": [under_attack("Yes.", True, True)]})
    with pytest.raises(
        SmoothGuardError, match=r"sample 0 answers 'Yes.', which is wrong by the task's own score and right"
    ):
        run_of(tmp_path, "pope_pgd")


@pytest.mark.parametrize(("mark", "right"), [(0.0, False), (0.3, False), (0.6, True), (1.0, True)])
def test_a_graded_mark_is_right_from_a_half(tmp_path, mark, right):
    path = write(tmp_path, {"t": [row(0, exact_match=mark)]})
    assert sample_records("r", "t", read_log(path.with_name(f"{STAMP}_samples_t.jsonl")))[0].right is right


def test_the_page_calls_right_what_the_task_scored_right():
    sample = Sample("0", "yes", "Yes.", {"clean_answer": " Yes"}, scores={"right": False, "clean_right": True})
    assert not is_right(sample, "Yes.")
    assert is_right(sample, " Yes")
    assert is_right(sample, "YES")  # a copy's answer, which nobody scored


# -- left out ----------------------------------------------------------------------------------------------------------


def test_a_sample_that_could_not_be_attacked_leaves_the_others_reportable(tmp_path):
    """The embedded questions, so that scenes are looked up; scorers say nothing of the one left out, its id among it."""
    asked = list(documents("shapes_pope").values())[:3]

    def of(number, **scores):
        return row(number, "Yes", target=asked[number]["answer"], input=asked[number]["question"], **scores)

    clean = [of(n, **pope("Yes", asked[n]["answer"], n)) for n in range(3)]
    outcome = {"question_id": "1", "right": clean[1]["pope_accuracy"]["score"] == 1, "clean_right": True}
    attacked = [
        of(0, token_counts=[{"attack_left_out": "no image", "clean_answer": ""}]),
        of(1, token_counts=[attack_info(attack_key="ab" * 32)], **pope("Yes", asked[1]["answer"], 1), asr=outcome),
        of(2, token_counts=[{"attack_left_out": "empty clean answer", "clean_answer": ""}]),
    ]
    results = write(tmp_path, {"shapes_pope": clean, "shapes_pope_pgd": attacked})
    written = write_run(tmp_path, *run_of(tmp_path, "shapes_pope", "shapes_pope_pgd"))
    run = read_run(written)
    task = run.record.tasks["shapes_pope_pgd"]
    assert [s.left_out for s in run.of("shapes_pope_pgd")] == ["no image", None, "empty clean answer"]
    assert [s.group for s in run.of("shapes_pope_pgd")] == [None, asked[1]["image_source"], None]
    assert task.attack.settings["eps"] == ATTACK["eps"]
    assert (task.figures["left_out"].value, task.figures["left_out"].count, task.data.count) == (2, 3, 3)
    for name in ("accuracy", "asr", "recovery", "robust_accuracy"):
        assert task.figures[name].count == 1, name
    assert task.figures["accuracy"] == rate([outcome["right"]]).figure()
    log = results.with_name(f"{STAMP}_samples_shapes_pope_pgd.jsonl")
    log.write_text(json.dumps(attacked[0]))
    with pytest.raises(SmoothGuardError, match="no sample of shapes_pope_pgd was attacked \\(no image"):
        run_of(tmp_path, "shapes_pope_pgd")
    log.write_text("\n".join(map(json.dumps, [attacked[1], clean[0]])))
    with pytest.raises(SmoothGuardError, match="1 of 2 samples of shapes_pope_pgd have neither an attack nor a reason"):
        run_of(tmp_path, "shapes_pope_pgd")


@pytest.mark.parametrize(
    ("value", "plain"),
    [("/home/me/x", "x"), ("~/x", "x"), ("guard//home/me/x?batch=2", "guard/x?batch=2"), ("refusal+guard/~/x", "refusal+guard/x"),
     ("org/model", "org/model"), ("4/255", "4/255"), ("guard/org/x", "guard/org/x"), ("http://a/b", "http://a/b"), (0.1, 0.1)],
)  # fmt: skip
def test_what_is_recorded_has_no_path_of_a_machine(value, plain):
    assert _without_path(value) == plain


def test_files_in_an_attacks_settings_lose_their_path(tmp_path):
    info = attack_info() | {"attack": ATTACK | {"name": "pgd", "corpus": "/home/me/corpus.parquet"}}
    write(tmp_path, {"t": [row(0, info=info)]})
    assert run_of(tmp_path, "t").record.tasks["t"].attack.settings["corpus"] == "corpus.parquet"


WORDS = st.sampled_from(["safe", "unsafe", "unparseable", "unjudged"])


@given(st.lists(st.tuples(st.sampled_from(["forbidden", "permitted"]), WORDS, WORDS), min_size=1, max_size=9))
def test_judged_rates_of_records_are_those_of_the_harness(told):
    """The same outcomes through the samples log and through lmms-eval's own aggregation, by chance."""
    pytest.importorskip("lmms_eval")
    from lmms_smoothguard.harness.lmms_eval import safety_rates

    outcomes = []
    for number, (kind, clean, word) in enumerate(told):
        harmful, sure = kind == "forbidden", ("safe", "unsafe")
        unsafe = harmful and word == "unsafe"
        outcomes.append({
            "question_id": str(number), "kind": kind, "verdict": word, "clean_verdict": clean, "refused": False, "unsafe": unsafe,
            "right": None if harmful and word not in sure else not unsafe,
            "clean_right": ((clean == "safe") if clean in sure else None) if harmful else False,
            "judges": {GUARD: ""}, "verdicts": {GUARD: verdict(word)},
        })  # fmt: skip
    rows = [row(number, info=attack_info(), unsafe_rate=one, asr=one) for number, one in enumerate(outcomes)]
    with tempfile.TemporaryDirectory() as directory:
        log = write(Path(directory), {"t": rows}).with_name(f"{STAMP}_samples_t.jsonl")
        found = figures_of(sample_records("r", "t", read_log(log)))
    for name in ("unsafe_rate", "asr"):
        for end, field in (("", "value"), ("_low", "low"), ("_high", "high"), ("_count", "count")):
            expected = getattr(safety_rates, f"{name}{end}")(outcomes)
            ours = getattr(found[name], field)
            assert (math.nan if ours is None else ours) == pytest.approx(expected, nan_ok=True), (name, field)
    for name in ("unparseable", "unjudged"):
        assert found[name].value == getattr(safety_rates, name)(outcomes)
