"""Every architecture at tiny size: copies against separate calls, and noise where the vision tower sees it.

Real model and processor classes, random weights: what is shown is that the ways fit, and no figure is a result.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_STD
from tiny_models.subject import SETTINGS, Subject, row_of

from lmms_smoothguard.errors import UndefendableError


def row_alone(inputs, row):
    """A row without pictures, out of its batch and without the padding; some processors make no such inputs."""
    start = int(inputs["attention_mask"][row].argmax())
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: inputs[name][row : row + 1, start:] for name in names if name in inputs}


def grey(width, height):
    return Image.new("RGB", (width, height), (128, 128, 128))


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["one image", "several images", "mixed sizes", "mixed counts", "a row without"])
def test_every_copy_answers_as_a_separate_call(subject, pictures, shape):
    """A user row of a batch answers as it does alone, noise included: nothing depends on its neighbours."""
    square, wide, tall = pictures
    if shape in ("several images", "mixed counts") and not subject.kind.several:
        pytest.skip("one image a row; see the refusal below")
    if shape == "a row without" and not subject.kind.mixed:
        pytest.skip("not for this model; see the refusals below")
    if (subject.kind.name, shape) == ("mllama", "mixed counts"):
        pytest.skip("the undefended model's answers depend on neighbours; see the next test")
    other = "Describe the image." if subject.kind.several else "What is it?"  # a Q-Former's too; see the next test
    rows = {
        "one image": [row_of(wide)],
        "several images": [row_of(square, tall)],
        "mixed sizes": [row_of(square), row_of(wide, text=other), row_of(tall)],
        "mixed counts": [row_of(square), row_of(wide, tall, text=other), row_of(square, square)],
        "a row without": [row_of(text="Is there a red circle in the image?"), row_of(tall), row_of(wide)],
    }[shape]
    inputs = subject.inputs(*rows)
    verdicts = subject.defended(inputs)
    singles = (subject.inputs(row) if row[0] else row_alone(inputs, n) for n, row in enumerate(rows))
    expected = [answers for single in singles for answers in subject.separate(single)]
    assert [verdict.candidates for verdict in verdicts] == expected
    assert any(len(set(verdict.candidates[1:])) > 1 for verdict in verdicts)  # or nothing was tested


@pytest.mark.parametrize("name", ["mllama", "instructblip", "instructblip_t5"])
def test_copies_answer_as_calls_of_the_same_batch_where_the_models_own_answers_depend_on_it(name, pictures):
    """Mllama's tokens before an image attend to the padding of rows with fewer images than their neighbours; InstructBLIP's
    processor pads a Q-Former's question on the left, where its positions are absolute."""
    square, wide, tall = pictures
    subject = Subject(name)
    rows = [row_of(square), row_of(wide, text="Describe the image."), row_of(tall)]
    if name == "mllama":
        rows[1] = row_of(wide, tall)
    inputs = subject.inputs(*rows)
    together = subject.separate(inputs)
    assert [verdict.candidates for verdict in subject.defended(inputs)] == together
    assert together != [answers for row in rows for answers in subject.separate(subject.inputs(row))]


def test_the_token_level_without_noise_is_the_plain_answer(subject, pictures):
    inputs = subject.inputs(row_of(pictures[1]))
    (verdict,) = subject.defended(inputs, level="token", sigma=0.0)
    assert verdict.candidates == (subject.answer(inputs),)
    assert verdict.agreement == 1


# -- noise at the vision tower -----------------------------------------------------------------------------------------


def seen_by_the_vision_tower(subject, inputs, **config):
    """(copies, images or tiles or patches, channels, frames, height, width): what its first convolution is given."""
    convolutions = [
        module
        for module in subject.model.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) and module.in_channels == 3
    ]
    (first,) = convolutions
    calls = []
    handle = first.register_forward_hook(lambda module, args, output: calls.append(args[0].detach()))
    try:
        subject.defended(inputs, **config)
    finally:
        handle.remove()
    (pixels,) = calls
    if isinstance(first, torch.nn.Conv2d):
        pixels = pixels[:, :, None]
    return pixels.view(config["num_samples"], -1, *pixels.shape[1:])


