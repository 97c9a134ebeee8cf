"""Every architecture at tiny size: copies against separate calls, noise where the vision tower sees it, gradients.

Real model and processor classes, random weights: what is shown is that the ways fit, and no figure is a result.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import ARCHITECTURES, IMAGE_STD

import hf_integration
from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.objective import AnswerLoss
from lmms_smoothguard.attacks.rendering import EXACT_ENOUGH, Renderer
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import AttackError, UndefendableError
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.noise import NoiseSource

COPIES, SIGMA = 5, 2.0
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


class Subject:
    """One architecture, built."""

    def __init__(self, name):
        self.kind = ARCHITECTURES[name]
        self.model, self.processor = self.kind.build()
        hf_integration.attach(self.model, self.processor)

    def inputs(self, *rows):
        return self.kind.inputs(self.processor, rows)

    def defended(self, inputs, **config):
        config = {"sigma": SIGMA, "num_samples": COPIES} | config
        out = self.model.generate(**inputs, **SETTINGS, smoothguard=config, return_dict_in_generate=True)
        return out.smoothguard

    def answers(self, inputs, **settings):
        """Of each row the ids of a separate, undefended call's answer, without prompt, end and padding."""
        end, found = self.processor.tokenizer.eos_token_id, []
        sequences = self.model.generate(**inputs, **SETTINGS | settings, smoothguard=False).tolist()
        for answer, prompt in zip(sequences, inputs["input_ids"].tolist(), strict=True):
            answer = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
            found.append(tuple(answer[: answer.index(end)] if end in answer else answer))
        return found

    def answer(self, inputs, **settings):
        (answer,) = self.answers(inputs, **settings)
        return answer

    def separate(self, inputs):
        """Of each row the answers to its copies, every copy a call of its own."""
        images = find_images(inputs, self.model.config)
        if images is None:
            return [(answer,) * COPIES for answer in self.answers(inputs)]
        noise = NoiseSource(images, sigma=SIGMA, statistics=None, seed=0)
        pixels = [images.values, *(noise.copy(number) for number in range(1, COPIES))]
        return list(zip(*(self.answers({**inputs, images.key: values}) for values in pixels), strict=True))


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def subject(request):
    if request.param == "smolvlm":
        pytest.importorskip("num2words")  # its processor says so
    return Subject(request.param)


@pytest.fixture(scope="module")
def pictures(images):
    """Square, wide, tall, each of another scene."""
    return images[0], images[1].resize((150, 60)), images[2].resize((50, 120))


def row_alone(inputs, row):
    """A row without pictures, out of its batch and without the padding; some processors make no such inputs."""
    start = int(inputs["attention_mask"][row].argmax())
    names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    return {name: inputs[name][row : row + 1, start:] for name in names if name in inputs}


def grey(width, height):
    return Image.new("RGB", (width, height), (128, 128, 128))


def row_of(*pictures, text="What is it?"):
    return pictures, text


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
    for row, verdict in zip(rows, verdicts, strict=True):
        assert len(set(verdict.candidates[1:])) > (1 if row[0] else 0)  # or nothing was tested


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


# -- attacks -----------------------------------------------------------------------------------------------------------


class Ordinary:
    """What the ordinary 8-bit path gave, in place of a differentiable rendering."""

    def __init__(self, inputs):
        self._rendered = {"pixel_values": inputs["pixel_values"]}

    def __call__(self, pictures):
        return self._rendered


def slots(pictures):
    """Pictures as the attack's float slots (1, 3, height, width)."""
    return tuple(
        torch.from_numpy(np.asarray(picture, np.float32) / 255).permute(2, 0, 1)[None].contiguous()
        for picture in pictures
    )


def job_pictures(subject, pictures):
    return pictures[1:] if subject.kind.several else pictures[1:2]


@pytest.fixture
def attacked(subject):
    if subject.kind.name == "instructblip_t5":
        pytest.skip("encoder-decoder; see the refusal below")
    return subject


