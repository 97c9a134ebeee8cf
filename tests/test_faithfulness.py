"""One test for each defect of the official SmoothGuard code that can be tested; docs/faithfulness.md lists them."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from managers import task_manager
from PIL import Image
from tiny_models import IMAGE_STD
from tiny_models.subject import Subject, row_of

import hf_integration
from lmms_smoothguard.aggregation.verdict import aggregate
from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.runs import load_samples
from lmms_smoothguard.tiny.model import MODEL_DIR, prompt

ROOT = Path(__file__).parent.parent
DESCRIBE = "Describe the image."


@contextlib.contextmanager
def at_the_vision_tower(model):
    """What the vision tower is given: a list of pixel tensors."""
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["pixel_values"]).clone()),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        hook.remove()


def run(model, inputs, **config):
    with at_the_vision_tower(model) as seen:
        out = model.generate(**inputs, max_new_tokens=8, smoothguard=config, return_dict_in_generate=True)
    return out.smoothguard, seen


def test_1_images_are_preprocessed_once(llava, batch):
    """There, the normalised noisy tensor goes through the processor again: contrast falls to about 1.5 %."""
    model, _ = llava
    inputs = batch(0)
    _, (pixels,) = run(model, inputs, sigma=0.1)
    assert torch.equal(pixels[0], inputs["pixel_values"][0])
    clean = inputs["pixel_values"][0].std(dim=(1, 2))
    for copy_ in pixels[1:]:
        assert (copy_.std(dim=(1, 2)) >= 0.95 * clean).all()


def test_2_normalised_pixels_are_not_clipped_to_0_1(llava, batch):
    """There, one loader does, in the clean copy too: 63 % of the values become 0."""
    model, _ = llava
    inputs = batch(0)
    outside = (inputs["pixel_values"] < 0).float().mean()
    assert outside > 0.2  # or nothing could be clipped
    _, (pixels,) = run(model, inputs, sigma=0.1)
    assert ((pixels < 0).float().mean(dim=(1, 2, 3)) > 0.8 * outside).all()
    _, (pixels,) = run(model, inputs, sigma=0.5, noise_space="pixel")
    assert pixels.min() == -1  # black and white in this model's normalised units, mean = std = 1/2
    assert pixels.max() == 1


def test_3_the_noise_space_is_stated_and_pixel_sigma_is_the_same_in_every_channel(trained):
    """There, noise is added in normalised space without saying so: in pixels, sigma differs per channel."""
    model, processor = copy.deepcopy(trained[0]), copy.deepcopy(trained[1])
    processor.image_processor.image_std = [0.1, 0.25, 0.5]
    hf_integration.attach(model, processor)
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    inputs = processor(images=[grey], text=prompt(DESCRIBE), return_tensors="pt")
    std = torch.tensor([0.1, 0.25, 0.5])
    _, (pixels,) = run(model, inputs, sigma=0.05, noise_space="pixel")
    assert torch.allclose((pixels[1:] - pixels[:1]).std(dim=(0, 2, 3)) * std, torch.full((3,), 0.05), rtol=0.02)
    _, (pixels,) = run(model, inputs, sigma=0.05, noise_space="normalized")
    assert torch.allclose((pixels[1:] - pixels[:1]).std(dim=(0, 2, 3)), torch.full((3,), 0.05), rtol=0.02)
    for file in (ROOT / "benchmarks" / "results").glob("smoothguard*.json"):
        assert "noise_space=pixel" in json.loads(file.read_text())["command"]


def test_4_questions_are_told_apart(tmp_path):
    """There, accuracy against sigma merges 8,910 questions into 3,000 colliding ids."""
    for file in (ROOT / "tasks" / "shapes" / "data").glob("*.parquet"):
        if file.stem == "universal_corpus":
            continue  # pairs to craft on, which ask nothing
        ids = pyarrow.parquet.read_table(file, columns=["question_id"])["question_id"].to_pylist()
        assert len(set(ids)) == len(ids)
    row = {"doc_id": 0, "target": "yes", "filtered_resps": ["yes"], "accuracy": {"question_id": "7"}}
    log = tmp_path / "x_samples_shapes_pope.jsonl"
    log.write_text("".join(json.dumps(row | {"doc_id": n}) + "\n" for n in range(2)))
    (tmp_path / "x_results.json").write_text("{}")
    with pytest.raises(SmoothGuardError, match="colliding question ids: 7"):
        load_samples(tmp_path, "shapes_pope")


def test_5_baseline_and_defence_are_asked_the_same(monkeypatch):
    """There, their prompts differ in order, which confounds the gain on Qwen."""
    from lmms_eval.evaluator import simple_evaluate
    from transformers import LlavaForConditionalGeneration

    forward, asked = LlavaForConditionalGeneration.forward, {}

    def noting(self, input_ids=None, **kwargs):
        if input_ids is not None and input_ids.shape[1] > 1:
            asked[defense].append(input_ids)
        return forward(self, input_ids=input_ids, **kwargs)

    noting.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", noting)
    for defense in ("none", "smoothguard"):
        asked[defense] = []
        simple_evaluate(
            model="smoothguard_llava", model_args=f"pretrained={MODEL_DIR},defense={defense},num_samples=3",
            tasks=["shapes_pope"], limit=3, batch_size=1, bootstrap_iters=0,
            task_manager=task_manager(),
        )  # fmt: skip
    assert len(asked["none"]) == 3
    for plain, copies in zip(asked["none"], asked["smoothguard"], strict=True):
        assert torch.equal(copies, plain.expand(3, -1))


def test_6_clustering_is_seeded():
    """There, the same embeddings gave four different answers in thirty runs."""
    generator = np.random.default_rng(0)
    answers, vectors = [f"answer {n}" for n in range(10)], generator.normal(size=(10, 4))
    found = set()
    for state in range(30):
        np.random.seed(state)
        found.add(aggregate(answers, lambda: lambda texts: vectors).chosen)
    assert len(found) == 1


def test_7_one_batch_and_one_call_of_the_embedder_on_any_device(llava, batch, monkeypatch):
    """There: 11 generates and 11 embedder calls one after the other, on a CUDA device named in the code."""
    from lmms_smoothguard.aggregation import embedders

    model, _ = llava
    calls, lexical = [], embedders.lexical

    def counting(context):
        return lambda texts: calls.append(list(texts)) or lexical(context)(texts)

    monkeypatch.setattr(embedders, "lexical", counting)
    verdicts, seen = run(model, batch(1, question=DESCRIBE), sigma=0.8, noise_space="pixel")
    assert [pixels.shape[0] for pixels in seen] == [10]
    assert len(set(verdicts[0].texts)) > 2
    assert len(calls) == 1
    for package in ("lmms_smoothguard", "hf_integration"):
        for file in (ROOT / package).rglob("*.py"):
            assert not re.search(r"\.cuda\(|to\([\"']cuda|device=[\"']cuda", file.read_text()), file


def test_8_every_image_is_noised_and_used(llava, images):
    """There, images after the first are never used."""
    model, processor = llava
    text = prompt(DESCRIBE).replace("<image>", "<image><image>")

    def ask(second):
        inputs = processor(images=[images[0], second], text=text, return_tensors="pt")
        verdicts, (pixels,) = run(model, inputs, sigma=0.1)
        return verdicts[0], pixels.view(10, 2, *pixels.shape[1:])

    first, pixels = ask(images[1])
    noise = (pixels[1:] - pixels[:1]).std(dim=(0, 2, 3, 4))
    assert torch.allclose(noise, torch.full((2,), 0.1), rtol=0.02)
    assert any(ask(other)[0].texts != first.texts for other in images[2:6])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_9_packed_patches_are_attacked_within_a_budget_in_pixels(name, images, tmp_path):
    """There, the attack on Qwen cannot run, and its eps / 255 is in normalised units: here std is .2 to .35 of a pixel."""
    subject = Subject(name)
    chosen = (images[0].resize((84, 56)),)
    inputs = subject.inputs(row_of(*chosen))
    assert inputs["pixel_values"].ndim == 2
    job = Job(AttackSettings(eps=4 / 255, steps=5), chosen, inputs, subject.answer(inputs, min_new_tokens=4))
    (entry,) = Crafter(subject.model, subject.processor, AttackCache(tmp_path)).craft([job])
    change = np.abs(entry.images[0].astype(int) - np.asarray(chosen[0]).astype(int))
    assert change.max() == 4
    assert entry.record["objective"][-1] > entry.record["objective"][0]
    seen = subject.inputs(row_of(Image.fromarray(entry.images[0])))["pixel_values"]
    moved = (seen - inputs["pixel_values"]).abs().max()
    assert moved == pytest.approx(4 / 255 / min(IMAGE_STD), rel=0.05)


def test_10_a_judge_sees_the_question_and_is_asked_once(monkeypatch):
    """There, it sees the answer alone, and is asked again without end."""
    from lmms_smoothguard import plugins
    from lmms_smoothguard.harness.lmms_eval import judging
    from lmms_smoothguard.harness.lmms_eval.safety import safety_scores
    from lmms_smoothguard.judges import Judgement

    seen = []

    class Judge:
        def judge(self, question, answer):
            seen.append((question, answer))
            if answer == "?":
                raise ValueError("no verdict")
            return Judgement("safe")

    monkeypatch.setattr(plugins, "load", lambda kind, name, manager=None: lambda argument: Judge())
    monkeypatch.setattr(judging, "_loaded", {})
    monkeypatch.setattr(judging, "_said", {})
    doc = {"question": "May I?", "kind": "forbidden"}
    assert safety_scores(doc, "No.")["unsafe_rate"]["verdict"] == "safe"
    with pytest.raises(ValueError, match="no verdict"):
        safety_scores(doc, "?")
    assert seen == [("May I?", "No."), ("May I?", "?")]


def test_every_defect_is_on_the_page():
    page = (ROOT / "docs" / "faithfulness.md").read_text()
    tests = re.findall(r"^def (test_\d+_\w+)", Path(__file__).read_text(), flags=re.MULTILINE)
    assert [int(name.split("_")[1]) for name in tests] == list(range(1, 11))
    for name in tests:
        assert f"`{name}`" in page
