"""FARE and TeCoA: what is minimised, over which tokens, in which ball; killed and resumed; bad input; what is shipped."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from lmms_smoothguard.cli import app
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.tiny.clip_testsets import single_object
from lmms_smoothguard.tiny.model import MODEL_DIR
from lmms_smoothguard.tiny.scenes import OBJECTS, make_scenes
from lmms_smoothguard.training import pictures, robust_models
from lmms_smoothguard.training.robust import RobustRecipe, RobustTrainer, class_embeddings, worst_case
from lmms_smoothguard.training.robust_figures import llava_rates
from lmms_smoothguard.training.robust_session import export, radius

EPS = 4 / 255
QUICK = {"steps": 6, "inner_steps": 2, "batch": 4, "lr": 4e-4, "noised_share": 0.5}


@pytest.fixture(scope="module")
def scene_source():
    return pictures.SceneSource(make_scenes(24, 700).images, None, "24 scenes")


@pytest.fixture(scope="module")
def labelled_source():
    scenes = single_object(make_scenes(160, 701))
    return pictures.SceneSource(scenes.images, scenes.objects[:, 0].astype(np.int64), "single objects")


@pytest.fixture(scope="module")
def bare_tower(tmp_path_factory):
    """A CLIP tower of random weights in a directory of its own: for what no figure is told of."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    place = tmp_path_factory.mktemp("tower")
    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                              image_size=32, patch_size=16)  # fmt: skip
    CLIPVisionModel(config).save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(place)
    return place


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of two classes, of all sizes."""
    rng = np.random.default_rng(0)
    for number in range(12):
        place = (
            tmp_path / "pictures" / ("cat" if number % 2 else "red_dog") / f"{number}.{'png' if number % 3 else 'jpg'}"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        size = rng.integers(20, 90, 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(place)
    return tmp_path / "pictures"


# -- the inner maximisation ------------------------------------------------------------------------------------------


def test_the_worst_case_of_a_linear_loss_is_the_corner():
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(rng.standard_normal((2, 3, 8, 8)).astype(np.float32))
    clean = torch.from_numpy(rng.random((2, 3, 8, 8), np.float32))
    found = worst_case(lambda pixels: (weights * pixels).sum((1, 2, 3)), clean, EPS, 4, rng)
    assert torch.allclose(found, (clean + EPS * weights.sign()).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("eps", [EPS, 0.5])
def test_the_worst_case_stays_in_the_ball_and_among_pictures(eps):
    rng = np.random.default_rng(1)
    clean = torch.from_numpy(rng.random((2, 3, 8, 8), np.float32))
    found = worst_case(lambda pixels: (7 * pixels).sin().sum((1, 2, 3)), clean, eps, 3, rng)
    assert (found - clean).abs().max() <= eps + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad


# -- what is minimised -----------------------------------------------------------------------------------------------


def test_fare_is_over_what_the_language_model_is_given(trained, scene_source, tmp_path):
    """Read off the projector's input, in float32."""
    model, _ = trained
    subject = robust_models.load("tiny-llava")
    trainer = RobustTrainer(RobustRecipe("fare", **QUICK), subject, scene_source, tmp_path)
    pixels, _ = trainer.batch()
    given = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with torch.no_grad():
        model.get_image_features(pixel_values=2 * pixels - 1)
        seen = trainer.features(subject.original, pixels)
    hook.remove()
    assert seen.shape == (4, 64, 192)
    assert torch.allclose(seen, given[0].reshape(seen.shape), atol=1e-4)


@pytest.mark.parametrize(("tokens", "count"), [("class", 1), ("all", 65), ("read", 64)])
def test_tokens_of_the_loss(tokens, count, scene_source, tmp_path):
    subject = robust_models.load("tiny-llava")
    trainer = RobustTrainer(RobustRecipe("fare", **{**QUICK, "tokens": tokens}), subject, scene_source, tmp_path)
    pixels, _ = trainer.batch()
    with torch.no_grad():
        seen = trainer.features(subject.original, pixels)
        whole = subject.original(2 * pixels - 1)
    assert seen.shape[1] == count
    expected = {"class": whole.pooler_output[:, None], "all": whole.last_hidden_state}
    if tokens in expected:
        assert torch.allclose(seen, expected[tokens], atol=1e-4)
    assert robust_models.load("tiny-clip").reader("read").tokens == "class"


