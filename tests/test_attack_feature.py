"""Feature attacks: what image tokens are, what is approached or left, whose chance decides."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models.subject import Subject, row_of

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.crops import random_crops
from lmms_smoothguard.attacks.feature import Feature, FeatureOptions
from lmms_smoothguard.attacks.features import image_features
from lmms_smoothguard.attacks.objective import Threat
from lmms_smoothguard.attacks.rendering import Renderer
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import choose
from lmms_smoothguard.errors import AttackError, ConfigError


def settings(**fields):
    return AttackSettings.parse("feature", fields)


def slots(*pictures):
    """Pictures of one size as the rows of one slot."""
    arrays = [np.asarray(picture, np.float32) / 255 for picture in pictures]
    return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(),)


@pytest.fixture
def target(images, tmp_path):
    path = tmp_path / "target.png"
    images[7].save(path)
    return str(path)


@pytest.fixture
def threat(trained, batch):
    model, processor = trained

    def make(clean, **more):
        prompts = [{k: v for k, v in batch(0).items() if k != "pixel_values"}] * len(clean[0])
        return Threat(model, processor, Renderer(processor, model.device, torch.float32), clean, prompts, [], **more)

    return make


@pytest.fixture
def craft(trained, images, batch, tmp_path):
    model, processor = trained

    def make(numbers, defense=None, **fields):
        crafter = Crafter(model, processor, AttackCache(tmp_path / "cache"), defense, quiet=True)
        return crafter.craft([Job(settings(**fields), (images[n],), dict(batch(n)), (5,)) for n in numbers])

    return make


def crafter_key(trained, tmp_path, job):
    return Crafter(*trained, AttackCache(tmp_path / "keys"))._key(job)


# -- image features ----------------------------------------------------------------------------------------------------


def test_image_tokens_are_those_that_the_language_model_is_given(subject, pictures):
    """The language model's input at the picture's places, seen by a hook, is what `image_features` says."""
    if subject.kind.name == "mllama":
        pytest.skip("no image tokens; see the refusal below")
    square = pictures[0]
    inputs = subject.inputs(row_of(square), row_of(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    seen = {}

    def watch(_module, arguments, keywords):
        seen.setdefault("embeds", keywords.get("inputs_embeds", arguments[0] if arguments else None))

    language = subject.model.get_encoder() if "t5" in subject.kind.name else subject.model.get_decoder()
    if "blip" in subject.kind.name:
        language = subject.model.language_model
    handle = language.register_forward_pre_hook(watch, with_kwargs=True)
    extra = {"decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)} if "t5" in subject.kind.name else {}
    with torch.no_grad():
        subject.model(**inputs, **extra)
        found = image_features(subject.model, inputs, 2)
    handle.remove()
    config = subject.model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    if subject.kind.name == "instructblip_t5" or subject.kind.name == "instructblip":
        places = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        places[:, : found.shape[1]] = True
        places = places if int((inputs["input_ids"] == token).sum()) == 0 else inputs["input_ids"] == token
    else:
        places = inputs["input_ids"] == token
    given = seen["embeds"][places].view(2, -1, found.shape[-1])
    assert given.shape == found.shape
    assert torch.allclose(given.float(), found, rtol=1e-4, atol=1e-4 * float(found.abs().max()))
    assert not torch.allclose(found[0], found[1], rtol=1e-2)


def test_sizes_that_only_the_inner_model_names_are_passed_on():
    """Pixtral pads pictures to the largest and cuts the padding's tokens off again by image_sizes."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = PixtralVisionConfig(**small, image_size=32, patch_size=8)
    text = LlamaConfig(**small, num_key_value_heads=2, vocab_size=64)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=5,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32), "image_sizes": torch.tensor([[16, 32], [16, 32]])}
    with torch.no_grad():
        assert image_features(model, inputs, 2).shape == (2, (16 // 8) * (32 // 8), 32)


@pytest.mark.parametrize(
    ("crops", "restarts", "eot", "rows"), [(0, 1, 0, 32), (4, 1, 0, 8), (2, 2, 2, 4), (40, 1, 0, 1)]
)
def test_crops_count_for_memory(trained, tmp_path, crops, restarts, eot, rows):
    crafter = Crafter(*trained, AttackCache(tmp_path), batch_size=32)
    assert crafter._rows(settings(crops=crops, restarts=restarts, eot=eot), ["input_ids"]) == rows
    assert crafter._rows(settings(crops=crops), ["position_ids"]) == 1


def test_feature_attacks_run_on_every_architecture(subject, pictures, tmp_path):
    if subject.kind.name == "mllama":
        pytest.skip("see the refusal below")
    chosen = pictures[1:] if subject.kind.several else pictures[1:2]
    inputs = subject.inputs(row_of(*chosen))
    job = Job(settings(steps=3), chosen, inputs, (5,))
    entry = Crafter(subject.model, subject.processor, AttackCache(tmp_path), quiet=True).craft([job])[0]
    assert entry.record["objective"][-1] > entry.record["objective"][0]


def test_a_model_without_image_tokens_is_refused():
    subject = Subject("mllama")
    with pytest.raises(AttackError, match="MllamaForConditionalGeneration has no get_image_features"):
        image_features(subject.model, {}, 1)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t[:4], t[4:]], lambda t: (t[:2], t[2:])])
