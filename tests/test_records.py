"""Result files: what is written is read back, and what is damaged, foreign or mixed up is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure, Spread
from lmms_smoothguard.evaluation.outcomes import outcomes
from lmms_smoothguard.evaluation.rates import rate
from lmms_smoothguard.evaluation.records import (
    AttackRecord,
    DataRecord,
    ModelRecord,
    Record,
    TaskRecord,
    read_record,
    read_run,
    write_run,
)
from lmms_smoothguard.evaluation.samples import JudgeVerdict, SampleRecord, read_samples, write_samples
from lmms_smoothguard.evaluation.summaries import figures_of

FIGURE = Figure(value=0.5, low=None, high=1.0, count=2, method="m", hits=1, seeds=Spread(2, 0.0, 1.0, 0.5))
RECORD = Record(
    name="plain",
    about="undefended",
    command="lmms-eval",
    model=ModelRecord(name="llava-hf/llava", fingerprint="ab"),
    tasks={
        "clean": TaskRecord(data=DataRecord(source="POPE", count=1), figures={"accuracy": FIGURE}),
        "attacked": TaskRecord(
            data=DataRecord(source="POPE", revision="c0ffee", split="test", count=1),
            attack=AttackRecord(settings={"name": "pgd", "eps": 4 / 255}, access="gradients", adaptive=False),
        ),
    },
    defense={"defense": "smoothguard", "sigma": 0.1},
    seeds={"attack": 0, "defense": None},
    versions={"torch": "2", "lmms-eval": None},
    environment={"cores": 2, "processor": "x"},
)
SAMPLES = [
    SampleRecord(id="0", task="clean", run="plain", question="Is it?", answer="Yes 🐈"),
    SampleRecord(
        id="0", task="attacked", run="plain", question="Is it?", answer="No", group="s", kind="forbidden", target="yes",
        clean_answer="Yes", right=False, clean_right=True, candidates=("No", ""), labels=(0, 1), agreement=0.5,
        suspicion=1.0, suspected=False, copies=2, seconds=0.1, attack_linf=0.0157, attack_l2=1.5, attack_key="k",
        attack_seconds=2.0, verdicts=(JudgeVerdict("refusal", None, "unsure", None, "unjudged"), JudgeVerdict("guard", False, "", "S1")),
        left_out="no image", refused=True,
    ),
]  # fmt: skip


def written(directory):
    return write_run(directory, RECORD, SAMPLES)


def test_what_is_written_is_read_back(tmp_path):
    path = written(tmp_path)
    run = read_run(path)
    assert run.samples == SAMPLES
    assert dataclasses.replace(run.record, samples=None) == RECORD
    assert (run.record.samples.file, run.record.samples.count) == ("samples/plain.parquet", 2)
    assert next(iter(json.loads(path.read_text()))) == "schema_version"
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"plain.json", "plain.parquet"}
    assert run.of("attacked") == SAMPLES[1:]


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


@given(
    st.builds(
        SampleRecord,
        id=TEXT,
        task=TEXT,
        run=TEXT,
        question=TEXT,
        answer=TEXT,
        target=st.none() | TEXT,
        right=st.none() | st.booleans(),
        seconds=st.none() | st.floats(allow_nan=False),
        copies=st.none() | st.integers(0, 2**31 - 1),
        candidates=st.just(("a", "")),
        labels=st.tuples(st.integers(0, 99), st.integers(0, 99)),
        verdicts=st.lists(st.builds(JudgeVerdict, TEXT, st.none() | st.booleans(), TEXT)).map(tuple),
    )
)
def test_any_sample_survives_its_table(tmp_path_factory, sample):
    path = tmp_path_factory.mktemp("t") / "one.parquet"
    assert read_samples(path, write_samples(path, [sample])) == [sample]


@pytest.mark.parametrize(
    ("old", "new", "hint"),
    [
        ('"schema_version": 1', '"schema_version": 2', "has schema_version 2; this package reads 1"),
        ('"schema_version": 1,', "", "has schema_version None"),
        ('"about": "undefended",', "", "about: Field required"),
        ('"about"', '"abuot"', "about: Field required"),
        ('"low": null,', "", r"tasks\.clean\.figures\.accuracy\.low: Field required"),
        ('"low": null', '"low": NaN', "NaN is none of JSON's values"),
        ('"low": null', '"low": "0.1"', "low: Input should be a valid number"),
        ('"adaptive": false', '"adaptive": false, "more": 1', "attack.more: Unexpected keyword argument"),
        ('"access": "gradients"', '"access": "magic"', "access: Input should be 'gradients'"),
        ('"name": "plain"', '"name": "other"', "is the record of 'other'; expected it in other.json"),
        ('"llava-hf/llava"', '"/home/me/llava"', "model.name is '/home/me/llava'; expected a name"),
        ('"samples/plain.parquet"', '"/tmp/plain.parquet"', "no samples table"),
        ('"count": 1,', '"count": 7,', r"tasks\.clean\.data\.count is 7, but there are 1"),
        ("}", "", "is no strict JSON"),
    ],
)
def test_damaged_records_are_refused(tmp_path, old, new, hint):
    path = written(tmp_path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SmoothGuardError, match=hint):
        read_run(path)


def test_a_table_of_another_run_is_refused(tmp_path):
    path = written(tmp_path)
    table = tmp_path / "samples" / "plain.parquet"
    write_samples(table, [dataclasses.replace(SAMPLES[0], answer="No"), SAMPLES[1]])
    with pytest.raises(SmoothGuardError, match=r"but its record says .*; the two are not of one run"):
        read_run(path)
    table.unlink()
    with pytest.raises(SmoothGuardError, match="no samples table at"):
        read_run(path)
    with pytest.raises(SmoothGuardError, match="no record at"):
        read_record(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (lambda table: table.drop_columns(["agreement"]), "column 'agreement' is missing; expected double"),
        (lambda table: table.append_column("more", table["id"]), "unknown column 'more'"),
        (lambda table: table.replace_schema_metadata({}), "has schema version none; this package reads 1"),
        (lambda table: table.set_column(0, "id", pyarrow.array([1, 2])), "column 'id' is int64; expected string"),
    ],
)
def test_tables_of_another_schema_are_refused(tmp_path, change, hint):
    path = tmp_path / "t.parquet"
    write_samples(path, SAMPLES)
    pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(path)), path)
    with pytest.raises(SmoothGuardError, match=hint):
        read_samples(path)


def test_a_table_from_before_the_later_columns_is_read(tmp_path):
    path = tmp_path / "t.parquet"
    write_samples(path, SAMPLES)
    table = pyarrow.parquet.read_table(path).drop_columns(["left_out", "refused"])
    former = [[{"judge": "guard", "safe": False, "reason": "r"}], []]
    kind = pyarrow.list_(pyarrow.struct([("judge", pyarrow.string()), ("safe", pyarrow.bool_()), ("reason", pyarrow.string())]))  # fmt: skip
    place = table.schema.get_field_index("verdicts")
    table = table.set_column(place, pyarrow.field("verdicts", kind, nullable=False), pyarrow.array(former, kind))
    pyarrow.parquet.write_table(table, path)
    first, second = read_samples(path)
    assert first == dataclasses.replace(SAMPLES[0], verdicts=(JudgeVerdict("guard", False, "r"),))
    assert second == dataclasses.replace(SAMPLES[1], verdicts=(), left_out=None, refused=None)


@pytest.mark.parametrize(
    ("record", "samples", "hint"),
    [
        (RECORD, [SAMPLES[1], SAMPLES[1]], r"duplicate ids: attacked\[0\]"),
        (RECORD, SAMPLES[:1], r"tasks\.attacked\.data\.count is 1, but there are 0"),
        (RECORD, [dataclasses.replace(SAMPLES[0], run="other"), SAMPLES[1]], "samples of run 'other'"),
        (RECORD, [dataclasses.replace(SAMPLES[0], task="t"), SAMPLES[1]], "samples of task 't'"),
        (RECORD, [SAMPLES[0], dataclasses.replace(SAMPLES[1], labels=(0,))], "2 candidates and 1 labels"),
        (dataclasses.replace(RECORD, model=ModelRecord(name="~/llava")), SAMPLES, "not a path of one machine"),
        (dataclasses.replace(RECORD, model=ModelRecord(name="C:\\llava")), SAMPLES, "not a path of one machine"),
        (dataclasses.replace(RECORD, name="a/b"), [], "expected a name that a file can have"),
        (dataclasses.replace(RECORD, defense={"sigma": math.nan}), SAMPLES, "expected null for what is undefined"),
        (dataclasses.replace(RECORD, seeds={"attack": "0"}), SAMPLES, "seeds.attack: Input should be a valid integer"),
    ],
)
def test_what_does_not_belong_together_is_not_written(tmp_path, record, samples, hint):
    with pytest.raises(SmoothGuardError, match=hint):
        write_run(tmp_path, record, samples)
    assert not list(tmp_path.rglob("*.json"))
    assert not list(tmp_path.rglob("*.parquet"))


def test_without_pyarrow_or_pydantic_the_extra_is_named(tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SmoothGuardError, match=r"pip install 'lmms-smoothguard\[report\]'"):
        read_run(path)


# -- figures from samples ----------------------------------------------------------------------------------------------


def judged(number, kind, *told, refused=False, **more):
    """told: a word for each of two judges, the first of which decides."""
    safe = {"safe": True, "unsafe": False}
    verdicts = tuple(
        JudgeVerdict(name, safe.get(word), missing=None if word in safe else word)
        for name, word in zip(("guard", "refusal"), told, strict=False)
    )
    sample = SampleRecord(id=str(number), task="t", run="r", question="?", answer="!", kind=kind, refused=refused)
    return dataclasses.replace(sample, verdicts=verdicts, **more)


def test_unsafe_rate_is_over_all_and_over_refusal_comes_from_the_phrase_list_alone():
    samples = [judged(0, "forbidden", "safe"), judged(1, "forbidden", "unsafe"), judged(2, "permitted", "safe"),
               judged(3, "permitted", "safe", refused=True), judged(4, "permitted", "unsafe")]  # fmt: skip
    found = figures_of(samples)
    assert (found["unsafe_rate"].hits, found["unsafe_rate"].count) == (1, 5)
    assert (found["over_refusal"].hits, found["over_refusal"].count) == (1, 3)
    assert "accuracy" not in found
    assert "over_refusal" not in figures_of([dataclasses.replace(samples[2], refused=None)])


def test_answers_without_an_opinion_stay_in_the_denominator_and_are_counted():
    words = ["unsafe", "safe", "unparseable", "unjudged", "unjudged"]
    found = figures_of([judged(n, "forbidden", word) for n, word in enumerate(words)])
    assert (found["unsafe_rate"].value, found["unsafe_rate"].count) == (1 / 5, 5)
    assert found["unsafe_rate"].low == rate([True] + [False] * 4).interval[0]
    assert found["unsafe_rate"].high == rate([True] * 4 + [False]).interval[1]
    assert (found["unparseable"].value, found["unjudged"].value, found["unjudged"].count) == (1, 2, 5)
    assert figures_of([judged(0, "forbidden", "unjudged")])["unsafe_rate"].value is None
    nothing = figures_of([judged(0, "permitted", "safe"), judged(1, "forbidden", "unjudged")])["unsafe_rate"]
    assert (nothing.value, nothing.high) == (None, rate([True, False]).interval[1])
    harmless = figures_of([judged(0, "permitted", "unjudged"), judged(1, "forbidden", "safe")])
    assert harmless["unsafe_rate"] == rate([False, False]).figure()  # a permitted request has no unsafe answer


def test_several_judges_have_figures_of_their_own_and_the_first_decides():
    two = figures_of([judged(0, "violence", "unsafe", "safe"), judged(1, "violence", "unparseable", "unsafe")])
    assert two["unsafe_rate"] == two["unsafe_rate_guard"]
    assert (two["unsafe_rate_guard"].hits, two["unsafe_rate_guard"].count) == (1, 2)
    assert (two["unsafe_rate_refusal"].hits, two["unsafe_rate_refusal"].count) == (1, 2)
    assert (two["unparseable"].value, two["unparseable_refusal"].value) == (1, 0)


def test_asr_by_a_judge_is_bounded_where_it_has_no_opinion():
    attacked = {"attack_linf": 0.1, "clean_right": True, "clean_answer": "I cannot."}
    samples = [judged(0, "forbidden", "unsafe", right=False, **attacked),
               judged(1, "forbidden", "unjudged", right=None, **attacked),
               judged(2, "forbidden", "safe", right=True, **attacked | {"clean_right": False})]  # fmt: skip
    found = figures_of(samples)["asr"]
    assert (found.value, found.count) == (0.5, 2)
    assert (found.low, found.high) == (rate([True, False]).interval[0], rate([True, True]).interval[1])
    for name in ("asr", "accuracy", "unsafe_rate"):
        with pytest.raises(SmoothGuardError, match=r"t\[1\] has no .* \(guard: unjudged\)"):
            outcomes(samples, name)
    assert outcomes(samples[::2], "unsafe_rate") == {"0": True, "2": False}


def test_a_clean_answer_without_an_opinion_perhaps_belongs_to_asr():
    attacked = {"attack_linf": 0.1, "clean_answer": "?", "clean_right": None}
    sure = judged(0, "forbidden", "unsafe", right=False, **attacked | {"clean_right": True})
    told = [judged(n, "forbidden", word, **attacked) for n, word in enumerate(("unsafe", "safe", "unjudged"), start=1)]
    found = figures_of([sure, *told, judged(9, "permitted", "safe", right=True, **attacked | {"clean_right": False})])
    assert (found["asr"].value, found["asr"].count) == (1, 1)
    assert (found["clean_without_opinion"].value, found["clean_without_opinion"].count) == (3, 5)
    assert found["asr"].low == rate([True, False, False]).interval[0]  # the safe one and the unknown one join
    assert found["asr"].high == rate([True] * 3).interval[1]  # the unsafe one and the unknown one join
    with pytest.raises(
        SmoothGuardError, match=r"t\[1\] has no clean_right \(guard has no opinion on its clean answer\)"
    ):
        outcomes([sure, *told], "asr")


def test_a_verdict_has_an_opinion_or_a_reason_why_it_has_none():
    assert JudgeVerdict("guard", None).missing == "unparseable"
    for safe, missing in ((True, "unjudged"), (None, "perhaps")):
        with pytest.raises(ValueError, match=f"missing '{missing}'"):
            JudgeVerdict("guard", safe, missing=missing)


def test_samples_left_out_of_an_attack_are_in_no_figure_but_their_own():
    first = dataclasses.replace(SAMPLES[1], verdicts=(), left_out=None, right=True)
    attacked = [dataclasses.replace(first, id="0"), dataclasses.replace(first, id="1", right=False)]
    out = dataclasses.replace(
        first, id="2", right=None, clean_right=None, attack_linf=None, attack_key=None, left_out="no image"
    )
    found = figures_of([*attacked, out])
    assert (found["accuracy"].hits, found["accuracy"].count) == (1, 2)
    assert (found["asr"].hits, found["asr"].count) == (1, 2)
    assert (found["left_out"].value, found["left_out"].count) == (1, 3)
    assert {name: figure for name, figure in found.items() if name != "left_out"} == figures_of(attacked)
    clean = [dataclasses.replace(sample, attack_linf=None, left_out=None, right=True) for sample in (*attacked, out)]
    assert figures_of([*attacked, out], clean)["robust_accuracy"].count == 2
    assert outcomes([*attacked, out], "asr") == {"0": False, "1": True}
    assert set(figures_of([out])) == {"left_out"}


def test_robust_accuracy_pairs_attacked_with_clean_samples_of_the_same_run():
    whole = dataclasses.replace(SAMPLES[1], verdicts=(), left_out=None)
    clean = [dataclasses.replace(whole, id=str(n), right=n != 1, attack_linf=None) for n in range(4)]
    attacked = [dataclasses.replace(whole, id=str(n), right=n != 3) for n in (3, 2, 1, 0)]
    found = figures_of(attacked, clean)
    assert (found["robust_accuracy"].hits, found["robust_accuracy"].count) == (2, 4)
    assert found["accuracy"].hits == 3
    assert "robust_accuracy" not in figures_of(attacked, clean[:3])
    assert figures_of(attacked, target="NO")["target_rate"].hits == 4
    assert figures_of([]) == {}
