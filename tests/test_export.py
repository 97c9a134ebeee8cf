"""Exported generation code: defends in a process that imports nothing of ours, and is never defended twice."""

from __future__ import annotations

import json
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


def test_requests_without_pictures_are_plain(exported, llava):
    model, processor = llava
    inputs = processor.tokenizer("Is there a red circle?", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    ways = {"custom_generate": str(exported[0]), "trust_remote_code": True}
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False, **ways), plain)


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
