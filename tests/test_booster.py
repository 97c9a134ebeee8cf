"""Purifier and mapper: the identity until trained, held to the model they were trained for, in the right place of the smoothing."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models.subject import Subject, row_of
from typer.testing import CliRunner

from lmms_smoothguard.boosting import booster as boosters
from lmms_smoothguard.boosting.booster import Booster, load_booster
from lmms_smoothguard.boosting.denoiser import Denoiser, read_denoiser
from lmms_smoothguard.boosting.mapper import Mapper, MapperConfig
from lmms_smoothguard.boosting.purifier import Purifier, PurifierConfig
from lmms_smoothguard.cli import app
from lmms_smoothguard.dual import DualEncoder
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.fingerprint import same_weights, weights_print
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.smoothing.context import make_smoother, smoothed
from lmms_smoothguard.smoothing.smoother import Smoother
from lmms_smoothguard.smoothing.towers import find_tower
from lmms_smoothguard.subject import Subject as ModelOf
from lmms_smoothguard.training.booster import BoosterRecipe, BoosterTrainer
from lmms_smoothguard.training.booster_session import train
from lmms_smoothguard.training.pictures import folder_sources, to_pixels

SMALL = PurifierConfig(unshuffle=2, widths=(8, 16))
SIDE = 56  # of tiny_models


def picture(seed, size=(70, 60)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def shaken(module, seed=0):
    """The same module with other weights in what is zero at first."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llava():
    return Subject("llava")


@pytest.fixture
def made(llava):
    """A booster for that model, its weights at random."""
    tower = find_tower(llava.model)
    mappers = torch.nn.ModuleList([shaken(Mapper(MapperConfig(width=32, hidden=16, blocks=1)))])
    return Booster(shaken(Purifier(SMALL)), mappers, (0.0, 0.3), (SIDE, SIDE), weights_print(tower.module))


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (30, 45), (7, 9)])
def test_an_untrained_purifier_is_the_identity_at_any_size(size):
    pixels = torch.rand(2, 3, *size)
    torch.testing.assert_close(Purifier(SMALL)(pixels, torch.tensor([0.0, 0.25])), pixels)


def test_a_purifier_takes_more_away_where_there_is_more_noise():
    pixels, purifier = torch.rand(1, 3, 16, 16) * 0.2 + 0.4, shaken(Purifier(SMALL))
    purifier._predicted = lambda folded, sigma: torch.ones_like(folded)  # the same answer at both levels
    taken = [float((pixels - purifier(pixels, torch.tensor([sigma]))).mean()) for sigma in (0.0, 0.2)]
    assert taken == pytest.approx([0.02, 0.22], abs=1e-5)


def test_an_untrained_mapper_is_the_identity_and_a_trained_one_knows_the_noise_level():
    features = torch.randn(2, 5, 32)
    config = MapperConfig(width=32, hidden=16, blocks=2)
    torch.testing.assert_close(Mapper(config)(features, torch.tensor([0.1, 0.2])), features)
    mapper = shaken(Mapper(config))
    assert not torch.allclose(mapper(features, torch.tensor([0.1] * 2)), mapper(features, torch.tensor([0.3] * 2)))
    alone = mapper(features[:1], torch.tensor([0.1]))
    torch.testing.assert_close(
        alone, mapper(features, torch.tensor([0.1] * 2))[:1]
    )  # pictures know nothing of each other


# -- in the smoothing --------------------------------------------------------------------------------------------------


def serve(llava, monkeypatch, booster):
    """load_booster gives this one."""
    monkeypatch.setattr("lmms_smoothguard.smoothing.context.load_booster", lambda *args, **kwargs: booster)
    config = FeatureSmoothingConfig(num_samples=4, sigma=0.2, booster="mine")
    return make_smoother(llava.model, config, llava.processor.image_processor)


