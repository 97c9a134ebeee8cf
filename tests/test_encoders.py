"""Another vision tower in a LLaVA: features are those of the source's own library, what does not fit is refused, and a refusal
leaves the model as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import shutil

import pytest
import torch
from hub_stand_in import COMMIT, served
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES
from tiny_models.architecture import NORMALISED, PATCH, SIDE, VISION

from lmms_smoothguard.encoders import load_vision_tower, sources
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.fingerprint import model_fingerprint

WIDTH, HEADS, LAYERS = VISION["hidden_size"], VISION["num_attention_heads"], VISION["num_hidden_layers"]
EMBED_DIM = 24


def llava(name="llava", **vision):
    """A tiny LLaVA whose tower's config has been changed so."""
    model, processor = ARCHITECTURES[name].build()
    if vision:
        config = copy.deepcopy(model.config)
        for key, value in vision.items():
            setattr(config.vision_config, key, value)
        model = type(model)(config).eval()
    return model, processor


@pytest.fixture
def pair():
    return llava()


def scaled(module, seed=1):
    """Random weights of a size that shows every part of the arithmetic, layer norms' too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def open_clip_model(quick_gelu=True, size=SIDE, **vision):
    from open_clip.model import CLIP

    config = {
        "image_size": size, "layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH,
        "mlp_ratio": 2.0, **vision,
    }  # fmt: skip
    text = {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    model = CLIP(EMBED_DIM, config, text, quick_gelu=quick_gelu)
    return scaled(model), {"embed_dim": EMBED_DIM, "quick_gelu": quick_gelu, "vision_cfg": config, "text_cfg": text}


PREPROCESSED = {
    "mean": NORMALISED["image_mean"], "std": NORMALISED["image_std"], "interpolation": "bicubic", "resize_mode": "shortest",
}  # fmt: skip


def save_open_clip(directory, model, config, preprocess=PREPROCESSED, file="open_clip_model.safetensors"):
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / file)
    whole = {"model_cfg": config} | ({} if preprocess is None else {"preprocess_cfg": preprocess})
    (directory / "open_clip_config.json").write_text(json.dumps(whole))
    return directory


def vision_model(seed=1, **changes):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return scaled(CLIPVisionModel(CLIPVisionConfig(**{**VISION, **changes})), seed)


def save_tower(directory, tower=None, processor=None, **kwargs):
    (vision_model() if tower is None else tower).save_pretrained(directory, **kwargs)
    if processor is not None:
        processor.image_processor.save_pretrained(directory)
    return directory


def rewritten(directory, change, file="model.safetensors"):
    """Its tensors changed in place by `change(tensors)`."""
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file)
    return directory


def pixels(size=SIDE):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))


def state(model, processor):
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return whole, json.dumps(model.config.to_dict(), sort_keys=True, default=str), repr(processor.to_dict())


def same(before, after):
    tensors = before[0].keys() == after[0].keys() and all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    return tensors and before[1:] == after[1:]


def tower_equals(model, reference):
    # Names differ between transformers' versions: the order of parameters does not.
    ours, theirs = model.model.vision_tower.parameters(), reference.parameters()
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


# -- open_clip ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_an_open_clip_towers_features_are_open_clips_own(tmp_path, quick_gelu):
    source, config = open_clip_model(quick_gelu)
    model, processor = llava(hidden_act="quick_gelu" if quick_gelu else "gelu")
    provenance = load_vision_tower(model, str(save_open_clip(tmp_path / "it", source, config)), processor)
    with torch.no_grad():
        tokens = source.visual.transformer(source.visual._embeds(pixels()))
        pooled = source.visual(pixels())
        ours = model.model.vision_tower(pixels())
    assert torch.allclose(ours.last_hidden_state, tokens, atol=1e-5)
    assert torch.allclose(ours.pooler_output @ source.visual.proj, pooled, atol=1e-5)
    other = open_clip_model(not quick_gelu)[0]
    with torch.no_grad():
        assert not torch.allclose(tokens, other.visual.transformer(other.visual._embeds(pixels())), atol=1e-2)
    assert (provenance.source, provenance.format, provenance.warnings) == ("it", "open_clip", ())
    assert provenance.sha256 == sources_digest(tmp_path / "it/open_clip_model.safetensors")
    assert {"logit_scale", "visual.proj", "text_projection"} <= set(provenance.left_out)
    assert "transformer.* (12 tensors)" in provenance.left_out


def sources_digest(path):
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_a_bare_open_clip_file_is_loaded_with_a_warning(tmp_path, pair, caplog, prefix):
    """Without `visual.` too: that is how FARE's and TeCoA's authors publish the tower alone."""
    model, processor = pair
    source, config = open_clip_model()
    tensors = {f"{prefix}{name}": tensor for name, tensor in source.visual.state_dict().items()}
    save_file(tensors, tmp_path / "fare.safetensors")
    provenance = load_vision_tower(model, str(tmp_path / "fare.safetensors"), processor)
    reference, _ = llava()
    load_vision_tower(reference, str(save_open_clip(tmp_path / "whole", source, config)), processor)
    assert tower_equals(model, reference.model.vision_tower)
    assert provenance.left_out == (f"{prefix}proj",) and len(provenance.warnings) == 2
    assert "how many heads and which activation" in caplog.text and "nothing of its preprocessing" in caplog.text


def test_the_other_name_of_open_clips_weights(tmp_path, pair):
    source, config = open_clip_model()
    save_open_clip(tmp_path, source, config, file="open_clip_pytorch_model.safetensors")
    assert load_vision_tower(pair[0], str(tmp_path), pair[1]).format == "open_clip"


# -- transformers ------------------------------------------------------------------------------------------------------


def clip_model(tower):
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower.config.to_dict(), projection_dim=8))
    for ours, theirs in zip(model.vision_model.parameters(), tower.parameters(), strict=True):
        ours.data = theirs.data
    return model


@pytest.mark.parametrize("kind", ["tower", "shards", "both towers", "half"])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_transformers_towers(tmp_path, kind, name):
    model, processor = llava(name)
    reference = vision_model()
    before = model_fingerprint(model)
    language = model.model.language_model.layers[0].mlp.up_proj.weight.clone()
    if kind == "half":
        reference = reference.half()
    whole = clip_model(reference) if kind == "both towers" else reference
    size = {"max_shard_size": "20KB"} if kind == "shards" else {}
    provenance = load_vision_tower(model, str(save_tower(tmp_path, whole, processor, **size)), processor)
    assert len(list(tmp_path.glob("*.safetensors"))) == (5 if kind == "shards" else 1)
    assert tower_equals(model, reference.float())
    assert torch.equal(language, model.model.language_model.layers[0].mlp.up_proj.weight)
    assert provenance.warnings == () and provenance.format == "transformers" and len(provenance.sha256) == 64
    assert ("text_projection.weight" in provenance.left_out) == (kind == "both towers")
    assert model_fingerprint(model) != before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("also_at_the_top", [False, True])
def test_of_a_trainings_directory_what_it_made_is_taken(tmp_path, pair, also_at_the_top):
    """Unless a tower lies in the directory itself."""
    model, processor = pair
    save_tower(tmp_path / "model", vision_model(seed=2), processor)
    if also_at_the_top:
        save_tower(tmp_path, vision_model(seed=3), processor)
    provenance = load_vision_tower(model, str(tmp_path), processor)
    assert tower_equals(model, vision_model(seed=3 if also_at_the_top else 2))
    assert provenance.source == tmp_path.name


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_tower.vision_model."])
def test_a_bare_transformers_file_by_any_of_its_names(tmp_path, pair, prefix):
    """transformers up to 5.17 saves `vision_model.` before a CLIPVisionModel's names, older ones its position ids too."""
    reference = vision_model()
    short = {name.removeprefix("vision_model."): tensor for name, tensor in reference.state_dict().items()}
    tensors = {f"{prefix}{name}": tensor for name, tensor in short.items()}
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
    tensors["visual_projection.weight"] = torch.zeros(8, WIDTH)
    save_file(tensors, tmp_path / "tower.safetensors")
    provenance = load_vision_tower(pair[0], str(tmp_path / "tower.safetensors"), pair[1])
    assert tower_equals(pair[0], reference)
    assert provenance.left_out == ("visual_projection.weight",) and provenance.kept == ()