def test_fares_loss_is_the_sum_of_squared_distances_from_the_original(scene_source, tmp_path):
    subject = robust_models.load("tiny-llava")
    trainer = RobustTrainer(RobustRecipe("fare", **QUICK), subject, scene_source, tmp_path)
    clean, labels = trainer.batch()
    loss = trainer.loss_of(clean, labels)
    with torch.no_grad(), trainer.autocast():
        assert loss(clean).abs().max() == 0  # the copy is the original until it is trained
        other = loss(clean.flip(0))
        moved = (trainer.features(subject.tower, clean.flip(0)) - trainer.features(subject.original, clean)).flatten(1)
    assert torch.allclose(other, moved.square().sum(1), rtol=1e-3)


def test_tecoas_loss_is_that_of_the_dual_encoder(labelled_source, tmp_path):
    """CLIPModel's own logits per picture, whatever its tower."""
    subject = robust_models.load("tiny-clip")
    trainer = RobustTrainer(RobustRecipe("tecoa", **QUICK), subject, labelled_source, tmp_path)
    clean, labels = trainer.batch()
    from lmms_smoothguard.tiny.clip_model import class_prompts

    tokens = subject.processor(text=class_prompts(), padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = subject.model(**tokens, pixel_values=2 * clean - 1).logits_per_image
        assert torch.allclose(trainer.logits(subject.original, clean), theirs, atol=1e-3)
        found = trainer.loss_of(clean, labels)(clean)
    assert torch.allclose(found, torch.nn.functional.cross_entropy(theirs, labels, reduction="none"), atol=1e-3)
    assert (theirs.argmax(1) == labels).float().mean() >= 0.5  # labels are the pictures' own


@pytest.mark.parametrize("method", ["fare", pytest.param("tecoa", marks=pytest.mark.slow)])
def test_training_lowers_the_loss_under_attack_and_leaves_the_original_alone(
    method, scene_source, labelled_source, tmp_path
):
    subject = robust_models.load("tiny-llava" if method == "fare" else "tiny-clip")
    before = {name: value.clone() for name, value in subject.original.state_dict().items()}
    source = scene_source if method == "fare" else labelled_source
    recipe = RobustRecipe(method, steps=10, inner_steps=2, batch=8, lr=4e-4)
    trainer = RobustTrainer(recipe, subject, source, tmp_path)
    clean, labels = trainer.batch()
    loss = trainer.loss_of(clean, labels)

    def attacked():
        rng = np.random.default_rng(3)
        return loss(worst_case(loss, clean, EPS, 4, rng)).mean().item()

    first = attacked()
    list(trainer.run())
    assert attacked() < 0.75 * first
    assert all(torch.equal(before[name], value) for name, value in subject.original.state_dict().items())
    assert not torch.equal(before["pre_layrnorm.weight"], subject.tower.state_dict()["pre_layrnorm.weight"])


# -- killed, resumed -------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_where_an_unbroken_one_ends(scene_source, tmp_path):
    """Bit by bit: broken off between two checkpoints, and again right after one."""

    def trainer(place):
        return RobustTrainer(RobustRecipe("fare", **QUICK), robust_models.load("tiny-llava"), scene_source, place)

    whole = trainer(tmp_path / "whole")
    assert not whole.resume()
    losses = dict(whole.run(checkpoint_every=2))
    for last in (3, 4):
        broken = trainer(tmp_path / "broken")
        broken.resume()
        for step, _ in broken.run(checkpoint_every=2):
            if step == last:
                break
    resumed = trainer(tmp_path / "broken")
    assert resumed.resume()
    assert 0 < resumed.step < 6
    assert all(losses[step] == loss for step, loss in resumed.run(checkpoint_every=2))
    ours, theirs = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_other_settings_model_or_data_is_refused(scene_source, tmp_path):
    def trainer(model="tiny-llava", source=scene_source, **changed):
        return RobustTrainer(RobustRecipe("fare", **(QUICK | changed)), robust_models.load(model), source, tmp_path)

    trainer().save()
    assert trainer().resume()
    other = pictures.SceneSource(make_scenes(8, 702).images, None, "8 scenes")
    for kwargs, differing in (({"eps": 0.01}, "eps"), ({"model": "tiny-clip"}, "model"), ({"source": other}, "data")):
        with pytest.raises(ConfigError, match=rf"another recipe \({differing} differ"):
            trainer(**kwargs).resume()


def test_every_picture_comes_once_before_any_comes_twice(tmp_path):
    """Six steps of four out of 13: two epochs of three batches each."""
    images = np.arange(13, dtype=np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    source = pictures.SceneSource(images, None, "flat")
    trainer = RobustTrainer(
        RobustRecipe("fare", **{**QUICK, "noised_share": 0.0}), robust_models.load("tiny-llava"), source, tmp_path
    )
    seen = []
    for trainer.step in range(6):
        seen.append((trainer.batch()[0][:, 0, 0, 0] * 255).round().int().tolist())
    for epoch in (seen[:3], seen[3:]):
        assert len({value for batch in epoch for value in batch}) == 12
    assert seen[:3] != seen[3:]


# -- the command, folders, bad input ---------------------------------------------------------------------------------


def test_fare_on_a_folder_of_pictures_from_the_command_line(bare_tower, folder, tmp_path):
    from transformers import CLIPImageProcessor, CLIPVisionModel

    command = ["train", "fare", "--model", str(bare_tower), "--data", str(folder), "--out", str(tmp_path / "out"),
               "--steps", "3", "--inner-steps", "2", "--batch", "4", "--checkpoint-every", "2"]  # fmt: skip
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    model = tmp_path / "out" / "model"
    tower, info = CLIPVisionModel.from_pretrained(model, output_loading_info=True)
    assert tower.dtype == torch.float16
    assert not any(info.values())
    assert CLIPImageProcessor.from_pretrained(model).crop_size["height"] == 32
    card, stated = (model / "README.md").read_text(), json.loads((model / "figures.json").read_text())
    assert "the class token" in card
    assert str(tmp_path) not in card + json.dumps(stated)
    (clean, attacked) = stated["figures"].values()
    assert clean["before"]["value"] == pytest.approx(1)
    assert attacked["before"]["value"] < 1
    # Started again, there is nothing left to train, and the same tower comes out.
    weights = load_file(model / "model.safetensors")
    shutil.rmtree(model)
    again = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "going on from" in again.stdout
    assert all(torch.equal(value, load_file(model / "model.safetensors")[name]) for name, value in weights.items())


def test_folders_are_split_and_labelled(folder):
    train, held_out = pictures.folder_sources(folder, labelled=True)
    assert (len(train), len(held_out)) == (11, 1)
    assert train.classes == ("cat", "red_dog")
    assert set(train._paths).isdisjoint(held_out._paths)
    for path, label in zip(train._paths, train.labels(range(11)).tolist(), strict=True):
        assert path.parent.name == train.classes[label]


def test_class_prompts_of_folders_read_like_words():
    subject = robust_models.load("tiny-clip")
    found = class_embeddings(subject, ("red_circle", "orange_star"))
    own = class_embeddings(subject, OBJECTS)
    assert torch.equal((found @ own.T).argmax(1), torch.tensor([0, 28]))
    assert torch.allclose((found @ own.T).amax(1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("changed", [{"eps": 0.0}, {"eps": -0.1}, {"eps": float("nan")}, {"eps": 2.0}, {"steps": 0},
                                     {"inner_steps": 0}, {"batch": 0}, {"lr": 0.0}, {"noised_share": 1.5},
                                     {"method": "far"}])  # fmt: skip
def test_recipes_that_cannot_be_meant(changed):
    name, value = next(iter(changed.items()))
    with pytest.raises(ConfigError, match=rf"{name} is {value!r}; expected"):
        RobustRecipe(**{"method": "fare", **QUICK, **changed})


def test_radii_are_read_as_people_write_them():
    assert radius("4/255") == 4 / 255
    assert radius("0.03") == 0.03
    for text in ("4/0", "four", ""):
        with pytest.raises(ConfigError, match="expected a number or a fraction"):
            radius(text)


def test_data_that_cannot_be_used(folder, tmp_path, bare_tower):
    with pytest.raises(ConfigError, match="expected 'scenes' or a folder"):
        pictures.folder_sources(tmp_path / "nowhere", labelled=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has 0 pictures; expected more, in files that end in \.png"):
        pictures.folder_sources(tmp_path / "empty", labelled=False)
    with pytest.raises(ConfigError, match="<class>/<picture>"):
        pictures.folder_sources(folder / "cat", labelled=True)
    subject = robust_models.load(str(bare_tower))
    train, _ = pictures.folder_sources(folder, labelled=False)
    with pytest.raises(ConfigError, match="11 pictures are fewer than one batch of 32"):
        RobustTrainer(RobustRecipe("fare"), subject, train, tmp_path)
    torn = train._paths[0]
    torn.write_bytes(torn.read_bytes()[:40])
    with pytest.raises(ConfigError, match=f"{torn.name} is no picture that can be read"):
        train.pictures([0])


def test_models_without_the_right_tower(tmp_path, labelled_source, scene_source):
    from transformers import SiglipConfig

    SiglipConfig().save_pretrained(tmp_path / "siglip")
    with pytest.raises(
        ConfigError, match="no CLIP-type vision tower: its vision tower is of type 'siglip_vision_model'"
    ):
        robust_models.load(str(tmp_path / "siglip"))
    with pytest.raises(ConfigError, match="its config names no vision tower"):
        robust_models.load(str(MODEL_DIR.parent / "guard"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        robust_models.load(str(tmp_path / "nowhere"))
    llava = robust_models.load("tiny-llava")
    with pytest.raises(ConfigError, match="has no text tower; TeCoA expects a dual encoder"):
        RobustTrainer(RobustRecipe("tecoa", **QUICK), llava, labelled_source, tmp_path)
    with pytest.raises(ConfigError, match="the pictures have no classes"):
        RobustTrainer(RobustRecipe("tecoa", **QUICK), robust_models.load("tiny-clip"), scene_source, tmp_path)
    with pytest.raises(ConfigError, match="expected one of read, class, all"):
        llava.reader("patches")


def test_errors_of_the_command_line_say_what_to_mend(tmp_path):
    with pytest.raises(ConfigError, match=r"eps is 0\.0; expected a radius"):
        CliRunner().invoke(app, ["train", "fare", "--eps", "0", "--out", str(tmp_path)], catch_exceptions=False)


def test_what_is_written_is_rounded_to_half_precision(tmp_path):
    subject = robust_models.load("tiny-llava")
    with torch.no_grad():
        for parameter in subject.tower.parameters():
            parameter.add_(1e-5)
    returned = export(subject, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    exact, rounded = subject.tower.state_dict(), returned.state_dict()
    name = "embeddings.position_embedding.weight"
    assert not torch.equal(exact[name], rounded[name])
    assert torch.equal(exact[name].half().float(), rounded[name])


# -- what is shipped -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["fare", "tecoa"])
def shipped(request):
    """Name, directory, and the tower as transformers loads it, in float32."""
    from transformers import CLIPVisionModel

    place = MODEL_DIR.parent / request.param
    return request.param, place, CLIPVisionModel.from_pretrained(place, dtype=torch.float32).eval()


def test_shipped_towers_load_and_are_small(shipped):
    from transformers import AutoImageProcessor

    name, place, tower = shipped
    assert (place / "model.safetensors").stat().st_size <= 3_300_000
    assert tower.config.hidden_size == 192
    sizes = AutoImageProcessor.from_pretrained(place)
    assert (sizes.crop_size["height"], list(sizes.image_mean)) == (64, [0.5] * 3)
    done = CliRunner().invoke(app, ["model", f"tiny-{name}"])
    assert done.stdout.strip() == str(place)


def test_the_shipped_fare_tower_keeps_the_answers_of_the_llava():
    """Clean, and on twelve questions under an attack on itself; the figures of the card are the slow test's."""
    from transformers import CLIPVisionModel

    tower = CLIPVisionModel.from_pretrained(MODEL_DIR.parent / "fare", dtype=torch.float32).eval()
    found = llava_rates(tower, EPS, 12)
    assert found["LLaVA, existence"].hits >= 11
    assert found["LLaVA, asr, PGD-40"].value <= 0.5  # its own tower's is 0.93


@pytest.mark.slow
def test_shipped_figures_are_the_cards(shipped):
    name, place, tower = shipped
    stated, card = json.loads((place / "figures.json").read_text())["figures"], (place / "README.md").read_text()
    for title, figure in llava_rates(tower, EPS, 420).items():
        assert figure.count >= 300
        assert stated[title]["after"]["value"] == pytest.approx(figure.value, abs=0.015), title
        assert f"| {title} |" in card
    if name == "fare":
        assert stated["LLaVA, existence"]["after"]["value"] >= 0.95
        assert stated["LLaVA, asr, PGD-40"]["after"]["high"] < stated["LLaVA, asr, PGD-40"]["before"]["low"]