@torch.inference_mode()
def test_an_untrained_booster_changes_nothing(llava, monkeypatch):
    inputs = llava.inputs(row_of(picture(1)))
    fresh = Booster(
        Purifier(SMALL).eval(), torch.nn.ModuleList([Mapper(MapperConfig(width=32))]).eval(), (0, 0.3), (SIDE, SIDE)
    )
    plain = make_smoother(
        llava.model, FeatureSmoothingConfig(num_samples=4, sigma=0.2), llava.processor.image_processor
    )(inputs["pixel_values"]).last_hidden_state
    boosted = serve(llava, monkeypatch, fresh)(inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(boosted, plain, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_the_purifier_sees_noisy_pixels_and_the_mapper_single_features(llava, monkeypatch, made):
    """mean(||f||) m / ||m||, m the mean of M(f(P(x + e))) normalised: pass by pass, written out."""
    pixels = llava.inputs(row_of(picture(1)))["pixel_values"]
    smoother = serve(llava, monkeypatch, made)
    found = smoother.tower.selected(smoother(pixels, output_hidden_states=True))[0]
    mean, std = (v.view(-1, 1, 1) for v in pixel_statistics(llava.model, llava.processor.image_processor)[:2])
    copies = smoother.noise.copies(
        smoother._images("pixel_values", {"pixel_values": pixels}), smoother.statistics, [1, 2, 3, 4]
    )
    directions, lengths, sigma = [], [], torch.tensor([0.2])
    for copy in copies:
        purified = (made.purifier((copy * std + mean).clamp(0, 1), sigma) - mean) / std
        features = smoother.tower.module(purified, output_hidden_states=True).hidden_states[-1][:, 1:]
        mapped = made.mappers[0](features, sigma)
        directions.append(mapped / mapped.norm(dim=-1, keepdim=True))
        lengths.append(features.norm(dim=-1, keepdim=True))  # what the tower gave, not what the mapper made of it
    direction = torch.stack(directions).mean(0)
    expected = direction / direction.norm(dim=-1, keepdim=True) * torch.stack(lengths).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    without = dataclasses.replace(made, mappers=None)
    assert not torch.allclose(serve(llava, monkeypatch, without)(pixels).last_hidden_state[:, 1:], found, atol=1e-2)


def test_packed_patches_are_no_pictures_to_purify(made, monkeypatch):
    qwen = Subject("qwen2_vl")
    monkeypatch.setattr("lmms_smoothguard.smoothing.context.load_booster", lambda *args, **kwargs: made)
    config = {"defense": "feature_smoothing", "num_samples": 2, "sigma": 0.2, "booster": "mine"}
    with pytest.raises(UndefendableError, match="no pictures as a purifier takes them"):
        qwen.model.generate(**qwen.inputs(row_of(picture(1))), max_new_tokens=1, smoothguard=config)


# -- held to what it was trained for -----------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path, made, llava):
    made.save(tmp_path / "b")
    found = load_booster(str(tmp_path / "b"), find_tower(llava.model))
    pixels = torch.rand(2, 3, SIDE, SIDE)
    assert float((found.purify(pixels, 0.2) - made.purify(pixels, 0.2)).abs().mean()) < 2e-3  # float16
    features = torch.randn(2, 5, 32)
    torch.testing.assert_close(found.map(0, features, 0.2), made.map(0, features, 0.2), rtol=1e-2, atol=1e-2)
    assert (found.sigmas, found.size) == ((0.0, 0.3), (SIDE, SIDE))
    assert load_booster(str(tmp_path / "b"), find_tower(llava.model)) is found  # loaded once
    assert not load_booster(str(tmp_path / "b"), find_tower(llava.model), mapper=False).maps
    assert not any(parameter.requires_grad for parameter in found.purifier.parameters())


def test_another_models_booster_is_refused(tmp_path, made):
    made.save(tmp_path)
    with pytest.raises(ConfigError, match="trained for another vision tower"):
        load_booster(str(tmp_path), find_tower(shaken(Subject("llava").model)))


def test_half_precision_is_the_same_model_and_other_weights_are_not(llava):
    tower = find_tower(llava.model).module
    own = weights_print(tower)
    other = Subject("llava")
    assert same_weights(own, weights_print(find_tower(other.model.to(torch.bfloat16)).module))
    shaken(find_tower(other.model).module)
    assert not same_weights(own, weights_print(find_tower(other.model).module))


def test_a_noise_level_or_size_it_was_not_trained_on_is_refused(tmp_path, made, llava):
    made.save(tmp_path)
    model, processor = llava.model, llava.processor.image_processor
    with pytest.raises(ConfigError, match=r"sigma is 0\.5; the booster .* was trained on 0 to 0\.3"):
        make_smoother(model, FeatureSmoothingConfig(sigma=0.5, booster=str(tmp_path)), processor)
    with pytest.raises(ConfigError, match=r"the pictures are 32 x 40; .* was trained at 56 x 56"):
        made.purify(torch.rand(1, 3, 32, 40), 0.2)


@pytest.mark.parametrize("name", ["psm", "gsb"])
def test_the_embedded_models_booster_is_not_for_others(name, llava):
    with pytest.raises(ConfigError, match="embedded model's own"):
        load_booster(name, find_tower(llava.model))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("booster.json", "{", "is no booster"),
        ("booster.json", '{"format": 9}', "has format 9; expected 1"),
        ("booster.json", '{"format": 1}', "is no booster"),
        ("other.json", "{}", "neither a booster nor a diffusers pipeline"),
    ],
)
def test_what_is_no_booster_is_refused(tmp_path, llava, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_booster(str(tmp_path), find_tower(llava.model))


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "a/b/c", "weights.pt"])
def test_a_source_that_is_none_is_refused(source, llava):
    with pytest.raises(ConfigError, match="a directory that exists or a hub id"):
        load_booster(source, find_tower(llava.model))


