"""Benchmarks under attack: their YAML files beside upstream's, and each of them run on a miniature of its data."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

import miniatures

from lmms_smoothguard import plugins
from lmms_smoothguard.harness import ledger
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path

SHAPES = {
    "shapes_pope": ("pgd", "pgd_l2", "apgd", "eot", "square", "patch", "feature"),
    "shapes_caption": ("pgd", "apgd", "eot", "square"),
}
ATTACKED_SHAPES = [f"{kind}_{attack}" for kind, attacks in SHAPES.items() for attack in attacks]
UPSTREAM = {
    "coco2014_cap_val_pgd": "coco_cap/coco2014_cap_val.yaml",
    "coco2017_cap_val_pgd": "coco_cap/coco2017_cap_val.yaml",
    "llava_in_the_wild_pgd": "llava-in-the-wild/llava-in-the-wild.yaml",
    "textvqa_val_pgd": "textvqa/textvqa_val.yaml",
    "vqav2_val_pgd": "vqav2/vqav2_val.yaml",
} | {
    f"pope_{attack}{suffix}": f"pope/pope_{theirs}.yaml"
    for attack in ("pgd", "apgd", "eot")
    for suffix, theirs in (("", "adv"), ("_popular", "pop"), ("_random", "random"))
}


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Upstream's scorers write what would be handed in into the working directory."""
    monkeypatch.chdir(tmp_path)


def config(file: Path, mode: str = "simple"):
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(str(file), mode=mode)


def attack_of(task: str):
    file = miniatures.our_yaml(task) if task in miniatures.MAKERS else tasks_path() / "shapes" / f"{task}.yaml"
    return config(file)["metadata"]["attack"]


def skip_unless_offered(task: str):
    name = attack_of(task)["name"]
    if name not in plugins.offers("attacks"):
        pytest.skip(f"attack {name} is not registered")


# -- what the files say ------------------------------------------------------------------------------------------------


def test_every_task_is_found_and_none_has_a_name_of_upstreams():
    from lmms_eval.tasks import TaskManager

    ours = set(TaskManager("ERROR", include_defaults=False, include_path=str(tasks_path())).all_tasks)
    assert ours >= set(miniatures.MAKERS) | set(ATTACKED_SHAPES)
    theirs = set(TaskManager("ERROR", include_defaults=False, include_path=str(Path(miniatures.upstream_yaml("ai2d")).parents[1])).all_tasks)  # fmt: skip
    assert len(theirs) > 100
    assert not ours & theirs


@pytest.mark.parametrize("task", sorted(UPSTREAM))
def test_data_prompts_and_generation_are_upstreams(task):
    """An update of lmms-eval that changes them shows here; scoring and attack are what an attacked task adds."""
    import lmms_eval.tasks

    theirs = config(Path(lmms_eval.tasks.__file__).parent / UPSTREAM[task])
    ours = config(miniatures.our_yaml(task))
    for key in ("dataset_path", "dataset_name", "output_type", "generation_kwargs", "lmms_eval_specific_kwargs"):
        assert ours.get(key) == theirs.get(key), key
    assert ours["test_split"].strip() == theirs["test_split"].strip()
    for key in ("doc_to_visual", "doc_to_text"):
        mine, other = (getattr(part[key], "value", part[key]) for part in (ours, theirs))
        assert mine.rpartition(".")[2].strip() == other.rpartition(".")[2].strip() or "caption" in mine


def test_the_metrics_of_upstream_are_all_there():
    """But for the file that would be handed in: attacked answers are not."""
    import lmms_eval.tasks

    for task, path in UPSTREAM.items():
        theirs = {part["metric"] for part in config(Path(lmms_eval.tasks.__file__).parent / path)["metric_list"]}
        ours = {part["metric"] for part in config(miniatures.our_yaml(task))["metric_list"]}
        assert theirs - ours <= {"submission"}, task


@pytest.mark.parametrize("task", sorted(miniatures.MAKERS) + ATTACKED_SHAPES)
def test_the_attack_of_every_task_can_be_built(task):
    from lmms_smoothguard.harness.options import Options

    skip_unless_offered(task)
    attack = Options(None, {}, Path(), 1).attack_on({"attack": attack_of(task)})
    assert attack is not None
    assert attack.settings.eot == (8 if "_eot" in task else 0)
    assert attack.settings.norm == ("l2" if "_l2" in task else "linf")
    assert (attack.label is None) == task.startswith(("coco", "llava"))