def test_a_tower_named_as_before_5_18_is_written_to_as_well(tmp_path, pair):
    model, processor = pair
    inner = model.model.vision_tower

    class Older(type(inner)):  # its parameters' names begin with vision_model.
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.vision_model, self.config = inner, inner.config

    model.model.vision_tower = Older()
    load_vision_tower(model, str(save_tower(tmp_path, vision_model(), processor)), processor)
    assert all(torch.equal(a, b) for a, b in zip(inner.parameters(), vision_model().parameters(), strict=True))


def test_the_same_tower_is_the_same_model(tmp_path, pair):
    model, processor = pair
    save_tower(tmp_path, model.model.vision_tower, processor)
    before, fingerprint = state(model, processor), model_fingerprint(model)
    load_vision_tower(model, str(tmp_path), processor)
    assert same(before, state(model, processor)) and model_fingerprint(model) == fingerprint


def test_what_a_llava_does_not_read_may_be_missing(tmp_path, pair):
    model, processor = pair
    own = model.model.vision_tower.post_layernorm.weight.clone()
    directory = save_tower(tmp_path, vision_model(), processor)
    rewritten(directory, lambda tensors: [tensors.pop(n) for n in list(tensors) if "post_layernorm" in n])
    provenance = load_vision_tower(model, str(directory), processor)
    assert provenance.kept == ("post_layernorm.bias", "post_layernorm.weight")
    assert torch.equal(model.model.vision_tower.post_layernorm.weight, own)