def test_without_diffusers_the_install_command_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmms-smoothguard\[booster\]'"):
        Purifier(SMALL)


# -- a pretrained diffusion model --------------------------------------------------------------------------------------


class Knowing(torch.nn.Module):
    """A net that knows the clean picture, and says what its scheduler's prediction type asks for."""

    dtype = torch.float32

    def __init__(self, clean, alphas, prediction):
        super().__init__()
        self.clean, self.alphas, self.prediction, self.steps = clean * 2 - 1, alphas, prediction, []
        self.config = type("config", (), {"block_out_channels": (1, 1)})

    def forward(self, noised, step, return_dict):
        self.steps.append(step.tolist())
        alpha = self.alphas[step].view(-1, 1, 1, 1)
        epsilon = (noised - alpha.sqrt() * self.clean) / (1 - alpha).sqrt()
        answers = {
            "epsilon": epsilon,
            "sample": self.clean,
            "v_prediction": alpha.sqrt() * epsilon - (1 - alpha).sqrt() * self.clean,
        }
        return (torch.cat([answers[self.prediction], torch.randn_like(noised)], 1),)  # further channels are variances


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_denoiser_that_knows_gives_the_clean_picture_back(prediction):
    """Whatever is predicted; and the step is the one with as much noise, in units of [-1, 1]."""
    alphas = torch.linspace(1e-4, 0.02, 1000).neg().add(1).cumprod(0)
    clean = torch.rand(2, 3, 8, 8) * 0.8 + 0.1
    denoiser = Denoiser(Knowing(clean, alphas, prediction), alphas, prediction)
    sigma = torch.tensor([0.05, 0.25])
    noisy = clean + sigma.view(-1, 1, 1, 1) * torch.randn_like(clean)
    torch.testing.assert_close(denoiser(noisy, sigma), clean, rtol=1e-3, atol=1e-3)
    (steps,) = denoiser.net.steps
    assert [float(((1 - alphas[s]) / alphas[s]).sqrt()) for s in steps] == pytest.approx([0.1, 0.5], rel=0.03)


def test_a_diffusers_pipeline_is_read_and_used(tmp_path, llava, monkeypatch):
    import diffusers

    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        block_out_channels=(8, 16), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=8,
        layers_per_block=1,
    )  # fmt: skip
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    config = FeatureSmoothingConfig(num_samples=2, sigma=0.2, booster=str(tmp_path))
    with torch.inference_mode(), smoothed(llava.model, config, llava.processor.image_processor) as smoother:
        llava.model(**llava.inputs(row_of(picture(1))))
    assert isinstance(smoother, Smoother) and not smoother.booster.maps
    torch.testing.assert_close(smoother.booster.purifier.net.conv_in.weight, net.conv_in.weight)
    with pytest.raises(ConfigError, match="sigma is 5"):
        make_smoother(
            llava.model, dataclasses.replace(config, sigma=5.0), llava.processor.image_processor
        ).booster.check_sigma(500.0)
        make_smoother(llava.model, dataclasses.replace(config, sigma=1e-4), llava.processor.image_processor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel"),
        ({"in_channels": 4, "out_channels": 4}, "takes 4 channels"),
    ],
)
def test_a_diffusion_model_that_is_not_one_of_pictures_is_refused(tmp_path, change, message):
    import diffusers

    sizes = {"in_channels": 3, "out_channels": 3} | {k: v for k, v in change.items() if k.endswith("channels")}
    net = diffusers.UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
        **sizes,
    )
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    place = tmp_path / "unet" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_denoiser(tmp_path)