# -- scoring by hand ---------------------------------------------------------------------------------------------------


def utils_of(folder: str):
    import importlib

    return importlib.import_module(f"lmms_smoothguard.tasks.{folder}.utils")


@pytest.mark.parametrize(("people", "right"), [(1, False), (2, True)])
def test_an_answer_is_right_when_two_people_of_ten_gave_it(people, right):
    """VQA accuracy of one person's answer is 0.3, of two people's 0.6."""
    answers = ["a dog"] * people + ["cat"] * (10 - people)
    vqav2 = {"question_id": 1, "answers": [{"answer": text, "answer_id": n} for n, text in enumerate(answers)]}
    textvqa = {"question_id": 2, "answers": answers}
    for process, doc in ((utils_of("vqa").vqav2_results, vqav2), (utils_of("vqa").textvqa_results, textvqa)):
        ledger.record("by_hand", doc, ledger.Note("Dog."))
        before = json.dumps(doc)
        scores = process(doc, ["bird"])
        assert scores["clean_exact_match"] == pytest.approx(0.3 * people)
        assert scores["exact_match"] == 0
        assert scores["asr"]["clean_right"] is right
        assert scores["asr"]["right"] is False
        assert json.dumps(doc) == before


def test_changed_answers_are_counted_without_those_left_out():
    from lmms_smoothguard.harness import scoring

    docs = [{"question_id": str(n), "of": "changed"} for n in range(4)]
    for doc, clean in zip(docs, ("A cat.", "A dog.", "A hen.", ""), strict=True):
        ledger.record("by_hand", doc, ledger.Note(clean, None if clean else "empty clean answer"))
    found = [scoring.change_scores(doc, "a cat") for doc in docs]
    outcomes = [scores["answer_changed"] for scores in found if "answer_changed" in scores]
    assert scoring.answer_changed_count(outcomes) == 3
    assert scoring.answer_changed(outcomes) == pytest.approx(2 / 3)
    assert scoring.answer_changed_low(outcomes) == pytest.approx(0.2077, abs=1e-4)
    assert scoring.answer_changed_high(outcomes) == pytest.approx(0.9385, abs=1e-4)
    assert found[3] == {}


def test_metrics_of_an_attacked_task_are_over_attacked_samples_only(monkeypatch):
    """One rule for all: upstream's own metrics, too, have nothing of a sample that was left out."""
    doc = {
        "question_id": "1", "question": "Is there a cat?", "answer": "yes", "answers": ["yes"] * 10, "caption": "A cat.",
        "objects": "cat", "category": "conv", "kind": "forbidden", "plain_question": "?", "scenario": "01-X",
    }  # fmt: skip
    ledger.record("by_hand", doc, ledger.Note("", "empty clean answer"))
    shapes, safety = utils_of("shapes"), utils_of("mm_safety")
    for process in (
        utils_of("pope").results, shapes.pope_attacked_results, shapes.caption_attacked_results, utils_of("vqa").vqav2_results,
        shapes.safety_attacked_results, utils_of("vqa").textvqa_results, utils_of("coco").results,
        utils_of("llava_bench").results, safety.attacked_results,
    ):  # fmt: skip
        assert process(doc, ["yes"]) == {}, process


@pytest.mark.parametrize("folder", ["pope", "shapes"])
def test_right_is_what_upstreams_scorer_calls_right_on_the_clean_twin_and_under_attack(folder):
    from lmms_eval.tasks.pope.utils import pope_process_results

    utils = utils_of(folder)
    process = utils.results if folder == "pope" else utils.pope_attacked_results
    outcomes = []
    for number, (clean, final) in enumerate([("Yes.", "Yes."), ("YES", "Yes."), (" yes ", "yes"), ("yes", "no")]):
        doc = {"question_id": f"{folder}{number}", "answer": "yes"}
        ledger.record("by_hand", doc, ledger.Note(clean))
        scores = process(doc, [final])
        twin = pope_process_results(doc, [final])
        assert {name: scores[name] for name in twin} == twin
        assert scores["asr"]["right"] is bool(twin["pope_accuracy"]["score"])
        assert scores["asr"]["clean_right"] is bool(pope_process_results(doc, [clean])["pope_accuracy"]["score"])
        outcomes.append(scores["asr"])
    assert [(o["clean_right"], o["right"]) for o in outcomes] == [
        (False, False), (True, False), (True, True), (True, False)
    ]  # fmt: skip
    assert utils.asr_count(outcomes) == 3
    assert utils.pope_asr(outcomes) == pytest.approx(2 / 3)


