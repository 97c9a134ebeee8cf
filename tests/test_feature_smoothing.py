"""Feature-space smoothing: what the language model is given is the norm-preserving mean over the noisy passes, everywhere."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import ARCHITECTURES
from tiny_models.subject import SETTINGS, Subject, row_of
from transformers.modeling_outputs import BaseModelOutput

import hf_integration
from lmms_smoothguard.choice import choose
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.noise import NoiseSource
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.smoothing.context import make_smoother, smoothed
from lmms_smoothguard.smoothing.features import Mean, walk
from lmms_smoothguard.smoothing.noise import DrawnNoise
from lmms_smoothguard.smoothing.towers import find_tower, follow

SAMPLES, SIGMA = 4, 0.3
FS = {"defense": "feature_smoothing", "num_samples": SAMPLES, "sigma": SIGMA}
CONFIG = FeatureSmoothingConfig(num_samples=SAMPLES, sigma=SIGMA)


def picture(seed, size=(70, 60)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture(scope="module", params=[name for name in ARCHITECTURES if name not in ("smolvlm", "instructblip_t5")])
def subject(request):
    return Subject(request.param)


def by_hand(unit):
    """(copies, ..., width) -> mean(||f||) m / ||m||, written out."""
    norms = unit.norm(dim=-1)
    mean = (unit / norms[..., None]).mean(0)
    return mean / mean.norm(dim=-1, keepdim=True) * norms.mean(0)[..., None]


def heard(module, calls):
    """Records every (arguments, output) of a module."""
    return module.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )


class TestEveryArchitecture:
    @torch.inference_mode()
    def test_the_tower_gives_the_mean_of_single_noisy_passes(self, subject):
        """Copy by copy, each a call of its own, averaged here: what one batched call gives."""
        inputs = subject.inputs(row_of(picture(1), picture(2)) if subject.kind.several else row_of(picture(1)))
        tower, calls = find_tower(subject.model), []
        hook = heard(tower.module, calls)
        subject.model(**inputs)
        hook.remove()
        (args, kwargs, _) = calls[0]
        smoother = make_smoother(subject.model, CONFIG, subject.processor.image_processor)
        found = smoother(*args, **kwargs)
        key, arguments = smoother._bound(args, kwargs)
        images = smoother._images(key, arguments)
        noise = NoiseSource(
            images, sigma=SIGMA, statistics=pixel_statistics(subject.model, subject.processor.image_processor), seed=0
        )
        single = [tower.module(**{**arguments, key: noise.copy(number)}) for number in range(1, SAMPLES + 1)]
        for place in tower.places(found):
            expected = by_hand(torch.stack([follow(output, place) for output in single]))
            torch.testing.assert_close(
                follow(found, place), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
            )

    @torch.inference_mode()
    def test_generate_answers_with_it_and_says_so(self, subject):
        inputs = subject.inputs(row_of(picture(3)))
        with hf_integration.observe() as seen:
            defended = subject.model.generate(**inputs, **SETTINGS, smoothguard=FS)
        assert seen.defended == 1
        again = subject.model.generate(**inputs, **SETTINGS, smoothguard=FS)
        assert torch.equal(defended, again)
        with smoothed(subject.model, CONFIG, subject.processor.image_processor) as smoother:
            by_context = subject.model.generate(**inputs, **SETTINGS, smoothguard=False)
        assert smoother.calls == 1  # the language model runs once, and the tower's call is one
        assert torch.equal(defended, by_context)

    @torch.inference_mode()
    def test_it_changes_the_logits_and_leaves_nothing_behind(self, subject):
        inputs = subject.inputs(row_of(picture(4)))
        extra = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if "t5" in subject.kind.name else {}
        plain = subject.model(**inputs, **extra).logits
        with smoothed(subject.model, CONFIG, subject.processor.image_processor):
            inside = subject.model(**inputs, **extra).logits
        assert not torch.allclose(plain, inside, atol=1e-3)
        assert torch.equal(plain, subject.model(**inputs, **extra).logits)
        assert "forward" not in vars(find_tower(subject.model).module)

    @torch.inference_mode()
    def test_rows_know_nothing_of_their_neighbours(self, subject):
        if not subject.kind.mixed:
            pytest.skip("rows of this model share their padding")
        alone = [subject.inputs(row_of(picture(seed))) for seed in (5, 6)]
        both = subject.inputs(row_of(picture(5)), row_of(picture(6)))
        with smoothed(subject.model, CONFIG, subject.processor.image_processor):
            separate = [subject.model(**one).logits[0, -1] for one in alone]
            together = subject.model(**both).logits[:, -1]
        for row, expected in zip(together, separate, strict=True):
            torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


# -- one architecture is enough for the rest ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava():
    return Subject("llava")


@torch.inference_mode()
def test_hardly_any_noise_is_hardly_any_change(llava):
    inputs = llava.inputs(row_of(picture(1)))
    with smoothed(llava.model, FeatureSmoothingConfig(num_samples=2, sigma=1e-6), llava.processor.image_processor):
        inside = llava.model(**inputs).logits
    torch.testing.assert_close(inside, llava.model(**inputs).logits, rtol=1e-3, atol=1e-2)


@torch.inference_mode()
def test_more_passes_than_fit_are_made_in_parts(llava, monkeypatch):
    inputs = llava.inputs(row_of(picture(1)))
    with smoothed(llava.model, CONFIG, llava.processor.image_processor):
        whole = llava.model(**inputs).logits
    tower, sizes = find_tower(llava.model).module, []
    original = type(tower).forward

    def small(self, pixel_values, *args, **kwargs):
        sizes.append(len(pixel_values))
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(tower), "forward", small)
    with smoothed(llava.model, CONFIG, llava.processor.image_processor):
        parts = llava.model(**inputs).logits
    assert sizes == [4, 2, 2]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_drawn_noise_goes_on_where_a_batch_ended(llava):
    """A certificate's draws are as many as it says, whatever fits into memory: no batch repeats another's."""
    pixels = llava.inputs(row_of(picture(1)))["pixel_values"]

    def seeded(pictures):
        return [torch.Generator().manual_seed(number) for number in range(pictures)]

    def features(most):
        config = dataclasses.replace(CONFIG, max_copies_per_batch=most)
        smoother = make_smoother(llava.model, config, llava.processor.image_processor, DrawnNoise(SIGMA, seeded))
        return torch.cat([part[:, 0] for part in smoother.features(pixels, output_hidden_states=True)])

    whole = features(None)
    assert len(whole) == SAMPLES
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)
    torch.testing.assert_close(features(1), whole, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_tower_that_packs_its_pictures_into_one_row_is_called_copy_by_copy(llava, monkeypatch):
    pixels = llava.inputs(row_of(picture(1)))["pixel_values"]
    whole = make_smoother(llava.model, CONFIG, llava.processor.image_processor)(pixels)
    tower, sizes = find_tower(llava.model).module, []
    original = type(tower).forward

    def packed(self, pixel_values, *args, **kwargs):
        sizes.append(len(pixel_values))
        features = original(self, pixel_values, *args, **kwargs).last_hidden_state
        return BaseModelOutput(last_hidden_state=features.reshape(1, -1, features.shape[-1]))

    monkeypatch.setattr(type(tower), "forward", packed)
    found = make_smoother(llava.model, CONFIG, llava.processor.image_processor)(pixels)
    assert sizes == [SAMPLES, *[1] * SAMPLES]
    torch.testing.assert_close(found.last_hidden_state, whole.last_hidden_state, rtol=1e-4, atol=1e-4)


def test_what_the_readme_imports_is_the_same_thing():
    assert hf_integration.smoothed is smoothed
    assert hf_integration.FeatureSmoothingConfig is FeatureSmoothingConfig


@torch.inference_mode()
def test_a_smoothing_inside_another_is_not_squared(llava, monkeypatch):
    tower, sizes = find_tower(llava.model).module, []
    original = type(tower).forward

    def counted(self, pixel_values, *args, **kwargs):
        sizes.append(len(pixel_values))
        return original(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(tower), "forward", counted)
    processor = llava.processor.image_processor
    with smoothed(llava.model, CONFIG, processor), smoothed(llava.model, CONFIG, processor):
        llava.model(**llava.inputs(row_of(picture(1))))
    assert sizes == [SAMPLES]


def test_attentions_of_noisy_passes_are_dropped_and_not_averaged():
    output = BaseModelOutput(last_hidden_state=torch.ones(1, 2, 3), attentions=(torch.ones(1, 2, 2),))
    walked = walk(output, lambda place, value: 2 * value)
    assert walked.attentions is None
    assert walked.last_hidden_state.eq(2).all()


@torch.inference_mode()
def test_a_single_pass_that_does_not_fit_is_an_error(llava, monkeypatch):
    tower = find_tower(llava.model).module

    def never(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(tower), "forward", never)
    with smoothed(llava.model, CONFIG, llava.processor.image_processor), pytest.raises(torch.OutOfMemoryError):
        llava.model(**llava.inputs(row_of(picture(1))))


@torch.inference_mode()
def test_the_first_copies_are_the_same_however_many_follow(llava):
    """Noise is a function of the copy's number, never of how many there are."""
    pixels = llava.inputs(row_of(picture(1)))["pixel_values"]
    few, many = (
        torch.cat(
            list(
                make_smoother(
                    llava.model, FeatureSmoothingConfig(num_samples=n, sigma=SIGMA), llava.processor.image_processor
                ).features(pixels, output_hidden_states=True)
            )
        )
        for n in (3, 6)
    )
    torch.testing.assert_close(many[:3], few, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(few.norm(dim=-1), torch.ones(few.shape[:-1]))


def test_a_thread_that_did_not_ask_is_not_smoothed(llava):
    inputs, found = llava.inputs(row_of(picture(1))), []

    def elsewhere():
        with torch.inference_mode():
            found.append(llava.model(**inputs).logits)

    with torch.inference_mode():
        plain = llava.model(**inputs).logits
        with smoothed(llava.model, CONFIG, llava.processor.image_processor):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            inside = llava.model(**inputs).logits
    assert torch.equal(found[0], plain)
    assert not torch.allclose(inside, plain, atol=1e-3)


def test_two_threads_that_ask_do_not_end_each_others_smoothing(llava):
    inputs, entered, leave = llava.inputs(row_of(picture(1))), threading.Event(), threading.Event()

    def elsewhere():
        with smoothed(llava.model, CONFIG, llava.processor.image_processor):
            entered.set()
            leave.wait(20)

    thread = threading.Thread(target=elsewhere)
    with torch.inference_mode(), smoothed(llava.model, CONFIG, llava.processor.image_processor):
        before = llava.model(**inputs).logits
        thread.start()
        entered.wait(20)
        leave.set()
        thread.join()
        assert torch.equal(llava.model(**inputs).logits, before)
    assert "forward" not in vars(find_tower(llava.model).module)


def test_an_error_inside_ends_the_smoothing(llava):
    with pytest.raises(KeyError), smoothed(llava.model, CONFIG, llava.processor.image_processor):
        raise KeyError
    assert "forward" not in vars(find_tower(llava.model).module)


def test_a_forward_that_somebody_else_had_replaced_is_kept(llava):
    tower = find_tower(llava.model).module
    original = tower.forward
    tower.forward = lambda *args, **kwargs: original(*args, **kwargs)
    mine = tower.forward
    try:
        with smoothed(llava.model, CONFIG, llava.processor.image_processor):
            pass
        assert tower.forward is mine
    finally:
        del tower.forward


def test_text_alone_is_answered_plainly(llava):
    inputs = llava.inputs(((), "What is it?"))
    with hf_integration.observe() as seen:
        llava.model.generate(**inputs, **SETTINGS, smoothguard=FS)
    assert seen.defended == 0


def test_a_smoothed_mllama_refuses_pixels_that_are_not_in_range(llava):
    inputs = dict(llava.inputs(row_of(picture(1))))
    inputs["pixel_values"] = inputs["pixel_values"] * 100
    with pytest.raises(UndefendableError, match="outside"):
        llava.model.generate(**inputs, **SETTINGS, smoothguard=FS)


def test_a_tower_that_is_never_called_is_a_refusal(llava, monkeypatch):
    from lmms_smoothguard.defenses import feature_smoothing

    other = Subject("llava")  # its tower is smoothed instead of the model's own
    monkeypatch.setattr(
        feature_smoothing, "smoothed", lambda model, config, processor=None: smoothed(other.model, config, processor)
    )
    with pytest.raises(UndefendableError, match="never called its vision tower"):
        llava.model.generate(**llava.inputs(row_of(picture(1))), **SETTINGS, smoothguard=FS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma": 0}, "without noise nothing is smoothed"),
        ({"sigma": -0.1}, "more than 0"),
        ({"sigma": float("nan")}, "expected a number"),
        ({"sigma": "a lot"}, "expected a number"),
        ({"num_samples": 1}, "at least 2"),
        ({"num_samples": 2.5}, "at least 2"),
        ({"booster": 3}, "booster is 3"),
        ({"mapper": "yes"}, "true or false"),
        ({"seed": -1}, "seed is -1"),
        ({"max_copies_per_batch": 0}, "max_copies_per_batch is 0"),
        ({"sigmas": 0.1}, "did you mean 'sigma'"),
    ],
)
def test_bad_settings_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        choose({"defense": "feature_smoothing", **fields})