def test_dtype_stays_the_models(tmp_path, pair):
    model, processor = pair[0].bfloat16(), pair[1]
    load_vision_tower(model, str(save_tower(tmp_path, vision_model(), processor)), processor)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert tower_equals(model, vision_model().bfloat16())


def test_without_a_processor_there_is_a_warning(tmp_path, pair):
    provenance = load_vision_tower(pair[0], str(save_tower(tmp_path, vision_model(), pair[1])))
    assert "no processor to hold the preprocessing" in provenance.warnings[0]


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache in the layout of huggingface_hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def cached(repository):
        root = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(COMMIT)
        return root / "snapshots" / COMMIT

    return cached


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_a_hubs_open_clip_repository(hub, pair, prefix):
    save_open_clip(hub("someone/fare2-clip"), *open_clip_model())
    provenance = load_vision_tower(pair[0], f"{prefix}someone/fare2-clip", pair[1])
    assert (provenance.source, provenance.revision, provenance.format) == ("someone/fare2-clip", COMMIT, "open_clip")


def test_a_hubs_transformers_repository(hub, pair):
    save_tower(hub("someone/tower"), clip_model(vision_model()), pair[1])
    provenance = load_vision_tower(pair[0], "someone/tower", pair[1])
    assert tower_equals(pair[0], vision_model()) and provenance.warnings == ()


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """A hub on this machine, and an empty cache."""
    from huggingface_hub import constants, hf_api

    with served(tmp_path / "online") as (address, fetched):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield tmp_path / "online", fetched


def test_a_tower_is_fetched_from_a_hub(online, pair):
    root, fetched = online
    save_open_clip(root / "someone/FARE4-ViT", *open_clip_model())
    (root / "someone/FARE4-ViT/open_clip_pytorch_model.bin").write_bytes(b"a pickle")
    provenance = load_vision_tower(pair[0], "someone/FARE4-ViT", pair[1])
    assert (provenance.source, provenance.revision, provenance.warnings) == ("someone/FARE4-ViT", COMMIT, ())
    assert sorted(fetched) == ["open_clip_config.json", "open_clip_model.safetensors"]