def test_answers_in_other_words_than_yes_and_no_are_named_as_the_reason_for_no_rate(said):
    utils = utils_of("pope")
    wordy = [{"clean_right": False, "right": False, "clean_answer": text, "answer": "no"} for text in ("Yes.", "No")]
    assert utils.pope_asr(wordy) != utils.pope_asr(wordy)  # NaN
    assert utils.asr_count(wordy) == 0
    assert "answers are not literally yes / no (such as 'Yes.')" in said()
    wrong = [{"clean_right": False, "right": False, "clean_answer": "no", "answer": "no"}]
    before = said()
    assert utils.pope_asr(wrong) != utils.pope_asr(wrong)
    assert said() == before  # the model is wrong, and its words are not the reason


@pytest.fixture
def said():
    """What loguru logs, so far."""
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    yield lambda: "".join(lines)
    logger.remove(sink)


def test_a_scorer_finds_the_task_that_lmms_eval_is_scoring():
    """One document, attacked in two tasks with different ends."""
    from lmms_eval.models.model_utils.usage_metrics import set_task_context

    from lmms_smoothguard.errors import SmoothGuardError

    doc = {"question_id": "9", "question": "twice"}
    ledger.record("first", doc, ledger.Note("yes"))
    ledger.record("second", doc, ledger.Note("no"))
    with pytest.raises(SmoothGuardError, match="no record of an attack"):
        ledger.look_up(doc)
    try:
        for task, answer in (("first", "yes"), ("second", "no")):
            set_task_context(task)
            assert ledger.look_up(doc).clean_answer == answer
            with ledger.scoring(
                "second" if task == "first" else "first"
            ):  # lm-eval says nothing, so its reporting does
                assert ledger.look_up(doc).clean_answer != answer
            assert ledger.look_up(doc).clean_answer == answer
        set_task_context("third")
        with pytest.raises(SmoothGuardError, match="'9' of third has no record"):
            ledger.look_up(doc)
    finally:
        set_task_context(None)


def test_a_judgement_that_failed_is_in_no_score(monkeypatch):
    """Upstream averages its placeholder: with a judge that is down it would report 100."""
    utils = utils_of("llava_bench")
    doc = {"question_id": "1", "question": "?", "category": "conv", "gpt_answer": "x", "caption": "x"}
    ledger.record("by_hand", doc, ledger.Note("clean words"))
    failed = {"scores": [-1, -1]}
    assert utils.llava_all_aggregation([failed, failed]) == 100.0
    judged = {"final words": {"scores": [8.0, 4.0]}, "clean words": failed}
    monkeypatch.setattr(
        utils.upstream, "llava_process_results", lambda doc, results: {"gpt_eval_llava_all": judged[results[0]]}
    )
    scores = utils.results(doc, ["final words"])
    assert scores["gpt_eval_llava_all"] == {"scores": [8.0, 4.0]}
    assert "clean_gpt_eval_llava_all" not in scores
    assert scores["judge_failed"] == 1


def test_captions_without_java(monkeypatch, tmp_path):
    utils = utils_of("coco")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert utils.cider([{"image_id": 1, "pred": "a", "answer": ["a"], "id": 1}], args=None) is None


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_vqav2_on_a_miniature(tmp_path):
    name = miniatures.write_task(tmp_path, "vqav2_val_pgd", 4)
    found = miniatures.run(tmp_path, [name], attack_steps=15, attack_eps="8/255")
    figures = miniatures.figures_of(found, name)
    assert figures["asr_count"] >= 3
    assert figures["clean_exact_match"] >= 0.75
    assert figures["exact_match"] < figures["clean_exact_match"]
    assert figures["asr"] > 0
    assert (figures["asr_count"], figures["asr"]) == by_hand(found["samples"][name], vqa_right)
    assert found["smoothguard_attacks"][name]["attacked"] == 4