def test_a_model_without_a_tower_is_refused_and_says_what_was_looked_for():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         bos_token_id=1, eos_token_id=2))  # fmt: skip
    with pytest.raises(UndefendableError, match="vision_tower, vision_model, visual"):
        find_tower(model)


def test_features_without_a_direction_are_refused(llava):
    mean = Mean()
    with pytest.raises(UndefendableError, match="1 of 6 feature vectors are zero"):
        mean.add(torch.tensor([[[1.0, 0], [0, 0], [1, 1]], [[1.0, 0], [0, 2], [1, 1]]]))
    with pytest.raises(UndefendableError, match="not finite"):
        mean.add(torch.tensor([[[1.0, 0], [float("inf"), 0]]]))
    opposed = Mean()
    opposed.add(torch.tensor([[[1.0, 0]], [[-1.0, 0]]]))
    with pytest.raises(UndefendableError, match="zero"):
        opposed.result(torch.float32)


# -- several layers, dual encoders, both defences at once --------------------------------------------------------------


@torch.inference_mode()
def test_every_selected_layer_is_smoothed():
    subject = Subject("llava")
    projector = subject.model.model.multi_modal_projector
    projector.linear_1 = torch.nn.Linear(64, projector.linear_1.out_features)
    subject.model.config.vision_feature_layer = [-2, -1]
    inputs = subject.inputs(row_of(picture(1)))
    calls = []
    hook = projector.register_forward_hook(lambda _, args, out: calls.append(args[0]))
    with smoothed(subject.model, CONFIG, subject.processor.image_processor):
        subject.model(**inputs)
    hook.remove()
    smoother = make_smoother(subject.model, CONFIG, subject.processor.image_processor)
    noise = NoiseSource(
        find_images(inputs, subject.model.config),
        sigma=SIGMA,
        statistics=pixel_statistics(subject.model, subject.processor.image_processor),
        seed=0,
    )
    outputs = [
        smoother.tower.module(noise.copy(n), output_hidden_states=True).hidden_states for n in range(1, SAMPLES + 1)
    ]
    expected = torch.cat([by_hand(torch.stack([one[layer][:, 1:] for one in outputs])) for layer in (-2, -1)], -1)
    torch.testing.assert_close(calls[0], expected, rtol=1e-3, atol=1e-3)