def test_pickled_weights_of_a_diffusion_model_are_refused(tmp_path):
    import diffusers

    net = diffusers.UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=8
    )
    net.save_pretrained(tmp_path / "unet", safe_serialization=False)
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ConfigError, match="safetensors"):
        read_denoiser(tmp_path)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    home = tmp_path / "pictures" / "deep"
    home.mkdir(parents=True)
    for n in range(6):
        picture(n).save(home / f"{n}.png")
    return tmp_path / "pictures"


RECIPE = BoosterRecipe(steps=(4, 3), batch=3, purifier=SMALL, mapper_hidden=16, mapper_blocks=1)


def trainer_of(llava, folder, out, recipe=RECIPE):
    return BoosterTrainer(recipe, llava.model, llava.processor, folder_sources(folder, labelled=False)[0], out)


def test_the_commands_defaults_are_the_recipes(monkeypatch):
    asked = []
    monkeypatch.setattr("lmms_smoothguard.training.booster_session.train", lambda *a, **k: asked.append(a[3]))
    assert CliRunner().invoke(app, ["train", "booster"], catch_exceptions=False).exit_code == 0
    assert asked == [BoosterRecipe()]


def test_a_killed_training_ends_where_an_unbroken_one_ends(llava, folder, tmp_path):
    """Killed in either stage; bit by bit."""
    whole = trainer_of(llava, folder, tmp_path / "whole")
    list(whole.run(100))
    for broken_after in (2, 6):
        out = tmp_path / f"broken{broken_after}"
        for done, _ in enumerate(trainer_of(llava, folder, out).run(1), start=1):
            if done == broken_after:
                break
        resumed = trainer_of(llava, folder, out)
        assert resumed.resume()
        list(resumed.run(100))
        assert all(torch.equal(resumed._mean[name], value) for name, value in whole._mean.items())


def test_a_training_begins_with_another_boosters_purifier(llava, folder, tmp_path, made):
    made.save(tmp_path / "first")
    begun = trainer_of(llava, folder, tmp_path / "out", dataclasses.replace(RECIPE, start=str(tmp_path / "first")))
    for name, value in made.purifier.state_dict().items():
        torch.testing.assert_close(begun.purifier.state_dict()[name], value, rtol=1e-2, atol=1e-3)  # float16
    other = dataclasses.replace(
        RECIPE, start=str(tmp_path / "first"), purifier=PurifierConfig(unshuffle=2, widths=(8, 24))
    )
    with pytest.raises(ConfigError, match=r"has widths \(8, 16\)"):
        trainer_of(llava, folder, tmp_path / "out", other)


def test_training_of_other_pictures_models_or_recipes_does_not_go_on(llava, folder, tmp_path):
    list(trainer_of(llava, folder, tmp_path / "out").run(1))
    with pytest.raises(ConfigError, match="lr differ"):
        trainer_of(llava, folder, tmp_path / "out", dataclasses.replace(RECIPE, lr=1.0)).resume()
    twin = Subject("llava")
    with torch.no_grad():
        next(find_tower(twin.model).module.parameters()).add_(0.01)
    with pytest.raises(ConfigError, match="model differ"):
        trainer_of(twin, folder, tmp_path / "out").resume()
    picture(9).save(folder / "one_more.png")
    with pytest.raises(ConfigError, match="pictures differ"):
        trainer_of(llava, folder, tmp_path / "out").resume()


