"""A processor that is not the model's: what can be told is told; what would give wrong pixels is refused."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_models import ARCHITECTURES, IMAGE_MEAN, IMAGE_STD, SIDE
from tiny_models.architecture import tokenizer

import hf_integration
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.fitting import misfits
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.noise import NoiseSource

PIXEL = {"sigma": 0.1, "noise_space": "pixel", "num_samples": 2}


@pytest.fixture(scope="module")
def built():
    return ARCHITECTURES["llava"].build()


@pytest.fixture
def request_of(built, images):
    """(model, processor, its inputs for one bright picture)."""
    model, processor = built
    hf_integration.attach(model, processor)
    picture = Image.blend(images[0], Image.new("RGB", images[0].size, "white"), 0.7)
    return model, processor, ARCHITECTURES["llava"].inputs(processor, [((picture,), "What is it?")])


def clip(**changes):
    from transformers import CLIPImageProcessor

    square = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(
        **{"size": {"shortest_edge": SIDE}, "crop_size": square, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
        | changes
    )


def ask(model, inputs, **config):
    return model.generate(
        **inputs, max_new_tokens=3, smoothguard=PIXEL | config, return_dict_in_generate=True
    ).smoothguard[0]


@pytest.mark.parametrize(
    ("statistics", "said"),
    [
        ({"image_mean": [0.5], "image_std": [0.5]}, "1 means and 1 stds, the model takes 3 channels"),
        ({"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, "4 means and 4 stds, the model takes 3 channels"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 2}, "3 means and 2 stds"),
        ({"image_std": [0.2, 0.0, 0.2]}, "a std above 0"),
        ({"image_std": [0.2, float("nan"), 0.2]}, "expected finite"),
    ],
)
def test_statistics_that_cannot_be_the_models(request_of, statistics, said):
    model, _, inputs = request_of
    hf_integration.attach(model, clip(**statistics))
    with pytest.raises(UndefendableError, match=said):
        ask(model, inputs)
    assert ask(model, inputs, noise_space="normalized").num_samples_used == 2  # which needs none


def test_one_number_stands_for_all_channels(built):
    model, processor = built
    single = clip()
    single.image_mean, single.image_std = 0.5, 0.25
    assert pixel_statistics(model, single).std.tolist() == [0.25] * 3
    assert pixel_statistics(model, clip(do_normalize=False)).mean.tolist() == [0.0] * 3
    assert pixel_statistics(model, processor.image_processor).std.tolist() == pytest.approx(IMAGE_STD)


def test_pixels_of_other_statistics(request_of):
    """Clipped to another processor's range, the picture would be damaged without a word."""
    model, _, inputs = request_of
    hf_integration.attach(model, clip(image_mean=[0.5] * 3, image_std=[0.5] * 3))
    with pytest.raises(UndefendableError, match=r"outside \[0, 1\]; expected the statistics of the processor"):
        ask(model, inputs)


def test_grey_levels_are_no_normalised_pixels(request_of):
    model, _, inputs = request_of
    grey = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], 200.0)}
    with pytest.raises(UndefendableError, match="reach 200 and are not normalised"):
        ask(model, grey, noise_space="normalized")


def test_a_float_resize_may_overshoot(built):
    """A caller who resizes floats gets a few values beyond [0, 1]: no sign of another processor."""
    from lmms_smoothguard.inputs.media import find_images

    model, processor = built
    statistics = pixel_statistics(model, processor.image_processor)
    pixels = torch.rand(1, 3, SIDE, SIDE)
    pixels[..., ::80] = 1.2
    values = (pixels - statistics.mean.view(3, 1, 1)) / statistics.std.view(3, 1, 1)
    images = find_images({"pixel_values": values}, model.config)
    assert NoiseSource(images, sigma=0.1, statistics=statistics, seed=0).copy(1).shape == values.shape


def test_pixels_of_another_channel_count(request_of):
    model, _, inputs = request_of
    grey = {**inputs, "pixel_values": inputs["pixel_values"][:, :1]}
    with pytest.raises(UndefendableError, match="has 1 channels, the model's vision tower takes 3"):
        ask(model, grey, noise_space="normalized")


def test_packed_patches_of_another_size(images):
    from transformers import Qwen2VLImageProcessor

    kind = ARCHITECTURES["qwen2_vl"]
    model, processor = kind.build()
    processor.image_processor = Qwen2VLImageProcessor(patch_size=16, min_pixels=64 * 64, max_pixels=128 * 128)
    inputs = kind.inputs(processor, [((images[0],), "What is it?")])
    with pytest.raises(UndefendableError, match="unknown layout"):
        ask(model, inputs)


def test_a_tokenizer_with_more_tokens_than_the_model(request_of):
    """A warning: a model's own tokenizer may have had tokens added."""
    model, processor, inputs = request_of
    alike = {"num_samples": 2, "sigma": 1e-6}
    assert ask(model, inputs, **alike).warnings == ()
    larger = tokenizer(*(f"<extra_{n}>" for n in range(50)))
    hf_integration.attach(model, larger)
    (warning,) = ask(model, inputs, noise_space="normalized", **alike).warnings
    assert f"the tokenizer has {len(larger)} tokens and the model {len(processor.tokenizer)}" in warning
    (warning,) = ask(model, inputs, noise_space="normalized", level="token").warnings
    assert "the tokenizer has" in warning


def test_a_tokenizer_that_does_not_know_what_was_said(request_of):
    """It decodes what it does not have to nothing: other answers would look equal, and win."""
    model, _, inputs = request_of
    cut = tokenizer()
    cut._tokenizer = type(cut._tokenizer).from_str(_first_tokens(cut._tokenizer.to_str(), 300))
    hf_integration.attach(model, cut)
    assert len(cut) == 300
    out = ask(model, inputs, sigma=1.0, num_samples=6, noise_space="normalized")
    assert max(token for candidate in out.candidates for token in candidate) >= 300
    assert out.texts is None
    assert len(set(out.labels)) > 1
    assert any("compared as token ids" in warning for warning in out.warnings)


def _first_tokens(serialised, count):
    """A byte-level tokenizer with its first tokens alone, and no merges."""
    import json

    settings = json.loads(serialised)
    settings["model"]["vocab"] = {t: n for t, n in settings["model"]["vocab"].items() if n < count}
    settings["model"]["merges"] = []
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["id"] < count]
    return json.dumps(settings)


def test_an_image_processor_of_another_class_than_the_directory_names(built, tmp_path):
    from transformers import AutoModelForImageTextToText, SiglipImageProcessor

    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert misfits(loaded, processor.tokenizer, processor.image_processor) == ()
    (warning,) = misfits(loaded, processor.tokenizer, SiglipImageProcessor())
    assert "is a SiglipImageProcessor, the model's directory names CLIPImageProcessor" in warning
    (warning,) = misfits(loaded, processor.tokenizer, clip(image_std=[0.2, 0.25, 0.3]))
    assert f"image_std is [0.2, 0.25, 0.3], the model's directory says {IMAGE_STD}" in warning


def test_the_backend_of_an_image_processor_is_not_its_class(built, tmp_path):
    """CLIPImageProcessor and CLIPImageProcessorPil make the same pixels."""
    from transformers import CLIPImageProcessorPil

    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    held = type("Model", (), {"name_or_path": str(tmp_path)})()
    assert misfits(held, None, CLIPImageProcessorPil(image_mean=IMAGE_MEAN, image_std=IMAGE_STD)) == ()
