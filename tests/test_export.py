"""Exported generation code: defends in a process that imports nothing of ours, and is never defended twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import hf_integration
from lmms_smoothguard.cli import app
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.export import write_export
from lmms_smoothguard.serving import choice_of
from lmms_smoothguard.tiny.model import MODEL_DIR

SETTINGS = [
    "sigma=2.0",
    "noise_space=pixel",
    "num_samples=4",
    "include_clean=false",
    "seed=5",
]  # nothing is seen of the picture
DEFENSE = choice_of("smoothguard", SETTINGS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory of generation code alone, and one with the model around it."""
    places = tmp_path_factory.mktemp("code") / "guarded", tmp_path_factory.mktemp("model") / "guarded_llava"
    write_export(places[0], DEFENSE)
    write_export(places[1], DEFENSE, str(MODEL_DIR))
    return places


def test_without_an_import_of_ours(exported, llava, batch, tmp_path):
    """In a process of its own, both ways: the answers are those of this process, and plain ones are left alone."""
    model, _ = llava
    inputs = batch(0, 1, 2, question="Describe the image.")
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    code, whole = map(str, exported)
    program = f"""
import json, sys, torch
from transformers import AutoModelForImageTextToText
inputs = torch.load({str(tmp_path / "inputs.pt")!r})
few = dict(max_new_tokens=16, do_sample=False)
model = AutoModelForImageTextToText.from_pretrained({str(MODEL_DIR)!r}).eval()
found = {{"before": model.generate(**inputs, **few).tolist()}}
assert "hf_integration" not in sys.modules
found["code"] = model.generate(**inputs, **few, custom_generate={code!r}, trust_remote_code=True).tolist()
found["after"] = model.generate(**inputs, **few).tolist()
guarded = AutoModelForImageTextToText.from_pretrained({whole!r}, trust_remote_code=True).eval()
found["whole"] = guarded.generate(**inputs, **few).tolist()
found["asked plainly"] = guarded.generate(**inputs, **few, smoothguard=False).tolist()
out = guarded.generate(**inputs, **few, return_dict_in_generate=True)
found["candidates"] = len(out.smoothguard[0].candidates)
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    plain = model.generate(**inputs, max_new_tokens=16, do_sample=False, smoothguard=False).tolist()
    defended = model.generate(**inputs, max_new_tokens=16, do_sample=False, smoothguard=DEFENSE).tolist()
    assert plain != defended
    assert found["before"] == found["after"] == found["asked plainly"] == plain
    assert found["code"] == found["whole"] == defended
    assert found["candidates"] == 4


def test_beside_the_override_nothing_is_defended_twice(exported, llava, batch):
    model, _ = llava
    inputs, code = batch(0), str(exported[0])
    ways = {"custom_generate": code, "trust_remote_code": True}
    for asked, candidates in (({}, 4), ({"smoothguard": {"num_samples": 3}}, 3)):
        with hf_integration.observe() as seen:
            out = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, **ways, **asked)
        assert (seen.defended, len(out.smoothguard[0].candidates)) == (1, candidates)
    with hf_integration.observe() as seen:
        model.generate(**inputs, max_new_tokens=4, **ways, smoothguard=False)
    assert seen.defended == 0  # it asked for none


def test_a_model_with_it_inside_loads_beside_the_override(exported, batch):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(exported[1], trust_remote_code=True).eval()
    model.generation_config.smoothguard = {"num_samples": 2}  # of which other generation code would be refused
    out = model.generate(**batch(0), max_new_tokens=4, return_dict_in_generate=True)
    assert len(out.smoothguard[0].candidates) == 4


def test_inputs_without_a_name_are_taken(exported, batch):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(exported[1], trust_remote_code=True).eval()
    inputs = dict(batch(0))
    named = model.generate(**inputs, max_new_tokens=4)
    ids = inputs.pop("input_ids")
    out = model.generate(ids, **inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert len(out.smoothguard[0].candidates) == 4
    assert torch.equal(out.sequences, named)
    assert torch.equal(
        model.generate(ids, **inputs, max_new_tokens=4, smoothguard=False),
        type(model).generate(model, ids, **inputs, max_new_tokens=4, smoothguard=False),
    )


def test_what_a_call_names_changes_single_settings(exported, llava, batch):
    """And None is not given: the exported defence stands."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(exported[1], trust_remote_code=True).eval()
    hf_integration.attach(model, llava[1])
    model.generation_config.smoothguard = None
    few = {"max_new_tokens": 16, "return_dict_in_generate": True}
    inputs = batch(0, question="Describe the image.")
    asked, same, none = (
        model.generate(**inputs, **few, smoothguard=value).smoothguard[0].candidates
        for value in ({"num_samples": 3}, True, None)
    )
    assert len(same) == 4
    assert same == none
    assert asked == same[:3]  # noise of the exported sigma and seed


