"""A model under test without a harness: its inputs are its processor's, its answers `generate`'s, defended where asked."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ARCHITECTURES

from lmms_smoothguard.choice import choose
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.questions import Question
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.model import MODEL_DIR, prompt

DEFENSE = choose({"sigma": 0.2, "noise_space": "pixel", "num_samples": 4})


@pytest.fixture(scope="module")
def tiny():
    return Subject("tiny-llava", device="cpu")


@pytest.fixture
def question(scenes, images):
    return Question("q", (images[0],), language.existence_question(scenes.present(0)[0]))


def test_the_embedded_model_is_asked_as_it_was_trained(tiny, question):
    made = tiny.inputs(question)
    direct = tiny.processor(images=list(question.images), text=[prompt(question.text)], return_tensors="pt")
    assert set(made) == set(direct)
    assert all(torch.equal(made[key], direct[key]) for key in made)
    reply = tiny.answer(made, max_new_tokens=8)
    assert (reply.text, reply.verdict) == ("Yes", None)
    assert tiny.tokenizer.decode(reply.ids).strip() == "Yes"


def test_an_answer_is_defended_where_asked_and_there_alone(tiny, question):
    inputs = tiny.inputs(question)
    defended = tiny.answer(inputs, 8, DEFENSE)
    assert defended.verdict.num_samples_used == 4
    assert defended.ids == defended.verdict.candidates[defended.verdict.chosen]
    tiny.model.generation_config.smoothguard = True
    try:
        assert tiny.answer(inputs, 8).verdict is None
    finally:
        tiny.model.generation_config.smoothguard = None


@pytest.mark.parametrize("said, expected", [([2, 7, 8, 2], (7, 8)), ([2, 7, 8], (7, 8)), ([2, 2], ())])
def test_a_decoders_start_is_no_part_of_its_answer(said, expected):
    """It is the end token too, so that the answer would be taken for an empty one."""
    of_decoder = Subject.__new__(Subject)
    of_decoder.model = SimpleNamespace(
        config=SimpleNamespace(is_encoder_decoder=True), generation_config=SimpleNamespace(eos_token_id=2)
    )
    assert of_decoder._without_prompt_and_end(said, {"input_ids": torch.tensor([[4, 5]])}) == expected


def test_answers_are_greedy_whatever_the_checkpoint_asks_for(tiny, question):
    inputs, settings = tiny.inputs(question), tiny.model.generation_config
    question = Question("q", question.images, "What is in the image?")
    inputs = tiny.inputs(question)
    greedy = tiny.answer(inputs, 24)
    settings.do_sample, settings.temperature, settings.top_k = True, 5.0, 50
    try:
        assert {tiny.answer(inputs, 24).ids for _ in range(3)} == {greedy.ids}
    finally:
        settings.do_sample, settings.temperature, settings.top_k = False, 1.0, 50
    assert len(tiny.answer(inputs, 3).ids) == 3 < len(greedy.ids)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl", "gemma3"])
def test_other_models_from_a_directory_with_two_pictures_and_no_template(tmp_path, pictures, name):
    kind = ARCHITECTURES[name]
    model, processor = kind.build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    subject = Subject(str(tmp_path), device="cpu", dtype="float32")
    subject.processor.chat_template = None
    made = subject.inputs(Question("q", pictures[:2], "What is it?"))
    texts = [f"{kind.image * 2}\nWhat is it?"]
    expected = processor(images=[list(pictures[:2])], text=texts, return_tensors="pt")
    assert torch.equal(made["pixel_values"], expected["pixel_values"])
    assert torch.equal(made["input_ids"], expected["input_ids"])
    length = made["input_ids"].shape[1]
    own = model.generate(**made, max_new_tokens=4, do_sample=False)[0, length:].tolist()
    ids = subject.answer(made, 4).ids
    assert ids == tuple(own[: len(ids)]) and len(ids) >= 1
    assert subject.answer(made, 4, DEFENSE).verdict.num_samples_used == 4


def test_pictures_come_before_the_text_in_a_template(tiny, question):
    content = [{"type": "image", "image": question.images[0]}, {"type": "text", "text": question.text}]
    ids = tiny.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    assert torch.equal(tiny.inputs(question)["input_ids"], ids)


def test_what_cannot_be_asked_is_refused(tiny, question, tmp_path):
    with pytest.raises(ConfigError, match="'q' has <image> in its text"):
        tiny.inputs(Question("q", question.images, "<image> Is there a dog?"))
    blind = Subject("tiny-llava", device="cpu")
    blind.processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(ConfigError, match=r"'q'.*expected.*a chat template"):
        blind.inputs(question)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float61"}, "dtype is 'float61'; did you mean 'float16'"),
        ({"device": "gpu"}, "device is 'gpu'; expected cpu"),
        ({"pretrained": "nobody/nothing"}, "'nobody/nothing' cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Subject(**{"pretrained": "tiny-llava", "device": "cpu"} | arguments)


def test_pickled_weights_and_a_checkpoint_s_own_code_are_left_alone(tmp_path, trained):
    shutil.copytree(MODEL_DIR, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").unlink()
    torch.save(trained[0].state_dict(), tmp_path / "pickled/pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        Subject(str(tmp_path / "pickled"), device="cpu")

    shutil.copytree(MODEL_DIR, tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForImageTextToText": "mine.Mine"},
    }
    (tmp_path / "own/config.json").write_text(json.dumps(config))
    (tmp_path / "own/mine.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Subject(str(tmp_path / "own"), device="cpu")
    assert not (tmp_path / "run").exists()
