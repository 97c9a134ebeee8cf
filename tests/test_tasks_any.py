"""`attack=` in the model's arguments on tasks that know nothing of attacks, and what is refused or left out on the way."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest

pytest.importorskip("lmms_eval")

import miniatures
from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import AttackError, ConfigError, SmoothGuardError
from lmms_smoothguard.harness.lmms_eval import attacking, judging, planning, reporting
from lmms_smoothguard.harness.lmms_eval.finishing import Finished, Finisher
from lmms_smoothguard.harness.options import Options, TaskAttack
from lmms_smoothguard.harness.summary import RESULTS, Outcome, summarise

PICTURE = Image.new("RGB", (8, 8))
PGD = AttackSettings().to_dict()


TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'
"""The command line's default."""


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Upstream's scorers write what would be handed in into the working directory."""
    monkeypatch.chdir(tmp_path)


def options(**attack):
    return Options(None, attack, None, 1)


def requests_for(docs, metadata=None, task="made"):
    """A wrapper and one request a document; a document's `image` is its picture, None for none."""

    def visuals(doc):
        return [doc["image"]] if doc.get("image") is not None else []

    wrapper = SimpleNamespace(is_simple=True, task_dict={task: {"test": docs}})
    return wrapper, [
        Instance(
            "generate_until", ("?", {}, visuals, n, task, "test"), 0,
            {"task": task, "doc_id": n, "repeats": 1, **(metadata or {})},
        )
        for n in range(len(docs))
    ]  # fmt: skip


def plan(docs, metadata=None, **attack):
    wrapper, requests = requests_for(docs, metadata)
    return planning.plan(wrapper, requests, options(**attack))


def asking(**fields):
    return {"attack": {"name": "pgd", **fields}}


def test_mixed_tasks_are_attacked_where_there_is_an_image():
    docs = [{"image": PICTURE}, {"image": None}, {"image": PICTURE}]
    plans, bare = plan(docs, name="pgd")
    assert [one.request.doc_id for one in plans] == [0, 2]
    assert [request.doc_id for request in bare] == [1]
    with pytest.raises(AttackError, match=r"made\[1\] has no image"):
        plan(docs, asking())


def test_a_repeated_request_is_planned_once():
    wrapper, requests = requests_for([{"image": PICTURE}])
    plans, _ = planning.plan(wrapper, requests * 3, options(name="pgd"))
    assert len(plans) == 1


def test_a_text_task_is_refused_but_a_shard_of_one_is_not(monkeypatch):
    with pytest.raises(AttackError, match="none of the 2 samples of made has an image"):
        plan([{}, {}], name="pgd")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan([{}, {}], name="pgd")[0] == []


def test_settings_without_an_attack_are_warned_of(caplog):
    """`attack_target=...` alone would look like an attack that never works."""
    assert plan([{"image": PICTURE}], target="no") == ([], [])
    assert "attack_target given" in caplog.text
    caplog.clear()
    plan([{"image": PICTURE}], asking(), target="no")
    assert not caplog.text


def test_a_video_is_not_taken_for_a_sample_without_an_image():
    wrapper, requests = requests_for([{"image": "film.mp4"}])
    with pytest.raises(AttackError, match=r"made\[0\] has media, but no picture or sound in memory"):
        planning.plan(wrapper, requests, options(name="pgd"))


@pytest.mark.parametrize(
    ("clean", "away"),
    [("Yes.", None), ("The YES", None), ("no", "yes"), ("maybe", None), ("", "yes")],
)
def test_the_attack_leads_away_from_the_clean_answer_where_that_is_accepted(clean, away):
    """Else from the answer most people gave: a wrong answer must not be led to the right one."""
    answers = ["maybe", *["yes"] * 8, "perhaps"]
    for value in (answers, [{"answer": text} for text in answers]):
        (one,), _ = plan([{"image": PICTURE, "question_id": 1, "answers": value}], asking(label="answers"))
        assert one.label(clean) == away


