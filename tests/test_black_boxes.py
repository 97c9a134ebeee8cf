"""lmms-eval's wrappers of remote models, run for real against transformers' server on the embedded model."""

from __future__ import annotations

import base64
import io
import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from lmms_eval.api.instance import Instance, TokenCounts
from managers import task_manager
from PIL import Image
from serving import Faulty, served, transformers_server

from lmms_smoothguard.aggregation.verdict import aggregate
from lmms_smoothguard.blackbox.pictures import Sight
from lmms_smoothguard.choice import choose
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.harness.lmms_eval.black_boxes import _Asked, is_failure
from lmms_smoothguard.tiny.model import MODEL_DIR
from lmms_smoothguard.tiny.testsets import test_sets as shipped_sets

LIMIT = 4


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with transformers_server(tmp_path_factory.mktemp("engine") / "log") as address:
        yield address


@pytest.fixture
def between(engine):
    faulty = Faulty(engine)
    with served(faulty.app) as faulty.address:
        yield faulty


def evaluate(between, wrapper, task="shapes_pope", **model_args):
    from lmms_eval.evaluator import simple_evaluate

    arguments = {
        "model_version": MODEL_DIR,
        "base_url": f"{between.address}/v1",
        "api_key": "none",
        "max_retries": 1,
        **model_args,
    }
    found = simple_evaluate(
        model=f"smoothguard_{wrapper}", model_args=",".join(f"{name}={value}" for name, value in arguments.items()), tasks=[task],
        limit=LIMIT, batch_size=1, bootstrap_iters=0, task_manager=task_manager(f"smoothguard_{wrapper}"),
    )  # fmt: skip
    return found["samples"][task]


def picture(body):
    parts = body["messages"][-1]["content"]
    url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"), float) / 255