def test_features_in_any_form(wrap):
    tokens = torch.arange(16.0).view(8, 2)

    class Model:
        def get_image_features(self, pixel_values):
            return wrap(tokens)

    assert torch.equal(image_features(Model(), {"pixel_values": 1, "input_ids": 2}, 2), tokens.view(2, 4, 2))
    with pytest.raises(AttackError, match="8 image tokens of 3 rows"):
        image_features(Model(), {"pixel_values": 1}, 3)


# -- crops -------------------------------------------------------------------------------------------------------------


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_crop_of_everything_is_the_picture():
    pictures = (torch.rand(2, 3, 20, 30), torch.rand(2, 3, 17, 9))
    for new, old in zip(random_crops(pictures, generators(1, 2), 1.0), pictures, strict=True):
        assert torch.allclose(new, old, atol=1e-6)


def test_crops_are_their_rows_own_and_copies_share_them():
    ramp = torch.linspace(0, 1, 40).expand(1, 3, 40, 40).contiguous()
    pictures = (ramp.repeat(4, 1, 1, 1),)  # two rows, two copies
    found = random_crops(pictures, generators(1, 2), 0.3)[0]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    alone = random_crops((ramp,), generators(2), 0.3)[0]
    assert torch.equal(alone[0], found[1])
    spread = found[..., -1].mean((1, 2)) - found[..., 0].mean((1, 2))  # how much of the ramp is seen
    assert ((spread > 0.35) & (spread < 1.0)).all()


# -- what is approached ------------------------------------------------------------------------------------------------


def test_the_target_itself_is_the_optimum(threat, images, target):
    clean = slots(images[0], images[1])
    attack = Feature(settings(target_image=target))
    objective = attack.objective(threat(clean))
    with torch.no_grad():
        assert objective(slots(images[7], images[7])).tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
        assert max(objective(clean).tolist()) < 0.95
        away = Feature(settings()).objective(threat(clean))
        assert away(clean).tolist() == pytest.approx([-1.0, -1.0], abs=1e-5)