def test_the_users_target_goes_before_the_data_sets():
    docs = [{"image": PICTURE, "wanted": "theirs"}]
    (one,), _ = plan(docs, asking(target_field="wanted"))
    assert one.target == "theirs"
    (one,), _ = plan(docs, asking(target_field="wanted"), target="mine")
    assert one.target == "mine"


@pytest.mark.parametrize(
    ("doc", "fields", "message"),
    [
        ({"answr": "x"}, {"label": "answer"}, r"made\[0\] has no field 'answer', the attack's label; did you mean 'answr'"),
        ({"a": "x"}, {"target_field": "b"}, r"no field 'b', the attack's target_field; known: a, image"),
        ({"answer": None}, {"label": "answer"}, "None in its field 'answer'"),
        ({"answers": []}, {"label": "answers"}, r"\[\] in its field 'answers'"),
        ({"wanted": "  "}, {"target_field": "wanted"}, "expected a text"),
    ],
)  # fmt: skip
def test_documents_without_what_the_attack_needs(doc, fields, message):
    with pytest.raises(AttackError, match=message):
        plan([{"image": PICTURE, **doc}], asking(**fields))


def test_colliding_questions_are_refused_where_scores_are_found_by_them():
    docs = [{"image": PICTURE, "question_id": 7, "text": text} for text in "abc"]
    docs += [
        {"image": PICTURE, "question_id": 8},
        {"image": PICTURE, "question_id": 9},
        {"image": PICTURE, "question_id": 9},
    ]
    with pytest.raises(AttackError, match="same question_id: 7, 9; expected"):
        plan(docs, asking())
    assert len(plan(docs, name="pgd")[0]) == 6  # upstream's MME asks two questions under one id
    with pytest.raises(AttackError, match="more than one sample"):
        plan([{"image": PICTURE, "text": "a"}, {"image": PICTURE, "text": "a"}], asking())


def test_a_picture_that_cannot_be_read_is_named():
    class Broken:
        def __getitem__(self, number):
            raise OSError("Truncated File Read")

    wrapper, requests = requests_for([{"image": PICTURE}])
    wrapper.task_dict = {"made": {"test": Broken()}}
    with pytest.raises(AttackError, match=r"media of made\[0\] cannot be read \(OSError: Truncated"):
        planning.plan(wrapper, requests, options(name="pgd"))


def test_targets_that_cannot_be_said():
    class Words:
        unk_token_id = 3

        def __call__(self, text, add_special_tokens):
            return SimpleNamespace(input_ids=[] if text == "-" else [3] if text == "unknown" else [5])

    _, (request,) = requests_for([{"image": PICTURE}])
    for target, message in (("-", "has no tokens"), ("unknown", "has words that the tokenizer does not know")):
        one = planning.Plan(request, TaskAttack(AttackSettings()), {}, (PICTURE,), target, ())
        with pytest.raises(AttackError, match=rf"the target '{target}' of made\[0\] {message}"):
            attacking._check_targets(Words(), [one])


def test_padding_is_neither_attacked_nor_warned_of(caplog):
    """lmms-eval gives a process without samples the task's first one, which belongs to another process or to none."""
    docs = [{"image": PICTURE}]
    assert plan(docs, {"__padding_only__": True}, name="pgd") == ([], [])
    assert not caplog.text


# -- answers as they are scored ----------------------------------------------------------------------------------------


def task_of(filters=(("none", (("take_first", None),)),), **config):
    from lmms_eval.filters import build_filter_ensemble

    ensembles = [build_filter_ensemble(name, [list(part) for part in parts]) for name, parts in filters]
    return {"made": SimpleNamespace(config=SimpleNamespace(task="made", **config), _filters=ensembles, task_docs=None)}


def finished(texts, task, tags=None):
    _, requests = requests_for([{}] * len(texts))
    found = Finisher(task, argparse.Namespace(reasoning_tags=tags)).finish(
        requests, {id(request): [text] for request, text in zip(requests, texts, strict=True) if text is not None}
    )
    return [found[id(request)] for request in requests if id(request) in found]