def dual_encoder(kind):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {
        "vocab_size": 40,
        "max_position_embeddings": 12,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    vision = sizes | {"image_size": 28, "patch_size": 7}
    torch.manual_seed(0)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        model = SiglipModel(SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=vision))
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return model.eval(), processor


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.inference_mode()
def test_bare_dual_encoders_classify_and_retrieve_with_smoothed_embeddings(kind):
    model, processor = dual_encoder(kind)
    pixels = processor(images=[picture(n, (28, 28)) for n in range(3)], return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[1, 5, 6, 3], [1, 7, 8, 3]])
    with smoothed(model, CONFIG, processor) as smoother:
        embedded = model.get_image_features(pixels).pooler_output
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    assert smoother.calls == 2
    noise = NoiseSource(
        smoother._images("pixel_values", {"pixel_values": pixels}),
        sigma=SIGMA,
        statistics=pixel_statistics(model, processor),
        seed=0,
    )
    expected = by_hand(
        torch.stack([model.get_image_features(noise.copy(n)).pooler_output for n in range(1, SAMPLES + 1)])
    )
    torch.testing.assert_close(embedded, expected, rtol=1e-4, atol=1e-5)
    texts = torch.nn.functional.normalize(model.get_text_features(ids).pooler_output, dim=-1)
    wanted = torch.nn.functional.normalize(expected, dim=-1) @ texts.T * model.logit_scale.exp()
    wanted = wanted + getattr(model, "logit_bias", torch.zeros(()))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    plain = model.get_image_features(pixels).pooler_output
    assert not torch.allclose(plain, embedded, atol=1e-4)


