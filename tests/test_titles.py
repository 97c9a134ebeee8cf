"""What attacks and their tasks are called in tables."""

from __future__ import annotations

import dataclasses

import pytest

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.rates import rate
from lmms_smoothguard.evaluation.records import AttackRecord, DataRecord, ModelRecord, Record, TaskRecord
from lmms_smoothguard.evaluation.titles import attack_access, attack_title
from lmms_smoothguard.report.documents import base_task, documents
from lmms_smoothguard.report.tables import table_rows


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({}, "PGD-40, 4/255"),
        ({"eot": 8, "steps": 100}, "PGD-100, EOT 8, 4/255"),
        ({"norm": "l2", "eps": 0.5}, "PGD-40, L2 0.5"),
        ({"restarts": 5, "loss": "ce"}, "PGD-40, 4/255, ce loss, 5 restarts"),
        ({"target": "Sure", "seed": 3}, "PGD-40, 4/255, targeted"),
        ({"momentum": 0.9}, "PGD-40, 4/255, momentum=0.9"),
        ({"random_start": False, "step_size": 0.01}, "PGD-40, 4/255, step_size=0.01, random_start=False"),
    ],
)
def test_a_title_says_what_tells_attacks_apart(settings, title):
    assert attack_title(AttackSettings.parse(settings).to_dict()) == title


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherOptions:
    feedback: str = "scores"
    size: float = 0.05
    corpus: str | None = None


class Other:
    options = OtherOptions
    needs_gradients = False


def test_options_are_shown_where_they_are_not_the_attacks_own_defaults(monkeypatch):
    stored = {"name": "other", "norm": "linf", "eps": 1.0, "steps": 5, "eot": 0, "feedback": "scores", "size": 0.1}
    here = plugins.load
    monkeypatch.setattr(plugins, "load", lambda kind, name: Other if name == "other" else here(kind, name))
    assert attack_title(stored) == "Other-5, any colour, size=0.1"
    other = stored | {"size": 0.05, "feedback": "answers", "corpus": "/home/me/corpus.parquet"}
    assert attack_title(other) == "Other-5, any colour, feedback=answers, corpus=corpus.parquet"
    assert attack_access(stored) == "scores"
    assert attack_access(other) == "answers"
    assert attack_access({"name": "pgd"}) == "gradients"
    monkeypatch.undo()
    assert attack_title(stored) == "Other-5, any colour, feedback=scores, size=0.1"  # not installed: everything


def test_settings_of_an_older_version_have_a_title():
    assert attack_title({"name": "pgd", "norm": "linf", "eps": 4 / 255, "steps": 40, "eot": 0}) == "PGD-40, 4/255"


# -- tables ------------------------------------------------------------------------------------------------------------


def test_an_attacked_twin_of_any_attack_has_its_tasks_data():
    assert base_task("shapes_pope_square") == "shapes_pope"
    assert base_task("shapes_pope_faint_apgd") == "shapes_pope_faint"
    assert base_task("shapes_safety_universal") == "shapes_safety"
    assert base_task("pope_pgd") == "pope_pgd"
    assert documents("shapes_safety_universal")["0"]["kind"] in ("forbidden", "permitted")


def figures(**more):
    seconds = Figure(value=0.5, low=None, high=None, count=2, method="m")
    return {"seconds_per_answer": seconds} | more


def record(name, tasks, attack="pgd", **more):
    """tasks: their figures by name; those that end in an underscore and more are attacked."""
    settings = AttackSettings.parse().to_dict() | {"name": attack} | more
    stored = {
        task: TaskRecord(
            data=DataRecord(source="d", count=2),
            attack=AttackRecord(settings=settings, access="scores", adaptive=bool(settings["eot"])) if under else None,
            figures=found,
        )
        for task, (under, found) in tasks.items()
    }
    return Record(
        name=name, about="it", command="", model=ModelRecord(name="m"), tasks=stored, defense=None, seeds={}, versions={},
        environment={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "attack", "note"),
    [("shapes_pope_square", "square", "it"), ("shapes_caption_apgd", "apgd", "it (captions)"),
     ("shapes_safety_universal", "universal", "it (requests)"), ("pope_popular_apgd", "apgd", "it (pope_popular)")],
)  # fmt: skip
def test_a_row_is_called_by_its_questions_whatever_the_attack(task, attack, note):
    right = rate([True, False]).figure()
    (row,) = table_rows([record("x", {task: (True, figures(accuracy=right, asr=right))}, attack)])
    assert row[0] == note
    assert row[1].lower().startswith(f"{attack}-40, 4/255")


def test_an_adaptive_twin_is_compared_with_the_plain_run_of_its_questions():
    right = figures(accuracy=rate([True, False]).figure())
    rows = table_rows([record("a", {"pope": (False, right)}), record("b", {"pope_eot": (True, right)}, eot=8)])
    assert [row[0] for row in rows] == ["it (pope)", "it (pope)"]
    assert [row[-1] for row in rows] == ["1.0", "1.0"]


def test_a_judged_task_has_a_row_without_an_accuracy():
    judged = figures(unsafe_rate=rate([True, False, False]).figure(), asr=rate([True, False]).figure())
    clean = figures(unsafe_rate=rate([False] * 3).figure())
    tasks = {"shapes_safety": (False, clean), "shapes_safety_pgd": (True, judged)}
    (row,) = table_rows([record("x", tasks)])
    assert row[2:6] == ("2 of 3", "-", "-", "50.0 % (9.5-90.5)")