def test_a_call_from_within_another_is_defended_where_it_names_the_defence(exported, batch):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(exported[1], trust_remote_code=True).eval()
    asked = []

    def ask(ids, scores, **kwargs):
        if not asked:
            asked.append(None)
            out = model.generate(**batch(1), max_new_tokens=2, smoothguard=True, return_dict_in_generate=True)
            asked[0] = len(out.smoothguard[0].candidates)
        return torch.zeros(len(ids), dtype=torch.bool)

    with hf_integration.observe() as seen:
        model.generate(**batch(0), max_new_tokens=2, stopping_criteria=[ask])
    assert (asked, seen.defended) == ([4], 2)


LOADING = """
import sys, torch
from transformers import AutoModelForImageTextToText
inputs = torch.load({inputs!r})
few = dict(max_new_tokens=2, return_dict_in_generate=True)
load = lambda where, **how: AutoModelForImageTextToText.from_pretrained(where, **how).eval()
load({whole!r}, trust_remote_code=True).save_pretrained({again!r})
assert "hf_integration" not in sys.modules
print([hasattr(load(where).generate(**inputs, **few), "smoothguard") for where in ({whole!r}, {again!r})])
import hf_integration
print([len(load(where).generate(**inputs, **few).smoothguard[0].candidates) for where in ({whole!r}, {again!r})])
"""


def test_loaded_without_its_code_or_saved_again_it_is_defended_where_the_override_is(exported, batch, tmp_path):
    torch.save(dict(batch(0)), tmp_path / "inputs.pt")
    program = LOADING.format(
        inputs=str(tmp_path / "inputs.pt"), whole=str(exported[1]), again=str(tmp_path / "saved_again")
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["[False, False]", "[4, 4]"]


def test_the_generation_config_keeps_its_fields_and_where_there_was_none_the_models_own(tmp_path):
    """Fields in a model's config are heeded by transformers only where there is no generation config."""
    from transformers import AutoModelForImageTextToText

    source = tmp_path / "source"
    shutil.copytree(MODEL_DIR, source)
    file, config = source / "generation_config.json", json.loads((source / "config.json").read_text())
    file.write_text(json.dumps({"eos_token_id": [2, 7], "top_k": 13, "mine": "kept", "smoothguard": False}))
    write_export(tmp_path / "kept", DEFENSE, str(source))
    kept = json.loads((tmp_path / "kept" / file.name).read_text())
    assert kept == {"eos_token_id": [2, 7], "top_k": 13, "mine": "kept", "smoothguard": DEFENSE.to_dict()}

    file.unlink()
    (source / "config.json").write_text(json.dumps(config | {"num_beams": 2, "repetition_penalty": 1.5}))
    write_export(tmp_path / "made", DEFENSE, str(source))
    before, after = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("source", "made"))
    derived = {"smoothguard": DEFENSE.to_dict(), "_from_model_config": False}
    assert after.generation_config.to_dict() == before.generation_config.to_dict() | derived
    assert after.generation_config.num_beams == 2

    file.write_text("[]")
    with pytest.raises(ConfigError, match=r"generation_config\.json is unreadable"):
        write_export(tmp_path / "bad", DEFENSE, str(source))


def test_requests_without_pictures_are_plain(exported, llava):
    model, processor = llava
    inputs = processor.tokenizer("Is there a red circle?", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    ways = {"custom_generate": str(exported[0]), "trust_remote_code": True}
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **ways), plain)


def test_the_command_says_when_a_model_is_undefended(tmp_path):
    found = CliRunner().invoke(app, ["export", str(tmp_path / "code")])
    assert "UNDEFENDED" not in found.output
    found = CliRunner().invoke(app, ["export", str(tmp_path / "whole"), "--model", str(MODEL_DIR)])
    assert found.exit_code == 0
    assert "without trust_remote_code=True" in found.output
    assert "UNDEFENDED" in found.output
    assert "hf_integration" in found.output


def test_what_defends_nothing_is_not_written(tmp_path):
    for setting in ("num_samples=1", "sigma=0"):
        found = CliRunner().invoke(app, ["export", str(tmp_path / "new"), "--set", setting])
        assert isinstance(found.exception, ConfigError)
        assert not (tmp_path / "new").exists()


def test_what_is_written_is_fresh_and_complete(tmp_path):
    found = CliRunner().invoke(app, ["export", str(tmp_path / "new"), "--set", "sigma=0.2"])
    assert found.exit_code == 0
    assert "trust_remote_code=True" in found.output
    spaces: dict = {}
    exec((tmp_path / "new" / "custom_generate" / "generate.py").read_text(), spaces)
    assert spaces["SETTINGS"]["sigma"] == 0.2
    assert spaces["SETTINGS"]["seed"] is None  # strangers are served with it
    assert (tmp_path / "new" / "custom_generate" / "requirements.txt").read_text() == "lmms-smoothguard\n"
    with pytest.raises(ConfigError, match="there already"):
        write_export(tmp_path / "new", DEFENSE)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        write_export(tmp_path / "other", DEFENSE, str(tmp_path / "new"))