LETTER = ("regex", {"regex_pattern": r"answer is (\w)"})
FIRST = ("take_first", None)


@pytest.mark.parametrize(
    ("task", "tags", "said", "scored"),
    [
        (task_of(), None, "<think>no</think> Yes", "<think>no</think> Yes"),
        (task_of(), TAGS, "Yes", "Yes"),
        (task_of(), "none", "<think>no</think> Yes", "<think>no</think> Yes"),
        (task_of(reasoning_tags=[["<x>", "</x>"]]), TAGS, "<think>no</think> Yes", "<think>no</think> Yes"),
        (task_of(auto_strip_thinking=True), None, "<think>no</think> Yes", "Yes"),
        (task_of((("low", (("lowercase", None), FIRST)),)), TAGS, "Yes", "yes"),
        ({}, TAGS, "<think>no</think> Yes", "<think>no</think> Yes"),
    ],
)
def test_an_answer_is_made_what_its_scorer_is_given(task, tags, said, scored):
    assert finished([None, "<think>no</think> Yes"], task, tags) == [Finished(said, scored)]


def test_filters_go_before_reasoning_tags_as_upstream_has_it():
    """And what they leave is not what the model said: a letter is no place to look for a target."""
    task = task_of((("letter", (LETTER, FIRST)),))
    assert finished(["<think>B?</think>So the answer is C."], task, TAGS) == [Finished("So the answer is C.", "C")]


def test_filters_that_do_not_agree_are_refused_where_scores_hang_on_the_clean_answer():
    _, (request,) = requests_for([{"image": PICTURE}], asking())
    both = Finisher(task_of((("letter", (LETTER, FIRST)), ("whole", (FIRST,)))))
    plain = attacking.PlainPass(text="the answer is C.")
    passes = [(SimpleNamespace(request=request), plain)]
    with pytest.raises(
        AttackError, match=r"made\[0\] cannot be .*'letter' makes 'C'.*'whole' makes 'the answer is C.'"
    ):
        attacking._finished(passes, [request], both)
    plain.text = "C"
    no_letter = Finisher(task_of((("low", (("lowercase", None), FIRST)), ("whole", (FIRST,)))))
    with pytest.raises(AttackError, match="filter_list one entry"):
        attacking._finished(passes, [request], no_letter)
    plain.text = "c"
    assert attacking._finished(passes, [request], no_letter) == {id(request): Finished("c", "c")}
    plain.text = "the answer is C."
    del request.metadata["attack"]  # a task that knows nothing of attacks: its own scores never see the clean answer
    assert attacking._finished(passes, [request], both)[id(request)].scored == "C"


# -- what is reported --------------------------------------------------------------------------------------------------


def test_a_summary_by_hand():
    aimed = PGD | {"target": "A red"}
    found = summarise([
        Outcome("A cat.", "a cat", aimed, "A red"),
        Outcome("A dog.", "Oh, a red hen", aimed, "A red"),
        Outcome("A red ox.", "a red ox", aimed, "A red"),
        Outcome("", "a red pen", None, None, "empty clean answer"),
        Outcome("", "a red pen", None, None, "no image"),
        Outcome("", "", None, None, "no image"),
    ])  # fmt: skip
    assert (found.attacked, found.changed.hits, found.changed.count) == (3, 1, 3)
    assert (found.said.hits, found.said.count, found.said_clean.hits) == (2, 3, 1)
    assert found.left_out == {"empty clean answer": 1, "no image": 2}
    assert found.metrics()["attack_left_out"] == 3
    assert found.metrics()["answer_changed_low"] == pytest.approx(0.0615, abs=1e-4)
    assert "left out, no image: 2" in str(found)
    assert "PGD-40, 4/255" in str(found)
    json.dumps(found.to_dict())


def test_a_target_is_looked_for_in_what_the_model_said():
    """A filter leaves the letter of a choice alone; reasoning is not said."""
    info = {"attack": PGD | {"target": "sure"}}
    found = reporting.outcome_of(info, Finished("It is A.", "A"), Finished("Sure, B.", "B"))
    summary = summarise([found])
    assert (summary.changed.hits, summary.said.hits, summary.said_clean.hits) == (1, 1, 0)


