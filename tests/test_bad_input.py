"""What goes wrong in real life: a clear error, or a stated outcome."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from lmms_smoothguard.defenses import smoothguard
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.tiny.model import prompt

PIXEL = {"sigma": 0.2, "noise_space": "pixel"}


def ask(llava, image):
    model, processor = llava
    inputs = processor(images=[image], text=prompt("Describe the image."), return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=32, smoothguard=PIXEL, return_dict_in_generate=True).smoothguard[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA"])
def test_every_colour_mode_is_defended(llava, images, mode):
    """Alone it answers as its RGB version does."""
    assert ask(llava, images[0].convert(mode)).texts == ask(llava, images[0].convert(mode).convert("RGB")).texts


def test_one_pixel(llava):
    assert ask(llava, Image.new("RGB", (1, 1), (200, 30, 30))).num_samples_used == 10


def test_truncated_file(llava, images, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # PIL's default; importing lmms-eval changes it
    buffer = io.BytesIO()
    images[0].save(buffer, "PNG")
    cut = Image.open(io.BytesIO(buffer.getvalue()[:2000]))
    with pytest.raises(OSError, match="truncated"):
        ask(llava, cut)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite(llava, batch, value):
    model, _ = llava
    inputs = batch(0)
    inputs["pixel_values"][0, 0, 0, 0] = value
    with pytest.raises(UndefendableError, match="NaN or Inf"):
        model.generate(**inputs, smoothguard=True)


def test_whole_numbers_as_pixels_are_refused(llava, batch):
    """Noise of .1 would be rounded away: an answer as good as undefended."""
    model, _ = llava
    inputs = batch(0)
    inputs["pixel_values"] = ((inputs["pixel_values"] + 1) * 127).to(torch.uint8)
    with pytest.raises(UndefendableError, match="of type uint8; expected floating point"):
        model.generate(**inputs, smoothguard=True)


def test_grey_levels_as_normalised_pixels_are_refused(llava, batch):
    model, _ = llava
    inputs = batch(0)
    inputs["pixel_values"] = (inputs["pixel_values"] + 1) * 127
    with pytest.raises(UndefendableError, match="are not normalised"):
        model.generate(**inputs, smoothguard=True)


@pytest.mark.parametrize("kind", ["ChameleonConfig", "LlavaConfig"])
def test_a_cache_of_any_multimodal_model_may_hide_an_image(kind):
    import transformers

    from lmms_smoothguard.inputs.media import find_images

    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "past_key_values": transformers.DynamicCache()}
    with pytest.raises(UndefendableError, match="never defended"):
        find_images(inputs, getattr(transformers, kind)())
    assert find_images(inputs, transformers.LlamaConfig()) is None


@pytest.mark.parametrize("key", ["input_features", "input_values", "audio_values"])
def test_audio_is_refused_with_the_reason(llava, batch, key):
    model, _ = llava
    with pytest.raises(UndefendableError, match="waveform"):
        model.generate(**batch(0), **{key: torch.zeros(1, 8)}, smoothguard=True)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1, 8), [[torch.zeros(2)]], {"image": torch.zeros(2)}, np.zeros(3), [Image.new("RGB", (4, 4))]],
)
def test_unknown_media_is_refused(llava, batch, value):
    model, _ = llava
    with pytest.raises(UndefendableError, match="mystery_patches is a continuous input of unknown layout"):
        model.generate(**batch(0), mystery_patches=value, smoothguard=True)


def test_video_is_refused(llava, batch):
    model, _ = llava
    with pytest.raises(UndefendableError, match="video"):
        model.generate(**batch(0), pixel_values_videos=torch.zeros(1, 2, 3, 8, 8), smoothguard=True)


def test_unknown_patch_layout_is_refused(llava, batch):
    model, _ = llava
    inputs = batch(0)
    inputs["pixel_values"] = torch.zeros(4, 12)
    with pytest.raises(UndefendableError, match="unknown layout"):
        model.generate(**inputs, smoothguard=True)


def test_a_cache_may_hide_an_image(llava, batch):
    from transformers import DynamicCache

    model, processor = llava
    text = processor.tokenizer("<s>USER: hello ASSISTANT:", return_tensors="pt")
    with pytest.raises(UndefendableError, match="never defended"):
        model.generate(**text, past_key_values=DynamicCache(), smoothguard=True)
    with pytest.raises(UndefendableError, match="cannot be shared"):
        model.generate(**batch(0), past_key_values=DynamicCache(), smoothguard=True)


def test_precomputed_embeddings_are_refused(llava, batch):
    model, _ = llava
    inputs = batch(0)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(UndefendableError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], smoothguard=True)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"num_return_sequences": 2, "num_beams": 2}, "num_return_sequences is 2"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"cache_implementation": "paged"}, "paged"),
    ],
)
def test_modes_without_one_answer_a_copy(llava, batch, arguments, hint):
    model, _ = llava
    with pytest.raises(UndefendableError, match=hint):
        model.generate(**batch(0), smoothguard=True, **arguments)


def test_an_assistant_model_is_refused(llava, batch):
    model, _ = llava
    with pytest.raises(UndefendableError, match="assistant_model"):
        model.generate(**batch(0), smoothguard=True, assistant_model=model)


def test_continuous_batching_is_refused_while_the_config_asks_for_the_defence(llava):
    model, _ = llava
    model.generation_config.smoothguard = True
    with pytest.raises(UndefendableError, match="bypasses generate"):
        model.generate_batch([[1, 2, 3]])


def test_pixel_space_without_a_known_scale():
    """A model type that no image processor is known for, and no directory."""
    from types import SimpleNamespace

    from lmms_smoothguard.inputs import statistics

    holder = SimpleNamespace(config=SimpleNamespace(model_type="unheard_of"), name_or_path="")
    with pytest.raises(UndefendableError, match=r"hf_integration\.attach"):
        statistics.pixel_statistics(holder)


def test_one_copy(llava, batch):
    model, _ = llava
    inputs = batch(0)
    plain = model.generate(**inputs, max_new_tokens=4)
    out = model.generate(**inputs, max_new_tokens=4, smoothguard={"num_samples": 1}, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert out.smoothguard[0].suspicion == 0
    alone = PIXEL | {"num_samples": 1, "include_clean": False}
    verdict = model.generate(**inputs, max_new_tokens=4, smoothguard=alone, return_dict_in_generate=True).smoothguard[0]
    assert verdict.suspicion is None
    assert verdict.num_samples_used == 1


IDLE = [
    (PIXEL | {"num_samples": 1}, r"num_samples is 1; expected at least 2, .* defends nothing .* set num_samples=10"),
    (PIXEL | {"num_samples": 1, "level": "token"}, "num_samples is 1; .* defends nothing"),
    (PIXEL | {"num_samples": 2, "sigma": 0}, r"sigma is 0; expected more, .* defends nothing .* set sigma=0\.1"),
]


@pytest.mark.parametrize(("config", "words"), IDLE)
def test_settings_that_defend_nothing_are_said_in_every_verdict_and_once_in_the_log(
    llava, batch, caplog, config, words
):
    """Measurements may ask for them, of thousands of questions."""
    smoothguard._warn_once.cache_clear()
    asked = {**batch(0, 1), "max_new_tokens": 4, "smoothguard": config, "return_dict_in_generate": True}
    for _ in range(2):
        for verdict in llava[0].generate(**asked).smoothguard:
            (warning,) = verdict.warnings
            assert re.search(words, warning)
    assert [record.getMessage() for record in caplog.records] == [warning]


def test_settings_that_matter_to_no_picture_are_not_said_of_pictures_or_text(llava, batch, caplog):
    smoothguard._warn_once.cache_clear()
    model, processor = llava
    silent = {"num_samples": 2, "sigma": 1e-6, "audio_sigma": 0}
    out = model.generate(**batch(0), max_new_tokens=4, smoothguard=silent, return_dict_in_generate=True)
    assert out.smoothguard[0].warnings == ()
    text = processor.tokenizer("<s>USER: hello ASSISTANT:", return_tensors="pt")
    model.generate(**text, max_new_tokens=2, smoothguard={"num_samples": 1})
    assert not caplog.records


def test_empty_answers(llava, batch):
    model, processor = llava
    end = processor.tokenizer.eos_token_id
    out = model.generate(
        **batch(0),
        max_new_tokens=4,
        smoothguard=PIXEL,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda row, ids: [end],
    )
    assert out.smoothguard[0].texts == ("",) * 10
    assert out.smoothguard[0].agreement == 1


def test_a_model_directory_without_a_processor(trained, batch, tmp_path):
    """Answers are compared as token ids; pixel noise falls back to the class's scale."""
    from transformers import AutoModelForImageTextToText

    trained[0].save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    verdict = model.generate(**batch(0), max_new_tokens=4, smoothguard=True, return_dict_in_generate=True).smoothguard[
        0
    ]
    assert verdict.texts is None
    assert len(verdict.candidates) == 10


def test_an_empty_batch(llava, batch):
    model, _ = llava
    inputs = {key: value[:0] for key, value in batch(0).items()}
    with pytest.raises(UndefendableError, match="empty"):
        model.generate(**inputs, smoothguard=True)


@pytest.mark.parametrize("key", ["mm_encoder_outputs", "encoder_outputs"])
def test_images_that_were_encoded_before_are_refused(llava, batch, key):
    model, _ = llava
    inputs = batch(0)
    inputs.pop("pixel_values")
    with pytest.raises(UndefendableError, match=key):
        model.generate(**inputs, **{key: {"image": object()}}, smoothguard=True)