def by_hand(samples, is_right):
    """(asr_count, asr) of a samples log by nothing but its answers."""
    pairs = [(sample["token_counts"][0]["clean_answer"], sample["filtered_resps"][0], sample) for sample in samples]
    held = [is_right(final, sample) for clean, final, sample in pairs if is_right(clean, sample)]
    return len(held), pytest.approx(held.count(False) / len(held))


def vqa_right(answer, sample):
    """Two of ten people or more; the miniatures' answers are single words."""
    given = [item["answer"] if isinstance(item, dict) else item for item in sample["doc"]["answers"]]
    return given.count(bare(answer)) >= 2


def word_right(answer, sample):
    return answer.strip().lower() == sample["doc"]["answer"]


def caption_right(answer, sample):
    return bare(answer) == bare(sample["doc"]["caption"])


def bare(answer):
    return answer.strip().lower().rstrip(".")


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(miniatures.MAKERS) - {"llava_in_the_wild_pgd", "vqav2_val_pgd"}))
def test_every_task_on_a_miniature(task, tmp_path):
    skip_unless_offered(task)
    defense = (
        {"defense": "smoothguard", "sigma": 0.2, "noise_space": "pixel", "num_samples": 3} if "eot" in task else {}
    )
    found = miniatures.run(
        tmp_path, [miniatures.write_task(tmp_path, task, 3)], attack_steps=4, attack_eps="8/255", **defense
    )
    figures = miniatures.figures_of(found, task)
    assert found["smoothguard_attacks"][task]["attacked"] == 3
    if task.startswith("coco"):
        changed = [
            bare(sample["filtered_resps"][0]) != bare(sample["token_counts"][0]["clean_answer"])
            for sample in found["samples"][task]
        ]
        assert figures["answer_changed_count"] == len(changed) == 3
        assert figures["answer_changed"] == pytest.approx(sum(changed) / 3)
        assert "recovery" not in figures  # would be 1 - answer_changed
        for metric in ("coco_CIDEr", "coco_Bleu_1", "coco_METEOR", "coco_ROUGE_L", "clean_coco_CIDEr"):
            assert figures[metric] >= 0
        assert not (tmp_path / "submissions").exists()
    else:
        assert figures["asr_count"] >= 2
        right = word_right if task.startswith("pope") else vqa_right
        assert (figures["asr_count"], figures["asr"]) == by_hand(found["samples"][task], right)
    assert figures["attack_left_out"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ATTACKED_SHAPES)
def test_every_task_on_the_embedded_scenes(task, tmp_path):
    skip_unless_offered(task)
    defense = (
        {"defense": "smoothguard", "sigma": 0.2, "noise_space": "pixel", "num_samples": 3} if "eot" in task else {}
    )
    found = miniatures.run(tmp_path, [task], limit=2, attack_steps=4, **defense)
    assert found["smoothguard_attacks"][task]["attacked"] == 2
    figures = miniatures.figures_of(found, task)
    assert figures["asr_count"] >= 1
    right = caption_right if "caption" in task else word_right
    assert (figures["asr_count"], figures["asr"]) == by_hand(found["samples"][task], right)


class Judge(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge that always says 7 against 8, and keeps what it was asked."""

    asked: list[str]

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body["messages"][-1]["content"])
        answer = {
            "id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "7 8\nreason"}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_llava_bench_asks_upstreams_judge_about_the_attacked_and_the_clean_answer(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(utils_of("llava_bench").upstream, "_pipeline", None)
    try:
        name = miniatures.write_task(tmp_path, "llava_in_the_wild_pgd", 3)
        found = miniatures.run(tmp_path, [name], attack_steps=10, attack_eps="8/255")
    finally:
        server.shutdown()
    figures = miniatures.figures_of(found, name)
    for metric in ("gpt_eval_llava_all", "gpt_eval_llava_conv", "gpt_eval_llava_detail", "clean_gpt_eval_llava_all"):
        assert figures[metric] == 114.3  # 8 to 7
    assert figures["judge_failed"] == 0
    assert figures["answer_changed_count"] == 3
    assert len(server.asked) == 6
    for sample in found["samples"][name]:
        for answer in (sample["filtered_resps"][0], sample["token_counts"][0]["clean_answer"]):
            assert any(f"2]\n{answer.strip()}\n\n[End" in question for question in server.asked)