def test_nothing_attacked_is_no_rate():
    found = summarise([Outcome("", "x", None, None, "no image")])
    assert found.metrics()["answer_changed"] != found.metrics()["answer_changed"]  # NaN
    assert found.attacked == found.changed.count == 0


def test_rates_go_to_tasks_that_report_no_attack_themselves():
    outcomes = {("plain", 0): Outcome("a", "b", PGD), ("ours", 0): Outcome("a", "b", PGD | {"target": "b"}, "b")}
    results = {"results": {"plain": {"acc,none": 1.0}, "ours": {"asr,none": 1.0}}}
    reporting.add(results, outcomes)
    assert results["results"]["plain"]["answer_changed,none"] == 1.0
    assert "answer_changed,none" not in results["results"]["ours"]
    assert results["results"]["ours"]["target_said,none"] == 1.0
    assert results["results"]["ours"]["attack_left_out,none"] == 0
    assert set(results[RESULTS]) == {"plain", "ours"}
    reporting.add(None, outcomes)  # all processes but the first


# -- through lmms-eval -------------------------------------------------------------------------------------------------


def test_two_images_and_an_empty_clean_answer(tmp_path, monkeypatch):
    """The one sample that says nothing when clean stays clean; the others' two images each have a ball of their own."""
    passes = attacking._plain_passes

    def silent_once(*args):
        made = passes(*args)
        made[1][1].answer, made[1][1].text = (), ""
        return made

    monkeypatch.setattr(attacking, "_plain_passes", silent_once)
    name = miniatures.write_task(tmp_path, "muirbench", 3)
    found = miniatures.run(tmp_path, [name], attack="pgd", attack_steps=4, attack_eps="8/255")
    figures = miniatures.figures_of(found, name)
    assert figures["answer_changed_count"] == 2
    assert figures["attack_left_out"] == 1
    assert found["smoothguard_attacks"][name]["left_out"] == {"empty clean answer": 1}
    infos = [sample["token_counts"][0] for sample in found["samples"][name]]
    assert [info.get("attack_left_out") for info in infos] == [None, "empty clean answer", None]
    assert "attack" not in infos[1]
    assert len(list((tmp_path / "cache" / "attacks").rglob(f"{infos[0]['attack_key']}-*.png"))) == 2


def test_a_target_on_a_vqa_task_with_stop_words(tmp_path):
    name = miniatures.write_task(tmp_path, "textvqa_val", 3)
    found = miniatures.run(tmp_path, [name], attack="pgd", attack_steps=20, attack_eps="16/255", attack_target="No")
    figures = miniatures.figures_of(found, name)
    said = [sample["filtered_resps"][0].strip().casefold() == "no" for sample in found["samples"][name]]
    assert figures["target_said"] == pytest.approx(sum(said) / 3)
    assert sum(said) >= 2
    assert figures["target_said_count"] == 3
    assert (tmp_path / "submissions").is_dir()  # not in the checkout
    summary = found["smoothguard_attacks"][name]
    assert summary["target_said_clean"]["hits"] == 1
    assert summary["attacks"] == ["PGD-20, 16/255, targeted"]


def test_a_run_is_never_scored_by_the_attacks_of_an_earlier_one(tmp_path, monkeypatch):
    """The stock model is not attacked, and has no rate under attack to report."""
    miniatures.run(tmp_path, ["shapes_pope_pgd"], limit=1, attack_steps=1)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)  # between lmms-eval's five attempts
    with pytest.raises(SmoothGuardError, match="no record of an attack"):
        miniatures.run(tmp_path, ["shapes_pope_pgd"], limit=1, model="llava_hf", device_map="cpu", device="cpu")