def test_a_hubs_repository_of_pickles_is_refused_without_fetching_them(online, pair):
    """The first robust towers of 2024 are published so, with open_clip_pytorch_model.bin alone."""
    root, fetched = online
    save_open_clip(root / "someone/fare2-clip", *open_clip_model(), file="open_clip_pytorch_model.bin")
    refuse(
        pair,
        "someone/fare2-clip",
        "its weights are open_clip_pytorch_model.bin; expected .safetensors.*convert it once",
    )
    refuse(pair, "someone/nothing", "'someone/nothing', which cannot be had from the hub: 404")
    assert fetched == ["open_clip_config.json"]


def test_a_hub_that_cannot_be_reached_is_not_taken_for_an_empty_one(hub, pair, monkeypatch):
    """Online, a file that is not cached may exist: what it says of preprocessing must not be passed over."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(repository, name):
        raise LocalEntryNotFoundError("cannot find it on disk and the hub does not answer")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)  # it tries for half a minute
    refuse(pair, "someone/tower", "'someone/tower', which cannot be had from the hub: cannot find it")


# -- another resolution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_a_llava_at_its_towers_resolution(tmp_path, pair, pictures, kind):
    """As FARE and TeCoA of 224 pixels were published in a LLaVA of 336."""
    model, processor = pair
    size = 2 * PATCH
    if kind == "open_clip":
        save_open_clip(tmp_path / "it", *open_clip_model(size=size))
    else:
        theirs = copy.deepcopy(processor)
        theirs.image_processor.size, theirs.image_processor.crop_size = (
            {"shortest_edge": size},
            {"height": size, "width": size},
        )
        save_tower(tmp_path / "it", vision_model(image_size=size), theirs)
    with pytest.raises(ConfigError, match=r"image_size 28 x 28.*has 56 x 56.*vision_tower_resolution=source"):
        load_vision_tower(model, str(tmp_path / "it"), processor)
    provenance = load_vision_tower(model, str(tmp_path / "it"), processor, "source")
    assert provenance.image_size == (size, size) and provenance.warnings == ()
    if kind == "transformers":
        with torch.no_grad():
            ours, theirs = model.model.vision_tower(pixels(size)), vision_model(image_size=size)(pixels(size))
        assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    inputs = ARCHITECTURES["llava"].inputs(processor, [(pictures[:1], "What is it?")])
    assert inputs["pixel_values"].shape[-2:] == (size, size)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4 == model.config.image_seq_length
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(again.generate(**inputs, max_new_tokens=4, do_sample=False), answer)
    again_there = load_vision_tower(model, str(tmp_path / "it"), processor, "source")
    assert again_there.image_size is None  # it is the model's own by now


def test_only_a_llava_with_its_processor_takes_another_resolution(tmp_path):
    save_open_clip(tmp_path, *open_clip_model(size=2 * PATCH))
    refuse(llava("llava_next"), str(tmp_path), "there is a llava_next; expected a LLaVA", "source")
    model, processor = llava()
    with pytest.raises(ConfigError, match="no image processor"):
        load_vision_tower(model, str(tmp_path), None, "source")
    refuse((model, processor), str(tmp_path), "did you mean 'source'", "sauce")


# -- refusals ----------------------------------------------------------------------------------------------------------


def refuse(pair, source, message, resolution="model"):
    model, processor = pair
    before, fingerprint = state(model, processor), model_fingerprint(model)
    with pytest.raises(ConfigError, match=message):
        load_vision_tower(model, source, processor, resolution)
    assert same(before, state(model, processor)) and model_fingerprint(model) == fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"hidden_size 64 \(its config\), the model has 32.*expected a tower|Expected a tower"),
        ({"num_hidden_layers": 3}, r"num_hidden_layers 3 \(its config\), the model has 2"),
        ({"num_attention_heads": 4}, r"num_attention_heads 4 \(its config\), the model has 2"),
        ({"intermediate_size": 32}, r"intermediate_size 32 \(its config\), the model has 64"),
        ({"patch_size": 7}, r"patch_size 7 x 7 \(its config\), the model has 14 x 14"),
        ({"image_size": 28}, r"image_size 28 x 28 \(its config\), the model has 56 x 56; patches 2 x 2"),
        ({"hidden_act": "gelu"}, r"hidden_act gelu \(its config\), the model has quick_gelu.*need quick_gelu"),
        ({"layer_norm_eps": 1e-3}, r"layer_norm_eps 0.001 \(its config\), the model has 1e-05"),
    ],
)
def test_another_architecture_is_refused(tmp_path, pair, changes, message):
    refuse(pair, str(save_tower(tmp_path, vision_model(**changes), pair[1])), message)


def test_the_weights_alone_show_another_architecture(tmp_path, pair):
    save_tower(tmp_path, vision_model(num_hidden_layers=1, image_size=28))
    refuse(
        pair, str(tmp_path / "model.safetensors"), r"num_hidden_layers 1 \(its weights\).*patches 2 x 2 \(its weights\)"
    )
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 2, "image_size": 56}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuse(pair, str(tmp_path), r"num_hidden_layers 1 \(its weights\)")


@pytest.mark.parametrize(
    ("quick_gelu", "vision", "message"),
    [
        (False, {}, "hidden_act gelu"),
        (True, {"head_width": 8}, "num_attention_heads 4"),
        (True, {"norm_kwargs": {"eps": 1e-3}}, "layer_norm_eps 0.001"),
        (True, {"ls_init_value": 0.1}, "ls_1.gamma.*no CLIPVisionModel has"),
        (True, {"no_ln_pre": True}, "lacks pre_layrnorm.bias, pre_layrnorm.weight"),
        (False, {"act_kwargs": {"approximate": "tanh"}}, "hidden_act gelu_pytorch_tanh"),
    ],
)
def test_other_towers_of_open_clip_are_refused(tmp_path, pair, quick_gelu, vision, message):
    refuse(pair, str(save_open_clip(tmp_path, *open_clip_model(quick_gelu, **vision))), message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_cfg": {"vision_cfg": {"timm_model_name": "vit_base"}}},
            "whose tower is vit_base; expected a plain CLIP",
        ),
        ({"model_cfg": {"vision_cfg": {"layers": [3, 4, 6, 3]}}}, "a ResNet with layers"),
        ({"model_cfg": {"vision_cfg": {"width": "wide"}}}, "cannot be read"),
        ({"embed_dim": 3}, "no model_cfg.vision_cfg"),
        ([1], "is a list; expected a JSON object"),
    ],
)
def test_configs_of_open_clip_that_are_no_vit(tmp_path, pair, config, message):
    save_open_clip(tmp_path, *open_clip_model())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    refuse(pair, str(tmp_path), message)


POSITION = "embeddings.position_embedding.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("encoder.layers.1.mlp.fc2.bias"), "lacks encoder.layers.1.mlp.fc2.bias; expected all tensors"),
        (lambda t: t.update(extra=torch.zeros(2)), "has extra, which the model's has not; expected none left over"),
        (
            lambda t: t.update({"encoder.layers.0.mlp.fc1.bias": torch.zeros(3)}),
            r"has encoder.layers.0.mlp.fc1.bias of shape \(3,\); expected \(64,\)",
        ),
        (lambda t: t[POSITION].view(-1)[:5].fill_(float("nan")), f"has 5 values in {POSITION} that are not finite"),
        (lambda t: t.update({POSITION: t[POSITION].to(torch.int8)}), "in torch.int8; expected floating point"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, pair, change, message):
    directory = save_tower(tmp_path, vision_model(), pair[1])
    # Names as transformers writes them today; the loader's own renaming has its tests above.
    refuse(pair, str(rewritten(directory, change)), message)


def test_values_that_the_models_dtype_cannot_hold(tmp_path):
    model, processor = llava()
    directory = save_tower(tmp_path, vision_model(), processor)
    rewritten(directory, lambda t: t["encoder.layers.1.mlp.fc2.bias"].view(-1)[:1].fill_(1e6))
    refuse((model.half(), processor), str(directory), "fc2.bias that torch.float16 cannot hold")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_mean": [0.5, 0.5, 0.5]},
            r"mean \(0.5, 0.5, 0.5\), the model's image processor has \(0.45, 0.5, 0.4\)",
        ),
        ({"image_std": [0.2, 0.25, 0.3]}, r"std \(0.2, 0.25, 0.3\), the model"),
        ({"do_normalize": False}, r"mean \(0, 0, 0\)"),
        ({"crop_size": {"height": 28, "width": 28}}, r"size \(28, 28\), the model's image processor has \(56, 56\)"),
        ({"size": {"shortest_edge": 64}}, r"resize_to \(64\), the model's image processor has \(56\)"),
        ({"size": {"height": 56, "width": 56}}, r"resize squash, the model's image processor has shortest"),
        ({"resample": 2}, "interpolation bilinear, the model's image processor has bicubic"),
        ({"do_rescale": False}, "scale 1, the model"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path, pair, changes, message):
    directory = save_tower(tmp_path, vision_model(), pair[1])
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refuse(pair, str(directory), message)
    # The file by itself says nothing of it: the user takes it upon himself.
    assert load_vision_tower(pair[0], str(directory / "model.safetensors"), pair[1]).warnings


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        (PREPROCESSED | {"mean": [0.5] * 3}, r"mean \(0.5, 0.5, 0.5\)"),
        (PREPROCESSED | {"resize_mode": "squash"}, "resize squash"),
        (PREPROCESSED | {"interpolation": "bilinear"}, "interpolation bilinear"),
        (PREPROCESSED | {"size": 28}, r"size \(28, 28\)"),
        ({}, r"mean \(0.4815, 0.4578, 0.4082\)"),  # open_clip then takes OpenAI's
        (PREPROCESSED | {"mean": "grey"}, "preprocess_cfg that cannot be read"),
    ],
)
def test_other_preprocessing_of_open_clip_is_refused(tmp_path, pair, preprocess, message):
    refuse(pair, str(save_open_clip(tmp_path, *open_clip_model(), preprocess)), message)


def test_a_llava_next_cuts_tiles_its_own_way(tmp_path):
    """The tower's centre crop is not the model's; size and statistics still count."""
    _, single = llava()
    model, processor = llava("llava_next")
    single.image_processor.size = {"shortest_edge": 64}
    directory = save_tower(tmp_path, vision_model(), single)
    assert load_vision_tower(model, str(directory), processor).warnings == ()
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    refuse((model, processor), str(directory), "mean")


def test_where_the_source_says_nothing_there_is_a_warning(tmp_path, pair, caplog):
    with caplog.at_level(logging.WARNING):
        provenance = load_vision_tower(pair[0], str(save_open_clip(tmp_path, *open_clip_model(), None)), pair[1])
    assert len(provenance.warnings) == 1 and provenance.warnings[0] in caplog.text


def test_pickled_weights_are_not_read(tmp_path, pair):
    """A pickle that would run code when read."""

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "run"), "w")

    for number, file in enumerate(("open_clip_pytorch_model.bin", "pytorch_model.bin")):
        directory = tmp_path / str(number)
        save_open_clip(directory, *open_clip_model()) if not number else save_tower(directory)
        for weights in directory.glob("*.safetensors"):
            weights.unlink()
        torch.save({"class_embedding": Trap()}, directory / file)
        refuse(pair, str(directory), f"{file}; expected .safetensors, .*convert it once")
        refuse(pair, str(directory / file), "expected weights in .safetensors, .*convert it once")
    torch.save({"class_embedding": Trap()}, tmp_path / "fare_eps_2.pt")
    refuse(pair, str(tmp_path / "fare_eps_2.pt"), "'fare_eps_2.pt'; expected weights in .safetensors")
    torch.save({"class_embedding": Trap()}, tmp_path / "really.safetensors")
    refuse(pair, str(tmp_path / "really.safetensors"), "cannot be read")
    assert not (tmp_path / "run").exists()


def test_what_is_no_tower_is_refused(tmp_path, pair, hub):
    refuse(pair, str(tmp_path / "nowhere.safetensors"), "which does not exist; expected a hub id")
    refuse(pair, "./nowhere", "which does not exist")
    refuse(pair, "", "vision_tower is ''")
    refuse(pair, "nobody/nothing", "no config.json and no open_clip_config.json there; expected")
    refuse(pair, "no/such/id", "cannot be had from the hub")
    (tmp_path / "empty").mkdir()
    refuse(pair, str(tmp_path / "empty"), "no config.json and no open_clip_config.json")
    save_tower(tmp_path / "it", vision_model())
    torn = (tmp_path / "it/model.safetensors").read_bytes()[:-100]
    (tmp_path / "torn.safetensors").write_bytes(torn)
    refuse(pair, str(tmp_path / "torn.safetensors"), "cannot be read")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refuse(pair, str(tmp_path / "other.safetensors"), "no CLIP vision tower.*among weight")
    two = {f"{name}.embeddings.class_embedding": torch.zeros(2) for name in ("a", "b")}
    save_file(two, tmp_path / "two.safetensors")
    refuse(pair, str(tmp_path / "two.safetensors"), "2 vision towers")
    for config, message in (
        ({"model_type": "llava"}, "model_type is 'llava'; expected clip"),
        ({"model_type": "clip_vision_model", "num_attention_heads": "many"}, "is no CLIP's"),
    ):
        (tmp_path / "it/config.json").write_text(json.dumps(config))
        refuse(pair, str(tmp_path / "it"), message)
    (tmp_path / "it/config.json").write_text("{")
    refuse(pair, str(tmp_path / "it"), "config.json cannot be read")


def test_a_shard_that_is_not_there(tmp_path, pair):
    save_tower(tmp_path, vision_model(), pair[1], max_shard_size="20KB")
    shutil.move(tmp_path / "model-00002-of-00005.safetensors", tmp_path / "away")
    refuse(pair, str(tmp_path), "names 'model-00002-of-00005.safetensors', which is not there")


def test_models_without_a_clip_tower_are_refused(tmp_path):
    save_tower(tmp_path)
    looked = "looked for a CLIPVisionModel at model.model.vision_tower and model.vision_tower, found"
    refuse(llava("llava_onevision"), str(tmp_path), f"no CLIP vision tower: {looked} a SiglipVisionModel")
    refuse(llava("qwen2_vl"), str(tmp_path), f"{looked} neither")
    model, processor = llava()
    model.model.vision_tower.to("meta")
    with pytest.raises(ConfigError, match="offloaded"):
        load_vision_tower(model, str(tmp_path), processor)


def test_a_name_of_ours_is_its_directory_or_an_error(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(sources, "EMBEDDED_DIR", tmp_path)
    refuse(pair, "tiny-fare", "'tiny-fare', and this installation has no config.json in lmms_smoothguard/tiny/fare")
    save_tower(tmp_path / "fare", vision_model().half(), pair[1])
    provenance = load_vision_tower(pair[0], "tiny-fare", pair[1])
    assert provenance.source == "tiny-fare" and tower_equals(pair[0], vision_model().half().float())


def test_provenance_is_json_and_has_no_path(tmp_path, pair):
    provenance = load_vision_tower(pair[0], str(save_tower(tmp_path / "it", vision_model(), pair[1])), pair[1])
    text = json.dumps(provenance.to_dict())
    assert str(tmp_path) not in text and json.loads(text) == provenance.to_dict()
    moved = dataclasses.replace(provenance, warnings=("x",), revision="y")
    assert moved.identity() == provenance.identity()