def test_pixel_noise_has_each_channels_scale_at_the_vision_tower(subject):
    """Defect of the official code: noise in normalised space, so that sigma in pixels differs by channel."""
    sigma = 0.05
    rows = [row_of(grey(112, 112)), row_of(grey(112, 56), text="Describe the image.")]
    seen = seen_by_the_vision_tower(subject, subject.inputs(*rows), sigma=sigma, noise_space="pixel", num_samples=8)
    clean, offset = seen[0], seen[1:] - seen[:1]
    mean, std = (torch.tensor(value).view(3, 1, 1, 1) for value in scale_of(subject))
    painted = ((clean - (128 / 255 - mean) / std).abs() < 1e-3).all(1, keepdim=True)  # no margins, no padding
    assert painted.float().mean() > 0.3
    for channel in range(3):
        measured = offset[:, :, channel : channel + 1][painted.expand(7, *painted.shape)].std()
        assert measured == pytest.approx(sigma / IMAGE_STD[channel], rel=0.05)
    assert torch.equal(offset[..., :1, :, :].expand_as(offset), offset)  # the frames of a still share one draw
    padding = (clean == 0).all(1, keepdim=True).expand_as(offset)
    assert not offset[padding].any()
    assert padding.any() == (subject.kind.name == "mllama")  # other models drop such tiles before they encode


def scale_of(subject):
    image_processor = subject.processor.image_processor
    assert list(image_processor.image_std) == IMAGE_STD
    return image_processor.image_mean, image_processor.image_std


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_margins_that_are_masked_get_no_noise(name):
    """Where a tile is smaller than the largest of the batch, a mask says so; these tiles are cut down by hand, as
    today's processors make them all alike."""
    if name == "smolvlm":
        pytest.importorskip("num2words")
    subject = Subject(name)
    subject.processor.image_processor.do_image_splitting = False
    inputs = subject.inputs(row_of(grey(56, 28)), row_of(grey(28, 56)))
    inputs["pixel_attention_mask"][0, :, 28:] = 0
    inputs["pixel_attention_mask"][1, :, :, 42:] = 0
    mask = inputs["pixel_attention_mask"].bool()
    inputs["pixel_values"] *= mask[:, :, None]
    seen = seen_by_the_vision_tower(subject, inputs, sigma=0.05, noise_space="pixel", num_samples=3)
    offset, inside = (seen[1:] - seen[:1])[:, :, :, 0], mask.flatten(0, 1)[None, :, None].expand(2, 2, 3, -1, -1)
    assert not offset[~inside].any()
    assert offset[inside].all()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["instructblip", "instructblip_t5"])
def test_several_images_a_row_are_refused_where_the_model_takes_one(name, pictures):
    subject = Subject(name)
    with pytest.raises(UndefendableError, match="2 images in 1 rows; expected one a row"):
        subject.defended(subject.inputs(row_of(*pictures[:2])))


def test_mllama_rows_without_an_image_beside_rows_with_one_are_refused(pictures):
    """Upstream's processor leaves such rows out of aspect_ratio_ids; the undefended model fails on a shape."""
    subject = Subject("mllama")
    try:
        inputs = subject.inputs(row_of(pictures[0]), row_of(text="Describe the image."))
    except ValueError:  # transformers 5.17: refused before it reaches a model
        return
    with pytest.raises(RuntimeError, match="shape"):
        subject.model.generate(**inputs, **SETTINGS)
    with pytest.raises(UndefendableError, match="aspect_ratio_ids has 1 entries, pixel_values 2"):
        subject.defended(inputs)


def test_gemma3s_crops_of_an_image_are_defended_each(pictures):
    """Pan and scan shows a wide or tall picture whole, then in crops: more images than the caller gave."""
    subject = Subject("gemma3")
    plain, crops = subject.processor, {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
    subject.processor = lambda *args, **kwargs: plain(*args, **kwargs, **crops)
    subject.processor.tokenizer = plain.tokenizer
    rows = [row_of(pictures[1]), row_of(pictures[0], pictures[2], text="Describe the image.")]
    inputs = subject.inputs(*rows)
    assert len(inputs["pixel_values"]) > 3
    verdicts = subject.defended(inputs)
    assert [v.candidates for v in verdicts] == [a for row in rows for a in subject.separate(subject.inputs(row))]
    assert all(len(set(verdict.candidates)) > 1 for verdict in verdicts)


def test_scores_of_an_encoder_decoder_start_with_its_first_decision(pictures):
    """Its start token was not decided on."""
    subject = Subject("instructblip_t5")
    inputs = subject.inputs(row_of(pictures[0]))
    settings = SETTINGS | {"return_dict_in_generate": True, "output_scores": True}
    plain = subject.model.generate(**inputs, **settings)
    out = subject.model.generate(**inputs, **settings, smoothguard={"sigma": 0.0, "num_samples": 3})
    assert torch.equal(out.sequences, plain.sequences)
    assert len(out.scores) == len(plain.scores)
    for ours, theirs in zip(out.scores, plain.scores, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)  # of 40: two batch sizes