@torch.inference_mode()
def test_smoothguard_over_a_smoothed_tower_votes_on_smoothed_answers(llava):
    both = {
        "defense": "smoothguard+feature_smoothing",
        "num_samples": 3,
        "sigma": 0.5,
        "feature_samples": 2,
        "feature_sigma": SIGMA,
    }
    inputs, statistics = (
        llava.inputs(row_of(picture(2))),
        pixel_statistics(llava.model, llava.processor.image_processor),
    )
    verdict = llava.model.generate(**inputs, **SETTINGS, smoothguard=both, return_dict_in_generate=True).smoothguard[0]
    noise = NoiseSource(find_images(inputs, llava.model.config), sigma=0.5, statistics=statistics, seed=0)
    expected = []
    for values in (inputs["pixel_values"], noise.copy(1), noise.copy(2)):
        with smoothed(llava.model, FeatureSmoothingConfig(num_samples=2, sigma=SIGMA), llava.processor.image_processor):
            expected.append(llava.answer({**inputs, "pixel_values": values}))
    assert list(verdict.candidates) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature_samples": 1}, "feature_samples is 1"),
        ({"feature_sigma": 0}, "feature_sigma is 0"),
        ({"noise_space": "normalized"}, "expected 'pixel'"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_bad_settings_of_both_are_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        choose({"defense": "smoothguard+feature_smoothing", **fields})
