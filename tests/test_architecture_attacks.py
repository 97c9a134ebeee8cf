"""Attacks on every architecture at tiny size: the loss, its gradients through the processor, PGD.

Real model and processor classes, random weights: what is shown is that the ways fit, and no figure is a result.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models.subject import Subject, row_of

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.objective import AnswerLoss, Threat
from lmms_smoothguard.attacks.rendering import EXACT_ENOUGH, Renderer
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.universal import base_picture
from lmms_smoothguard.attacks.universal_crafter import Lesson, UniversalCrafter
from lmms_smoothguard.choice import choose
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import AttackError


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
    loss = AnswerLoss(Threat(attacked.model, attacked.processor, Ordinary(inputs), (), [prompt], [answer]), "ce")
    with torch.no_grad():
        assert float(loss(())) == pytest.approx(-float(spoken.mean()), abs=1e-4)


def test_each_request_of_a_batch_has_the_loss_it_has_alone(attacked, pictures):
    square = pictures[0]
    requests = [
        attacked.inputs(row_of(square)),
        attacked.inputs(row_of(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT))),
    ]
    answers = [[60, 70, 80], [65, 75, 85]]
    prompts = [{k: v for k, v in inputs.items() if k != "pixel_values"} for inputs in requests]
    together = {"pixel_values": torch.cat([inputs["pixel_values"] for inputs in requests])}
    if "image_grid_thw" in prompts[0]:
        together["image_grid_thw"] = torch.cat([inputs["image_grid_thw"] for inputs in requests])
    with torch.no_grad():
        batch = AnswerLoss(Threat(attacked.model, attacked.processor, Ordinary(together), (), prompts, answers), "ce")(
            ()
        )
        alone = [
            float(
                AnswerLoss(Threat(attacked.model, attacked.processor, Ordinary(inputs), (), [prompt], [answer]), "ce")(
                    ()
                )
            )
            for inputs, prompt, answer in zip(requests, prompts, answers, strict=True)
        ]
    assert batch.tolist() == pytest.approx(alone, abs=1e-4)
    assert alone[0] != pytest.approx(alone[1], abs=1e-2)


def test_gradients_reach_every_picture_through_the_processor(attacked, pictures):
    chosen = job_pictures(attacked, pictures)
    inputs = attacked.inputs(row_of(*chosen))
    renderer = Renderer(attacked.processor, torch.device("cpu"), torch.float32)
    clean = slots(chosen)
    assert max(renderer.check(clean, inputs, "pixel_values")) < EXACT_ENOUGH
    rendered = renderer(clean)
    assert set(rendered) <= set(inputs)  # nothing the model does not know
    prompt = {key: value for key, value in inputs.items() if key not in rendered}
    loss = AnswerLoss(
        Threat(attacked.model, attacked.processor, renderer, (), [prompt], [attacked.answer(inputs, min_new_tokens=4)]),
        "margin",
    )
    leaves = tuple(slot.clone().requires_grad_() for slot in clean)
    for gradient in torch.autograd.grad(loss(leaves).sum(), leaves):
        assert torch.isfinite(gradient).all()
        # LLaVA crops, and sees the middle of a wide picture alone.
        assert (gradient != 0).float().mean() > (0.3 if attacked.kind.name == "llava" else 0.9)


@pytest.mark.parametrize("eot", [0, 2])
def test_crafted_attacks_stay_in_their_budget_and_work_through_the_ordinary_path(attacked, pictures, tmp_path, eot):
    chosen = job_pictures(attacked, pictures)
    settings = AttackSettings(eps=8 / 255, steps=10 if eot else 3, eot=eot)  # noisy gradients need more steps
    jobs = []
    for text in ("What is it?", "Describe the image."):
        inputs = attacked.inputs(row_of(*chosen, text=text))
        jobs.append(Job(settings, chosen, inputs, attacked.answer(inputs, min_new_tokens=4)))
    defense = choose(SmoothGuardConfig(sigma=0.05, noise_space="pixel"))
    entries = Crafter(attacked.model, attacked.processor, AttackCache(tmp_path / "both"), defense).craft(jobs)
    for entry, job in zip(entries, jobs, strict=True):
        for made, picture in zip(entry.images, chosen, strict=True):
            change = np.abs(made.astype(int) - np.asarray(picture).astype(int))
            assert 0 < change.max() <= 8
        text = "What is it?" if job is jobs[0] else "Describe the image."
        again = attacked.inputs(row_of(*(Image.fromarray(made) for made in entry.images), text=text))
        assert margin(attacked, again, job) > margin(attacked, job.inputs, job)
    # A request is crafted alone as it is beside others, the attacker's noise included.
    alone = Crafter(attacked.model, attacked.processor, AttackCache(tmp_path / "alone"), defense).craft(jobs[1:])
    assert alone[0].record["objective"] == pytest.approx(entries[1].record["objective"], abs=1e-3)


def margin(subject, inputs, job):
    prompt = {key: value for key, value in inputs.items() if key != "pixel_values"}
    with torch.no_grad():
        return float(
            AnswerLoss(
                Threat(subject.model, subject.processor, Ordinary(inputs), (), [prompt], [job.answer]), "margin"
            )(())
        )


def test_attacks_on_pan_and_scan_are_refused(pictures):
    """A caller's option that the processor does not hold: crops would be scored, the whole picture crafted on."""
    subject = Subject("gemma3")
    text = subject.inputs(row_of(pictures[1]))
    crops = subject.processor.image_processor(
        pictures[1],
        return_tensors="pt",
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    renderer = Renderer(subject.processor, subject.model.device, torch.float32)
    with pytest.raises(AttackError, match="does not reproduce pixel_values"):
        renderer.check(slots(pictures[1:2]), {**text, **crops}, "pixel_values")


def test_attacks_on_an_encoder_decoder_are_refused(pictures):
    subject = Subject("instructblip_t5")
    inputs = subject.inputs(row_of(pictures[0]))
    with pytest.raises(AttackError, match="encoder-decoder"):
        AnswerLoss(Threat(subject.model, subject.processor, Ordinary(inputs), (), [inputs], [[5]]), "ce")


def test_tiles_cut_by_the_whole_processor_alone_are_not_guessed(pictures):
    """InternVL's processor, not its image processor, asks for tiles."""
    subject = Subject("internvl")
    inputs = subject.inputs(row_of(pictures[1]))
    renderer = Renderer(subject.processor.image_processor, torch.device("cpu"), torch.float32)
    with pytest.raises(AttackError, match="does not reproduce"):
        renderer.check(slots(pictures[1:2]), inputs, "pixel_values")


@pytest.fixture(scope="module", params=["llava_next", "qwen2_vl", "internvl"])
def dynamic(request):
    """Processors that cut a picture into tiles, or as many patches as it has room for."""
    return Subject(request.param)


@pytest.mark.parametrize(
    ("name", "own"),
    [("apgd", {}), ("apgd", {"norm": "l2", "eps": 2}), ("patch", {"size": 0.1}), ("square", {}), ("square", {"norm": "l2", "eps": 2})],
)  # fmt: skip
def test_every_attack_goes_through_dynamic_resolution(dynamic, pictures, tmp_path, name, own):
    """The objective at the pictures that come back is larger than at the clean ones: gradients and scores are the model's."""
    settings = AttackSettings.parse(name, {"eps": "16/255", "steps": 6, "random_start": False} | own)
    chosen = job_pictures(dynamic, pictures)
    job = Job(settings, chosen, dynamic.inputs(row_of(*chosen)), (5, 6))
    entry = Crafter(dynamic.model, dynamic.processor, AttackCache(tmp_path), quiet=True).craft([job])[0]
    assert entry.record[settings.norm] <= settings.eps + 1e-6
    assert [image.shape[:2] for image in entry.images] == [picture.size[::-1] for picture in chosen]
    assert max(entry.record["objective"][1:]) > entry.record["objective"][0]


def test_one_picture_for_all_goes_through_dynamic_resolution(dynamic, tmp_path):
    (tmp_path / "corpus.json").write_text(
        '[{"instruction": "a", "response": "b"}, {"instruction": "c", "response": "d"}]'
    )
    fields = {"corpus": str(tmp_path / "corpus.json"), "steps": 8, "eps": "32/255", "size": 80, "batch": 2}
    settings = AttackSettings.parse("universal", fields)
    base = base_picture(settings, dynamic.processor)
    inputs = dynamic.inputs(row_of(Image.fromarray(base)))
    lessons = [Lesson(inputs, (5, 6)), Lesson(inputs, (7, 8))]
    crafter = UniversalCrafter(dynamic.model, dynamic.processor, AttackCache(tmp_path / "cache"), quiet=True)
    entry = crafter.craft_universal(settings, base, lessons)
    assert entry.images[0].shape == (80, 80, 3)
    assert 0 < entry.record["linf"] <= 32 / 255 + 1e-6
    assert entry.record["loss"][-1] < entry.record["loss"][0]
