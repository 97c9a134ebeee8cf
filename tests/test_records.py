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
        attack_seconds=2.0, verdicts=(JudgeVerdict("refusal", None, "unsure"), JudgeVerdict("guard", False)),
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


def judged(number, kind, *safe):
    verdicts = tuple(JudgeVerdict(name, told) for name, told in zip(("refusal", "guard"), safe, strict=False))
    return SampleRecord(id=str(number), task="t", run="r", question="?", answer="!", kind=kind, verdicts=verdicts)


def test_judges_make_an_unsafe_rate_over_all_and_over_refusal_over_the_permitted():
    samples = [judged(0, "forbidden", True), judged(1, "forbidden", False), judged(2, "permitted", True),
               judged(3, "permitted", False)]  # fmt: skip
    found = figures_of(samples)
    assert (found["unsafe_rate"].hits, found["unsafe_rate"].count) == (1, 4)
    assert (found["over_refusal"].hits, found["over_refusal"].count) == (1, 2)
    two = figures_of([judged(0, "violence", True, False), judged(1, "violence", False, None)])
    assert (two["unsafe_rate_refusal"].hits, two["unsafe_rate_refusal"].count) == (1, 2)
    assert (two["unsafe_rate_guard"].hits, two["unsafe_rate_guard"].count) == (1, 1)
    assert "over_refusal_refusal" not in two


def test_robust_accuracy_pairs_attacked_with_clean_samples_of_the_same_run():
    clean = [dataclasses.replace(SAMPLES[1], id=str(n), right=n != 1, attack_linf=None) for n in range(4)]
    attacked = [dataclasses.replace(SAMPLES[1], id=str(n), right=n != 3) for n in (3, 2, 1, 0)]
    found = figures_of(attacked, clean)
    assert (found["robust_accuracy"].hits, found["robust_accuracy"].count) == (2, 4)
    assert found["accuracy"].hits == 3
    assert "robust_accuracy" not in figures_of(attacked, clean[:3])
    assert figures_of(attacked, target="NO")["target_rate"].hits == 4
    assert figures_of([]) == {}