def test_the_loss_is_that_of_the_models_own_decoding(attacked, pictures):
    """Teacher forcing gives what `generate` gave token by token: masks and token types grow as they do there."""
    inputs = attacked.inputs(row_of(*job_pictures(attacked, pictures)))
    out = attacked.model.generate(
        **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    answer = out.sequences[0, -5:].tolist()
    spoken = torch.stack([step[0].log_softmax(-1)[token] for step, token in zip(out.logits, answer, strict=True)])
    prompt = {key: value for key, value in inputs.items() if key != "pixel_values"}
    loss = AnswerLoss(attacked.model, Ordinary(inputs), [prompt], [answer], kind="ce")
    with torch.no_grad():
        assert float(loss(())) == pytest.approx(-float(spoken.mean()), abs=1e-4)


def test_requests_of_unequal_length_share_a_batch(attacked, pictures):
    """A padded batch gives each request the loss it has alone."""
    square = pictures[0]
    requests = [attacked.inputs(row_of(square)), attacked.inputs(row_of(square, text="Is there a red circle in it?"))]
    answers = [[60, 70, 80], [65, 75]]
    if "cross_attention_mask" in requests[0] or "qformer_input_ids" in requests[0]:
        requests[1] = requests[0]  # such requests are batched with their like only
    prompts = [{k: v for k, v in inputs.items() if k != "pixel_values"} for inputs in requests]
    together = {"pixel_values": torch.cat([inputs["pixel_values"] for inputs in requests])}
    if "image_grid_thw" in prompts[0]:
        together["image_grid_thw"] = torch.cat([inputs["image_grid_thw"] for inputs in requests])
    with torch.no_grad():
        batch = AnswerLoss(attacked.model, Ordinary(together), prompts, answers, kind="ce")(())
        alone = [
            float(AnswerLoss(attacked.model, Ordinary(inputs), [prompt], [answer], kind="ce")(()))
            for inputs, prompt, answer in zip(requests, prompts, answers, strict=True)
        ]
    assert batch.tolist() == pytest.approx(alone, abs=1e-4)
    assert alone[0] != pytest.approx(alone[1], abs=1e-2)


def test_gradients_reach_every_picture_through_the_processor(attacked, pictures):
    chosen = job_pictures(attacked, pictures)
    inputs = attacked.inputs(row_of(*chosen))
    renderer = Renderer(attacked.processor, torch.device("cpu"), torch.float32)
    clean = slots(chosen)
    assert renderer.check(clean, inputs, "pixel_values") < EXACT_ENOUGH
    rendered = renderer(clean)
    assert set(rendered) <= set(inputs)  # nothing the model does not know
    prompt = {key: value for key, value in inputs.items() if key not in rendered}
    loss = AnswerLoss(attacked.model, renderer, [prompt], [attacked.answer(inputs, min_new_tokens=4)], kind="margin")
    leaves = tuple(slot.clone().requires_grad_() for slot in clean)
    for gradient in torch.autograd.grad(loss(leaves).sum(), leaves):
        assert torch.isfinite(gradient).all()
        # LLaVA crops, and sees the middle of a wide picture alone.
        assert (gradient != 0).float().mean() > (0.3 if attacked.kind.name == "llava" else 0.9)


@pytest.mark.parametrize("eot", [0, 2])
def test_crafted_attacks_stay_in_their_budget_and_work_through_the_ordinary_path(attacked, pictures, tmp_path, eot):
    chosen = job_pictures(attacked, pictures)
    settings = AttackSettings(eps=8 / 255, steps=3, eot=eot)
    jobs = []
    for text in ("What is it?", "Describe the image."):
        inputs = attacked.inputs(row_of(*chosen, text=text))
        jobs.append(Job(settings, chosen, inputs, attacked.answer(inputs, min_new_tokens=4)))
    defense = SmoothGuardConfig(sigma=0.05, noise_space="pixel")
    entries = Crafter(attacked.model, attacked.processor, AttackCache(tmp_path / "both"), defense).craft(jobs)
    for entry, job in zip(entries, jobs, strict=True):
        for made, picture in zip(entry.images, chosen, strict=True):
            change = np.abs(made.astype(int) - np.asarray(picture).astype(int))
            assert 0 < change.max() <= 8
        text = "What is it?" if job is jobs[0] else "Describe the image."
        again = attacked.inputs(row_of(*(Image.fromarray(made) for made in entry.images), text=text))
        assert margin(attacked, again, job) > margin(attacked, job.inputs, job)
    if not eot:  # a batch of requests is crafted as each is alone
        alone = Crafter(attacked.model, attacked.processor, AttackCache(tmp_path / "alone"), defense).craft(jobs[1:])
        assert alone[0].record["objective"][0] == pytest.approx(entries[1].record["objective"][0], abs=1e-3)


def margin(subject, inputs, job):
    prompt = {key: value for key, value in inputs.items() if key != "pixel_values"}
    with torch.no_grad():
        return float(AnswerLoss(subject.model, Ordinary(inputs), [prompt], [job.answer], kind="margin")(()))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["instructblip", "instructblip_t5"])
def test_several_images_a_row_are_refused_where_the_model_takes_one(name, pictures):
    subject = Subject(name)
    with pytest.raises(UndefendableError, match="2 images in 1 rows; expected one a row"):
        subject.defended(subject.inputs(row_of(*pictures[:2])))


def test_mllama_rows_without_an_image_beside_rows_with_one_are_refused(pictures):
    """Upstream's processor leaves such rows out of aspect_ratio_ids; the undefended model fails on a shape."""
    subject = Subject("mllama")
    inputs = subject.inputs(row_of(pictures[0]), row_of(text="Describe the image."))
    with pytest.raises(RuntimeError, match="shape"):
        subject.model.generate(**inputs, **SETTINGS)
    with pytest.raises(UndefendableError, match="aspect_ratio_ids has 1 entries, pixel_values 2"):
        subject.defended(inputs)


def test_attacks_on_an_encoder_decoder_are_refused(pictures):
    subject = Subject("instructblip_t5")
    inputs = subject.inputs(row_of(pictures[0]))
    with pytest.raises(AttackError, match="encoder-decoder"):
        AnswerLoss(subject.model, Ordinary(inputs), [inputs], [[5]], kind="ce")


def test_tiles_cut_by_the_whole_processor_alone_are_not_guessed(pictures):
    """InternVL's processor, not its image processor, asks for tiles."""
    subject = Subject("internvl")
    inputs = subject.inputs(row_of(pictures[1]))
    renderer = Renderer(subject.processor.image_processor, torch.device("cpu"), torch.float32)
    with pytest.raises(AttackError, match="does not reproduce"):
        renderer.check(slots(pictures[1:2]), inputs, "pixel_values")
