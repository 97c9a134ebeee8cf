"""Universal attacks through lmms-eval: how a corpus is asked, what requests are shown, what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from managers import task_manager

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from PIL import Image

from lmms_smoothguard.attacks.corpus import corpus_of
from lmms_smoothguard.attacks.universal_crafter import UniversalCrafter
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.harness.lmms_eval import instances, universal
from lmms_smoothguard.harness.options import Options
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.model import MODEL_DIR

OWN, NEW = Image.new("RGB", (4, 4)), Image.new("RGB", (6, 6), "red")
SYSTEM = {"role": "system", "content": "Be brief."}


def made(doc, simple):
    """A wrapper and its one request: a question in a system's company, with the document's pictures."""
    pictures = doc.get("images", [])

    def messages(doc):
        parts = [
            *({"type": "image", "url": picture} for picture in pictures),
            {"type": "text", "text": doc["question"]},
        ]
        return [dict(SYSTEM), {"role": "user", "content": parts if pictures else doc["question"]}]

    own = (lambda doc: list(pictures)) if simple else messages
    settings = {"max_new_tokens": 9, "until": ["x"]}
    parts = (settings, own) if simple else (own, settings)
    wrapper = SimpleNamespace(is_simple=simple, task_dict={"made": {"test": [doc]}})
    metadata = {"task": "made", "doc_id": 0, "repeats": 1}
    return wrapper, Instance("generate_until", (doc["question"] + "!", *parts, 0, "made", "test"), 0, metadata)


@pytest.mark.parametrize("simple", [True, False])
def test_a_pair_is_asked_as_a_request_is(simple):
    wrapper, request = made({"question": "What?", "images": [OWN]}, simple)
    asked = instances.as_asked(wrapper, request, "Do it.", NEW)
    assert instances.images_of(wrapper, asked) == [NEW]
    assert asked.args[0] == "Do it."
    assert {"max_new_tokens": 1, "until": ["x"]} in asked.args
    assert {"max_new_tokens": 9, "until": ["x"]} in request.args
    if not simple:
        system, user = asked.args[1](wrapper.task_dict["made"]["test"][0])
        assert system == SYSTEM
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert user["content"][1]["text"] == "Do it."


@pytest.mark.parametrize("simple", [True, False])
def test_text_alone_gets_the_picture_added(simple):
    wrapper, request = made({"question": "What?"}, simple)
    assert instances.images_of(wrapper, request) == []
    arguments = instances.with_picture_added(wrapper, request, NEW)
    assert instances.images_of(wrapper, SimpleNamespace(args=arguments)) == [NEW]
    if not simple:
        system, user = arguments[1](wrapper.task_dict["made"]["test"][0])
        assert (system, user["content"][-1]) == (SYSTEM, {"type": "text", "text": "What?"})


@pytest.fixture
def options(tmp_path):
    rows = [{"instruction": "Do  IT now.", "response": "Sure."}, {"instruction": "", "response": "Yes."}]
    (tmp_path / "corpus.json").write_text(json.dumps(rows))
    return Options(None, {"name": "universal", "corpus": str(tmp_path / "corpus.json")}, tmp_path, 1)


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize(
    "doc",
    [
        {"question": "do it NOW. "},
        {"question": "Answer in one word: do it now.", "plain": "Do it now."},
    ],
)
def test_a_question_of_the_corpus_is_not_scored_with_it(options, doc, simple):
    wrapper, request = made(doc, simple)
    way = SimpleNamespace(wrapper=wrapper)
    with pytest.raises(AttackError, match=r"made\[0\] asks 'Do  IT now.', which is in the corpus"):
        universal.shown_requests(way, [request], options, None, None, None)


def test_other_questions_pass_and_empty_instructions_match_nothing(options):
    wrapper, request = made({"question": "Undo it now.", "note": ""}, True)
    plan = universal._plan(wrapper, request, options)
    universal.refuse_known_questions(wrapper, corpus_of(plan.attack.settings), [plan])


def test_only_universal_requests_are_taken_out(options):
    _, request = made({"question": "What?"}, True)
    other = Instance("generate_until", request.args, 1, {"task": "made", "doc_id": 0, "attack": "pgd", "repeats": 1})
    task_says = Options(None, {}, options.attack_cache, 1)
    assert universal.split([request, other], task_says) == ([], [request, other])
    assert universal.split([request, other], options) == ([request, other], [])
    own = Instance(
        "generate_until", request.args, 2, {"task": "made", "doc_id": 0, "attack": "universal", "repeats": 1}
    )
    assert universal.split([request, other, own], task_says) == ([own], [other])


@pytest.mark.parametrize("defense", ["none", "smoothguard"])
def test_one_picture_for_a_whole_task(tmp_path, monkeypatch, caplog, defense):
    from lmms_eval.evaluator import simple_evaluate

    pairs = language.request_pairs(language.FORBIDDEN_VERBS, test=False)[:6]
    rows = [{"instruction": language.request(*p, 0), "response": language.compliance(*p)} for p in pairs]
    (tmp_path / "corpus.json").write_text(json.dumps(rows))
    crafted, own = [], UniversalCrafter.craft_universal

    def watched(self, settings, base, lessons):
        crafted.append((base, lessons))
        return own(self, settings, base, lessons)

    monkeypatch.setattr(UniversalCrafter, "craft_universal", watched)
    arguments = {
        "pretrained": MODEL_DIR, "defense": defense, "num_samples": 3, "attack": "universal", "attack_steps": 2,
        "attack_corpus": tmp_path / "corpus.json", "attack_batch": 2, "attack_cache": tmp_path / "cache",
    }  # fmt: skip
    results = simple_evaluate(
        model="smoothguard_llava", model_args=",".join(f"{k}={v}" for k, v in arguments.items()), tasks=["shapes_safety"],
        limit=3, batch_size=1, bootstrap_iters=0, task_manager=task_manager(),
    )  # fmt: skip
    infos = [sample["token_counts"][0] for sample in results["samples"]["shapes_safety"]]
    ((base, lessons),) = crafted
    assert (base == np.full((64, 64, 3), 128)).all()
    assert len(lessons) == 6
    assert len({info["attack_key"] for info in infos}) == 1
    assert infos[0]["clean_answer"].strip() == language.REFUSAL
    assert infos[0]["attack"]["name"] == "universal"
    assert 0 < infos[0]["attack_linf"] <= 32 / 255 + 1e-6
    assert all(("candidates" in info) == (defense != "none") for info in infos)
    assert all(info["attack_replaces_picture"] for info in infos)  # the scenes' own
    assert "The control is attack_eps=0" in caplog.text