def test_training_makes_features_of_noisy_pictures_more_like_clean_ones(llava, tmp_path):
    """On pictures it never saw: plain colours are easily told from noise."""
    home = tmp_path / "plain"
    home.mkdir()
    for n in range(20):
        Image.new("RGB", (SIDE, SIDE), tuple(np.random.default_rng(n).integers(0, 256, 3).tolist())).save(
            home / f"{n}.png"
        )
    recipe = dataclasses.replace(RECIPE, steps=(150, 30), batch=8, lr=8e-3)
    trainer = trainer_of(llava, home, tmp_path / "out", recipe)
    list(trainer.run(1000))
    figures = trainer.held_out_figures(trainer.booster, folder_sources(home, labelled=False)[1])
    assert figures["S, with purifier, sigma 0.4"].value > figures["S, tower alone, sigma 0.4"].value
    assert figures["PSNR, purified, sigma 0.4"].value > figures["PSNR, noisy, sigma 0.4"].value + 1
    assert all(not parameter.requires_grad for parameter in llava.model.parameters())  # the model stays as it was


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_booster_for_tiles_is_trained_on_whole_pictures_and_serves_every_tile(name, folder, tmp_path, monkeypatch):
    tiled = Subject(name)
    trainer = trainer_of(tiled, folder, tmp_path / "out")
    shown = to_pixels(tiled.processor.image_processor, trainer._pictures.pictures([0, 1]))
    assert shown.ndim == 5
    assert torch.equal(
        trainer._pixels(trainer._pictures, np.arange(2)), shown[:, 0]
    )  # the whole picture, no tile of it
    list(trainer.run(100))
    trainer.booster.save(tmp_path / "out" / "booster")
    purify, seen = Booster.purify, []
    monkeypatch.setattr(
        Booster, "purify", lambda self, pixels, sigma: seen.append(pixels.shape) or purify(self, pixels, sigma)
    )
    smoothing = {"defense": "feature_smoothing", "num_samples": 3, "sigma": 0.2, "booster": str(tmp_path / "out")}
    inputs = tiled.inputs(row_of(picture(5, (120, 60))))
    tiled.model.generate(**inputs, max_new_tokens=2, smoothguard=smoothing)
    tiles = inputs["pixel_values"].shape[1]
    assert tiles > 1
    assert sum(shape[0] for shape in seen) == 3 * tiles


@pytest.mark.parametrize(
    ("model", "read", "projector"),
    [
        ("tiny-llava", "the tokens that the language model reads, meaned over them", True),
        ("tiny-clip", "its pooled output", False),
    ],
)
def test_the_card_tells_what_was_trained_and_measured(folder, tmp_path, model, read, projector):
    figures = train(model, str(folder), tmp_path / "out", RECIPE, device="cpu")
    made = tmp_path / "out" / "booster"
    card = (made / "README.md").read_text()
    assert f"smoothguard train booster --model {model} --data pictures --steps 4 --mapper-steps 3 --widths 8,16" in card
    assert f"the noisy copy: {read}." in card
    assert ("behind the projector" in card) == projector
    assert all(f"| {name} | {value.value:.3f}" in card for name, value in figures.items())
    written = json.loads((made / "figures.json").read_text())["figures"]
    assert {name: figure["value"] for name, figure in written.items()} == {n: v.value for n, v in figures.items()}


def test_another_tower_for_a_dual_encoder_is_refused(folder, tmp_path):
    for options, message in (
        ({"vision_tower": "tiny-fare"}, "is a dual encoder"),
        ({"vision_tower_resolution": "source"}, "vision_tower_resolution"),
    ):
        with pytest.raises(ConfigError, match=message):
            train("tiny-clip", str(folder), tmp_path / "out", RECIPE, device="cpu", **options)


def test_pictures_that_cannot_be_had_are_refused(tmp_path, llava):
    from lmms_smoothguard.training.booster_session import _sources

    with pytest.raises(ConfigError, match="has 0 pictures"):
        folder_sources(tmp_path, labelled=False)
    with pytest.raises(ConfigError, match="expected 'scenes' or a folder"):
        _sources(str(tmp_path / "nowhere"), 0, 1.0)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"\.png is no picture that can be read"):
        trainer_of(llava, tmp_path, tmp_path / "out")


def test_the_embedded_boosters_belong_to_their_towers(trained):
    """psm and gsb are found by the weights of the tower: the LLaVA's own, FARE's in its place, and the dual encoder's."""
    robust = ModelOf("tiny-llava", "cpu", vision_tower="tiny-fare")
    towers = [find_tower(model) for model in (trained[0], robust.model, DualEncoder("tiny-clip", "cpu", "auto").model)]
    found = [[load_booster(name, tower) for name in boosters.EMBEDDED] for tower in towers]
    for one, other in found:
        assert one.maps
        assert one.size == (64, 64)
        assert one.digest == other.digest
    assert len({one.digest for one, _ in found}) == 3
    total = sum(path.stat().st_size for path in boosters._HOME.rglob("*") if path.is_file())
    assert total < 6_000_000
