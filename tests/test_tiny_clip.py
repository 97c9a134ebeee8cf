"""The embedded dual encoder: its tower is the LLaVA's, its figures are what the card says, its training repeats itself."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lmms_smoothguard.tiny import clip_testsets, language
from lmms_smoothguard.tiny.clip_evaluate import (
    held_out_figures,
    image_embeddings,
    text_embeddings,
    within,
)
from lmms_smoothguard.tiny.clip_model import CLIP_DIR, class_prompts, statement
from lmms_smoothguard.tiny.clip_testsets import presence_set, retrieval_set, single_object, zero_shot_set
from lmms_smoothguard.tiny.clip_train import ClipRecipe, contrastive_loss, scaled, train
from lmms_smoothguard.tiny.scenes import OBJECTS, make_scenes
from lmms_smoothguard.tiny.train import _FIRST_TRAINING_SHARD


@pytest.fixture(scope="module")
def clip():
    """As any user loads it."""
    from transformers import CLIPModel, CLIPProcessor

    return CLIPModel.from_pretrained(CLIP_DIR).eval(), CLIPProcessor.from_pretrained(CLIP_DIR)


def test_plain_transformers_loads_it(clip):
    from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor

    model, processor = clip
    assert type(model) is CLIPModel
    assert type(processor) is CLIPProcessor
    assert type(AutoModel.from_pretrained(CLIP_DIR)) is CLIPModel
    assert type(AutoProcessor.from_pretrained(CLIP_DIR)) is CLIPProcessor
    assert (CLIP_DIR / "model.safetensors").stat().st_size <= 8_000_000


def test_what_the_llava_sees_with_is_locked(trained, clip):
    """Bit by bit: weights, and what comes out for a picture."""
    model, processor = clip
    llava, llava_processor = trained
    own, theirs = model.vision_model.state_dict(), llava.model.vision_tower.state_dict()
    assert own.keys() == theirs.keys()
    differing = {name for name in own if not torch.equal(own[name], theirs[name])}
    assert differing == {"post_layernorm.weight", "post_layernorm.bias"}
    picture = make_scenes(1, 501).images[0]
    pixels = processor(images=[picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, llava_processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"])
    with torch.no_grad():
        seen = [tower(pixels).last_hidden_state for tower in (model.vision_model, llava.model.vision_tower)]
    assert torch.equal(*seen)


def test_the_text_tower_reads_its_end_token_and_no_padding(clip):
    model, processor = clip
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id != 2
    alone = text_embeddings(model, processor, ["a photo of a red circle"])
    padded = text_embeddings(model, processor, ["A photo of a RED circle", statement((0, 7, 11, 29), 4)])
    assert torch.allclose(alone[0], padded[0], atol=1e-5)
    assert alone[0] @ text_embeddings(model, processor, ["a photo of a red square"])[0] < 0.9


def test_every_word_of_the_language_is_known(clip):
    _, processor = clip
    texts = [statement((obj, (obj + 1) % 30, (obj + 7) % 30), wording) for obj in range(30) for wording in range(5)]
    for ids in processor(text=[*texts, *class_prompts()])["input_ids"]:
        assert processor.tokenizer.unk_token_id not in ids
        assert len(ids) <= processor.tokenizer.model_max_length
    assert processor.tokenizer.unk_token_id in processor(text="a photo of a horse")["input_ids"]


def test_statements_name_their_objects():
    assert statement((5, 0), 0) == "a photo of a red circle and a green circle"
    assert statement((0,), 1) == "a red circle"
    assert statement((0,), 4) == language.caption((0,)) == "A red circle."
    assert class_prompts()[25] == "a photo of an orange circle"


def test_test_sets_are_what_they_say():
    single, pairs, there = zero_shot_set(), retrieval_set(), presence_set()
    assert np.bincount(single.labels).tolist() == [20] * len(OBJECTS)
    assert len(pairs.captions) == len(set(pairs.captions)) == len(pairs.images) == 500
    assert len(there.images) == 500
    for caption in pairs.captions[:50]:
        assert sum(f" {name}" in f" {caption.lower()}" for name in OBJECTS) >= 2
    assert (there.present != there.absent).all()
    scenes = make_scenes(500, 13)
    for index in range(500):
        assert there.present[index] in scenes.present(index)
        assert there.absent[index] not in scenes.present(index)
    for picture in (single.images, pairs.images):
        assert len({one.tobytes() for one in picture}) == len(picture)


def test_test_seeds_are_no_training_seeds():
    last = 100 * (clip_testsets._SHARDS - 1)
    seeds = (clip_testsets._ZERO_SHOT_SEED, clip_testsets._RETRIEVAL_SEED, clip_testsets._PRESENCE_SEED)
    assert max(seeds) + last < _FIRST_TRAINING_SHARD
    # Every hundredth seed from each on: none meets another set's.
    assert len({seed % 100 for seed in (*seeds, 1, 2, 3, 4)}) == 7


def test_figures_on_a_subset_are_the_cards_and_far_above_chance(clip):
    model, processor = clip
    stated = {k: v["value"] for k, v in json.loads((CLIP_DIR / "figures.json").read_text())["figures"].items()}
    single = zero_shot_set()
    classes = text_embeddings(model, processor, class_prompts())
    seen = image_embeddings(model, processor, single.images[:200]) @ classes.T
    right = (seen.argmax(1).numpy() == single.labels[:200]).mean()
    assert right == pytest.approx(stated["zero-shot, 30 classes"], abs=0.06)  # 200 of 600
    assert right >= 0.8
    assert stated["zero-shot, 30 classes, one noisy copy, sigma 0.25"] >= 0.5
    pairs = retrieval_set()
    similarity = image_embeddings(model, processor, pairs.images) @ text_embeddings(model, processor, pairs.captions).T
    found = np.mean(within(similarity, 5))
    assert found == pytest.approx(stated["image to text, R@5"], abs=0.01)
    assert found >= 0.6  # chance is 0.01


@pytest.mark.slow
def test_held_out_figures_are_the_cards():
    stated = json.loads((CLIP_DIR / "figures.json").read_text())["figures"]
    card = (CLIP_DIR / "README.md").read_text()
    figures = held_out_figures(CLIP_DIR)
    assert figures.keys() == stated.keys()
    for name, figure in figures.items():
        assert figure.count >= 400
        assert stated[name]["value"] == pytest.approx(figure.value, abs=0.008), name
        assert f"| {name} |" in card


def test_retrieval_counts_equals_against_it():
    similarity = torch.tensor([[0.5, 0.5, 0.1], [0.9, 0.3, 0.2], [0.0, 0.1, 0.8]])
    assert within(similarity, 1) == [False, False, True]
    assert within(similarity, 2) == [True, True, True]


def test_pictures_of_one_caption_are_no_negatives():
    """Two pictures, one text: the loss is at its least when both are equally near to it, and the other text far."""
    positive = torch.tensor([[True, False], [True, False], [False, True]])
    good = torch.tensor([[50.0, 0], [50, 0], [0, 50]])
    assert contrastive_loss(good, positive).item() == pytest.approx(np.log(2) / 2 * 0.5, abs=1e-4)
    uneven = torch.tensor([[50.0, 0], [45, 0], [0, 50]])
    assert contrastive_loss(uneven, positive) > contrastive_loss(good, positive)


def test_training_repeats_itself_and_hangs_on_its_seed(tmp_path):
    small = ClipRecipe(scenes=100, steps=3, batch=16)
    weights = []
    for name, recipe in (("a", small), ("b", small), ("c", dataclasses.replace(small, seed=1))):
        train(tmp_path / name, recipe, evaluate=False)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    moved = {name for name in weights[0] if not torch.equal(weights[0][name], weights[2][name])}
    assert "text_projection.weight" in moved
    assert not {name for name in moved if name.startswith("vision_model.") and "post_layernorm" not in name}


def test_a_trial_is_smaller_and_a_test_scene_is_no_training_scene():
    assert scaled(ClipRecipe(), 0.01).steps == 15
    assert scaled(ClipRecipe(), 1) == ClipRecipe()
    alone = single_object(make_scenes(100, 51_000))
    assert (alone.objects[:, 0] >= 0).all()
    assert (alone.objects[:, 1:] == -1).all()


def test_the_command_line_finds_it():
    from lmms_smoothguard.cli import app

    done = CliRunner().invoke(app, ["model", "tiny-clip"])
    assert done.stdout.strip() == str(CLIP_DIR)