@pytest.mark.parametrize("task", ["shapes_pope_pgd", "shapes_safety_pgd"])
def test_a_model_that_reasons_aloud_is_scored_by_its_answer_clean_and_attacked(tmp_path, monkeypatch, task):
    """The command line has lmms-eval take reasoning out of final answers; the clean ones are treated alike."""
    from lmms_eval.models.chat.llava_hf import LlavaHf

    base = LlavaHf.generate_until

    def aloud(self, requests):
        return [f"<think>I see a dog.</think>{result.text}" for result in base(self, requests)]

    monkeypatch.setattr(LlavaHf, "generate_until", aloud)
    monkeypatch.setattr(judging, "_said", {})
    command_line = argparse.Namespace(reasoning_tags=TAGS, process_with_media=True)
    found = miniatures.run(tmp_path, [task], limit=3, attack_steps=3, cli_args=command_line)
    figures = miniatures.figures_of(found, task)
    samples = found["samples"][task]
    assert figures["asr_count"] == 3
    changed = 0
    for sample in samples:
        info = sample["token_counts"][0]
        assert info["clean_answer_raw"].startswith("<think>I see a dog.</think>")
        assert info["clean_answer_raw"].endswith(info["clean_answer"])
        assert "think" not in info["clean_answer"] + sample["filtered_resps"][0]
        assert sample["asr"]["clean_answer"] == info["clean_answer"]
        changed += info["clean_answer"] != sample["filtered_resps"][0]
    assert found["smoothguard_attacks"][task]["answer_changed"]["hits"] == changed
    assert figures["recovery"] == pytest.approx(1 - changed / 3)
    judged = [exchange.answer for _, exchange in judging._said]
    assert bool(judged) == ("safety" in task)
    assert not any("think" in answer for answer in judged)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ai2d", "chartqa"])
def test_upstream_tasks_of_other_kinds(task, tmp_path):
    name = miniatures.write_task(tmp_path, task, 3)
    found = miniatures.run(tmp_path, [name], attack="pgd", attack_steps=5, attack_eps="8/255")
    assert miniatures.figures_of(found, name)["answer_changed_count"] == 3
    assert all(0 < sample["token_counts"][0]["attack_linf"] <= 8 / 255 + 1e-6 for sample in found["samples"][name])


@pytest.mark.slow
def test_a_mixed_task(tmp_path):
    """The simple wrapper: upstream's chat wrapper of LLaVA cannot answer a sample without an image at all."""
    name = miniatures.write_task(tmp_path, "scienceqa", 4)
    found = miniatures.run(tmp_path, [name], force_simple=True, attack="pgd", attack_steps=3, attack_eps="8/255")
    assert found["smoothguard_attacks"][name]["left_out"] == {"no image": 2}
    assert miniatures.figures_of(found, name)["answer_changed_count"] == 2


@pytest.mark.slow
def test_what_is_refused_names_the_task_and_the_reason(tmp_path):
    name = miniatures.write_task(tmp_path, "chartqa", 2)
    with pytest.raises(ConfigError, match="limit is 0"):
        miniatures.run(tmp_path, [name], limit=0, attack="pgd")

    def broken(rows):
        rows[0]["image"] = {"bytes": b"\x89PNG\r\n\x1a\nbroken", "path": None}
        return rows

    (tmp_path / "broken").mkdir()
    name = miniatures.write_task(tmp_path / "broken", "chartqa", 2, broken)
    with pytest.raises(SmoothGuardError, match=r"cannot load mini_chartqa \(.*expected a data set"):
        miniatures.run(tmp_path / "broken", [name], attack="pgd")


def test_a_response_cache_is_refused_before_anything_is_answered():
    task = SimpleNamespace(config=SimpleNamespace(task="made", metadata={"attack": "pgd"}))
    model = SimpleNamespace(_sg_options=options())
    with pytest.raises(AttackError, match="made is attacked, and lmms-eval's response cache"):
        reporting._refuse_cached_answers(model, {"group": {"made": task}})
    task.config.metadata = [{"version": 0.0}]  # as upstream's files have it
    reporting._refuse_cached_answers(model, {"group": {"made": task}})