def question(body):
    return "".join(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")


DEFENDED = {"num_samples": 5, "sigma": 0.2, "seen_as": "keep"}


@pytest.mark.parametrize("wrapper", ["openai", "async_openai"])
def test_answers_are_votes_over_the_engines_answers_to_noisy_pictures(between, engine, wrapper):
    samples = evaluate(between, wrapper, **DEFENDED)
    rows = shipped_sets()["pope"]
    assert between.calls == 5 * LIMIT
    for sample in samples:
        doc = rows[sample["doc_id"]]
        clean = doc["image"] / 255
        own = [
            body
            for body in between.bodies
            if doc["question"] in question(body) and np.abs(picture(body) - clean).mean() < 0.3
        ]
        own = sorted(own, key=lambda body: np.abs(picture(body) - clean).mean())
        noises = [picture(body) - clean for body in own]
        assert len(own) == 5
        assert not noises[0].any()
        inside = (clean > 0.4) & (clean < 0.6)  # where little is clipped
        for noise in noises[1:]:
            assert noise[inside].std() == pytest.approx(0.2, rel=0.15)
        assert len({noise.tobytes() for noise in noises}) == 5
        said = [
            httpx.post(f"{engine}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            for body in own
        ]
        info = sample["token_counts"][0]
        assert sorted(info["candidates"]) == sorted(said)
        verdict = aggregate(info["candidates"], lambda: pytest.fail("no vectors needed"))
        assert sample["resps"][0][0] == info["candidates"][verdict.chosen]
        assert (info["agreement"], info["defended"], info["failed"]) == (verdict.agreement, True, 0)


def test_noise_hangs_on_the_seed_alone(between):
    runs = []
    for seed in (0, 0, 1):
        del between.bodies[:]
        evaluate(between, "openai", **DEFENDED | {"num_samples": 2, "include_clean": False, "seed": seed})
        runs.append({picture(body).tobytes() for body in between.bodies})
    assert runs[0] == runs[1]
    assert not runs[0] & runs[2]


def test_without_a_defence_it_is_upstreams_run(between):
    plain = evaluate(between, "openai", defense="none")
    assert between.calls == LIMIT
    between.bodies, ours = [], between.bodies
    upstream_samples = evaluate_upstream(between)
    assert sorted(map(json.dumps, between.bodies)) == sorted(map(json.dumps, ours))  # several are asked at a time
    scored = ("resps", "filtered_resps", "pope_accuracy")
    assert [{name: sample.get(name) for name in scored} for sample in plain] == [
        {name: sample.get(name) for name in scored} for sample in upstream_samples
    ]


def evaluate_upstream(between):
    from lmms_eval.evaluator import simple_evaluate

    found = simple_evaluate(
        model="openai", model_args=f"model_version={MODEL_DIR},base_url={between.address}/v1,api_key=none,max_retries=1",
        tasks=["shapes_pope"], limit=LIMIT, batch_size=1, bootstrap_iters=0, task_manager=task_manager("openai"),
    )  # fmt: skip
    return found["samples"]["shapes_pope"]


def test_exact_early_stopping_asks_for_fewer_copies_and_changes_no_answer(between):
    whole = evaluate(between, "openai", **DEFENDED | {"num_samples": 7})
    assert between.calls == 7 * LIMIT
    between.calls = 0
    early = evaluate(between, "openai", **DEFENDED | {"num_samples": 7, "early_stop": "exact"})
    assert between.calls < 7 * LIMIT
    assert between.calls == sum(sample["token_counts"][0]["num_samples_used"] for sample in early)
    normal = [[sample["resps"][0][0].strip().lower() for sample in run] for run in (whole, early)]
    assert normal[0] == normal[1]


def test_failed_copies_have_no_vote(between, caplog):
    between.plan = [400] * 2  # which the client's own library does not try again
    samples = evaluate(between, "openai", **DEFENDED, num_concurrent=1)
    infos = [sample["token_counts"][0] for sample in samples]
    assert sum(info["failed"] for info in infos) == 2
    assert all(info["defended"] for info in infos)
    assert not any("LMMS_EVAL" in text for info in infos for text in info["candidates"])
    assert sum(len(info["candidates"]) for info in infos) == 5 * LIMIT - 2


def test_a_request_with_too_few_answers_is_scored_as_upstream_scores_a_failure(between, caplog):
    between.plan = [400] * 3
    samples = evaluate(between, "openai", **DEFENDED, num_concurrent=1)
    lost = [sample for sample in samples if sample["token_counts"][0].get("no_quorum")]
    assert len(lost) == 1
    assert lost[0]["token_counts"][0] == {"defended": False, "no_quorum": True, "failed": 3} | counted(lost[0])
    assert lost[0]["resps"][0][0].startswith("[LMMS_EVAL_REQUEST_FAILED")
    assert "1 of 4 requests got too few answers" in caplog.text


def counted(sample):
    return {name: value for name, value in sample["token_counts"][0].items() if name.endswith("_tokens")}


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({}, "seen_as is None"),
        ({"seen_as": "large"}, "seen_as is 'large'"),
        ({"seen_as": 336, "noise_space": "normalized"}, "noise_space is 'normalized'"),
        ({"seen_as": 336, "level": "token"}, "level is 'token'"),
        ({"seen_as": 336, "embedder": "model"}, "embedder is 'model'"),
        ({"seen_as": 336, "num_samples": 1}, "num_samples is 1"),
        ({"seen_as": 336, "defense": "feature_smoothing"}, "acts inside of a model"),
        ({"seen_as": 336, "attack": "pgd"}, "has no model inside"),
        ({"seen_as": 336, "vision_tower": "tiny-fare"}, "has no model inside"),
        ({"seen_as": 336, "sigmma": 0.1}, "did you mean 'sigma'"),
        ({"seen_a": 336}, "seen_as"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(between, model_args, message):
    with pytest.raises((ConfigError, UndefendableError), match=message):
        evaluate(between, "openai", **model_args)
    assert between.calls == 0


def test_a_task_that_attacks_is_refused(between):
    with pytest.raises(UndefendableError, match="attacks the model it asks"):
        evaluate(between, "openai", "shapes_pope_pgd", **DEFENDED)
    assert between.calls == 0


# -- single requests ---------------------------------------------------------------------------------------------------


def request_of(media, simple):
    content = [{"type": "text", "text": "What is this?"}, *media]
    give = (
        (lambda doc: media) if simple else (lambda doc: [{"role": "user", "content": [dict(part) for part in content]}])
    )
    arguments = ("What is this?", {}, give, 0, "t", "test") if simple else ("What is this?", give, {}, 0, "t", "test")
    wrapper = SimpleNamespace(is_simple=simple, task_dict={"t": {"test": [{}]}})
    return wrapper, Instance("generate_until", arguments, 0, {"task": "t", "doc_id": 0, "repeats": 1})


SMALL = Image.new("RGB", (40, 20), (128, 128, 128))
DEFENSE = choose({"sigma": 0.1, "noise_space": "pixel", "num_samples": 3})


@pytest.mark.parametrize("simple", [True, False])
def test_copies_have_the_pictures_places_and_sizes(simple):
    from lmms_smoothguard.harness.lmms_eval.instances import images_of

    media = [SMALL, SMALL.resize((100, 200))]
    wrapper, request = request_of(media if simple else [{"type": "image", "url": one} for one in media], simple)
    asked = _Asked(wrapper, request, DEFENSE, Sight(50))
    assert list(asked.next_copies()) == [0, 1, 2]
    clean, noisy = images_of(wrapper, asked.copy(0)), images_of(wrapper, asked.copy(1))
    assert [one.size for one in clean] == [one.size for one in noisy] == [(40, 20), (50, 100)]
    assert np.asarray(clean[0]).tobytes() == np.asarray(SMALL).tobytes()
    assert (np.asarray(noisy[1], float) / 255).std() == pytest.approx(0.1, rel=0.05)
    again = images_of(wrapper, asked.copy(1))
    assert [np.asarray(one).tobytes() for one in noisy] == [np.asarray(one).tobytes() for one in again]


@pytest.mark.parametrize("simple", [True, False])
def test_a_picture_that_would_be_squeezed_is_refused_before_anything_is_asked(simple):
    strip = SMALL.resize((400, 20))
    wrapper, request = request_of([strip] if simple else [{"type": "image", "url": strip}], simple)
    with pytest.raises(UndefendableError, match="400 x 20"):
        _Asked(wrapper, request, DEFENSE, Sight(20))
    assert next(iter(_Asked(wrapper, request, DEFENSE, Sight(size=(24, 24))).next_copies())) == 0


@pytest.mark.parametrize("simple", [True, False])
def test_requests_without_media_are_asked_once_as_they_are(simple):
    wrapper, request = request_of([], simple)
    asked = _Asked(wrapper, request, DEFENSE, Sight())
    assert list(asked.next_copies()) == [0]
    assert asked.copy(0) is request
    asked.add(0, "Fine.", TokenCounts(3, 2))
    assert list(asked.next_copies()) == []
    assert (asked.result().text, asked.result().token_counts.to_dict()) == (
        "Fine.",
        {"input_tokens": 3, "output_tokens": 2, "defended": False},
    )


@pytest.mark.parametrize("simple", [True, False])
def test_media_that_are_no_pictures_are_refused(simple):
    for media in (["clip.mp4"], [SMALL, "sound.wav"]):
        parts = media if simple else [{"type": "image" if one is SMALL else "video", "url": one} for one in media]
        wrapper, request = request_of(parts, simple)
        with pytest.raises(UndefendableError, match=r"t\[0\] has"):
            _Asked(wrapper, request, DEFENSE, Sight())
        _Asked(wrapper, request, None, Sight())  # without a defence it is upstream's business


def test_token_counts_are_those_of_all_copies():
    wrapper, request = request_of([SMALL], True)
    asked = _Asked(wrapper, request, DEFENSE, Sight())
    for copy, counts in enumerate((TokenCounts(10, 1), None, TokenCounts(10, 3, 2))):
        asked.add(copy, "Yes", counts)
    found = asked.result().token_counts
    assert (found.input_tokens, found.output_tokens, found.reasoning_tokens) == (20, 4, 2)


def test_what_counts_as_no_answer():
    assert all(
        map(is_failure, (None, "", "[LMMS_EVAL_REQUEST_FAILED after 3 retries] x", "[LMMS_EVAL_BUDGET_EXCEEDED]"))
    )
    assert not any(map(is_failure, ("No", "[SAFETY_BLOCKED:x]", "It failed.")))