def test_a_text_is_met_by_the_mean_of_its_tokens(threat, trained, images):
    model, processor = trained
    clean = slots(images[0])
    objective = Feature(settings(target_text="red circle")).objective(threat(clean))
    ids = processor.tokenizer("red circle", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = model.get_input_embeddings()(ids).mean(1)
        pixels = processor.image_processor(images=[images[0]], return_tensors="pt")["pixel_values"]
        shown = model.get_image_features(pixel_values=pixels).pooler_output[0].mean(0, keepdim=True)
        expected = torch.cosine_similarity(shown, wanted)
        assert float(objective(clean)) == pytest.approx(float(expected), abs=1e-4)


def test_it_moves_features_further_than_noise_of_the_same_size(threat, craft, images, target):
    """Through 8-bit pictures: away, towards a picture, towards a text, and with crops."""
    rng = np.random.default_rng(0)
    random = np.asarray(images[1]).astype(int) + rng.choice([-8, 8], (64, 64, 3))
    random = random.clip(0, 255).astype(np.uint8)
    for fields in ({}, {"target_image": target}, {"target_text": "red circle"}, {"target_image": target, "crops": 1}):
        entry = craft([1], steps=10, **fields)[0]
        assert np.abs(entry.images[0].astype(int) - np.asarray(images[1])).max() <= 8
        objective = Feature(settings(**fields, crop_low=1.0)).objective(threat(slots(images[1])))
        with torch.no_grad():
            gains = [
                float(objective(slots(picture)) - objective(slots(images[1]))) for picture in (entry.images[0], random)
            ]
        assert gains[0] > 0.01 + 1.5 * max(0.0, gains[1]), (fields, gains)


def test_a_feature_attack_changes_what_the_model_sees(trained, craft, images):
    model, processor = trained
    from lmms_smoothguard.tiny.evaluate import answers
    from lmms_smoothguard.tiny.language import DESCRIBE

    entries = craft(range(4), steps=20)
    clean = answers(model, processor, [DESCRIBE[0]] * 4, np.stack([np.asarray(image) for image in images[:4]]))
    found = answers(model, processor, [DESCRIBE[0]] * 4, np.stack([entry.images[0] for entry in entries]))
    assert sum(new != old for new, old in zip(found, clean, strict=True)) >= 3


@pytest.mark.parametrize("eot", [0, 2])
def test_a_picture_depends_on_no_neighbour(trained, images, batch, tmp_path, eot, target):
    model, processor = trained
    defense = choose({"sigma": 0.1, "noise_space": "pixel"}) if eot else None
    fields = {"crops": 2, "steps": 3, "eot": eot, "restarts": 2, "target_image": target}
    jobs = [Job(settings(**fields), (images[n],), dict(batch(n, question="What is it?")), (5,)) for n in range(3)]
    together = Crafter(model, processor, AttackCache(tmp_path / "a"), defense, quiet=True).craft(jobs)
    alone = Crafter(model, processor, AttackCache(tmp_path / "b"), defense, quiet=True).craft(jobs[2:])
    assert (alone[0].images[0] == together[2].images[0]).all()
    reseeded = Job(settings(**fields | {"seed": 1}), jobs[2].images, jobs[2].inputs, (5,))
    other = Crafter(model, processor, AttackCache(tmp_path / "b"), defense, quiet=True).craft([reseeded])
    assert (other[0].images[0] != together[2].images[0]).any()


# -- keys and refusals -------------------------------------------------------------------------------------------------


def test_the_target_counts_by_content(trained, images, batch, tmp_path, target):
    job = lambda path: Job(settings(target_image=str(path)), (images[0],), dict(batch(0)), (5,))  # noqa: E731
    first = crafter_key(trained, tmp_path, job(target))
    copy = tmp_path / "copy.png"
    images[7].save(copy)
    assert crafter_key(trained, tmp_path, job(copy)) == first
    images[8].save(copy)
    assert crafter_key(trained, tmp_path, job(copy)) != first


def test_a_target_text_is_taken_as_written():
    for text in ("1/2", "none", "true", "7"):
        assert settings(target_text=text).options.target_text == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_image": "a.png", "target_text": "x"}, "target_image is 'a.png' and target_text 'x'"),
        ({"target_text": " "}, "target_text is ' '; expected words"),
        ({"target_image": ""}, "target_image is ''; expected the path"),
        ({"target_image": 5}, "target_image is 5"),
        ({"target": "Sure"}, "attack target is 'Sure', an answer to be forced.*target_text"),
        ({"random_start": False}, "random_start is False; away from"),
        ({"loss": "ce"}, "attack loss is 'ce', of answers; attack=feature compares"),
        ({"crops": -1}, "crops is -1"),
        ({"crops": 1.5}, "crops is 1.5"),
        ({"crop_low": 0}, "crop_low is 0"),
        ({"crop_low": "all"}, "crop_low is 'all'"),
        ({"target_imag": "x"}, "did you mean 'target_image'"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(ConfigError, match=message):
        settings(**fields)


def test_a_start_at_the_picture_is_fine_with_a_target():
    assert settings(random_start=False, target_text="x").options == FeatureOptions(target_text="x")
    assert settings().eps == 8 / 255


def test_targets_that_cannot_be_used(craft, threat, images, tmp_path, trained):
    with pytest.raises(AttackError, match=r"target_image is 'nowhere.png', and there is no such file"):
        craft([0], target_image="nowhere.png")
    for name, data in (("empty.png", b""), ("text.png", b"not a picture"), ("cut.png", b"\x89PNG\r\n\x1a\n")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AttackError, match=f"target_image is .*{name}', which is no picture"):
            craft([0], target_image=str(tmp_path / name))
    mute = SimpleNamespace(tokenizer=lambda text, **more: SimpleNamespace(input_ids=[]))
    wordless = dataclasses.replace(threat(slots(images[0])), processor=mute)
    with pytest.raises(AttackError, match="target_text is 'x', which has no tokens"):
        Feature(settings(target_text="x")).objective(wordless)
    image_processor = dataclasses.replace(wordless, processor=trained[1].image_processor)
    with pytest.raises(AttackError, match="CLIPImageProcessor has no tokenizer"):
        Feature(settings(target_text="x")).objective(image_processor)
