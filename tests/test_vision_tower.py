"""`vision_tower=` everywhere a model is named: lmms-eval, `Subject`, `smoothguard attack`, `smoothguard sweep`, and in records."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from managers import task_manager
from typer.testing import CliRunner

from lmms_smoothguard.attacking.store import Store
from lmms_smoothguard.boosting.booster import load_booster
from lmms_smoothguard.cli import app
from lmms_smoothguard.encoders import load_vision_tower
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.records import read_run, write_run
from lmms_smoothguard.fingerprint import model_fingerprint
from lmms_smoothguard.smoothing.towers import find_tower
from lmms_smoothguard.subject import Subject
from lmms_smoothguard.tiny.model import MODEL_DIR

pytest.importorskip("lmms_eval")
from lmms_smoothguard.harness.options import explain_leftover, take_options
from lmms_smoothguard.report.logs import run_of_logs

POPE = str(Path(__file__).parent.parent / "tasks/shapes/data/pope.parquet")


@pytest.fixture(scope="module")
def towers(trained, tmp_path_factory):
    """The embedded model's own tower saved elsewhere, and one with a little noise on every weight."""
    from transformers import CLIPVisionModel

    root, (model, processor) = tmp_path_factory.mktemp("towers"), trained
    config = copy.deepcopy(model.config.vision_config)  # saving writes into it
    own, other = CLIPVisionModel(config), CLIPVisionModel(config)
    own.load_state_dict(model.model.vision_tower.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), own.parameters(), strict=True):
            mine.copy_(theirs + 0.02 * theirs.std() * torch.randn(theirs.shape, generator=generator))
    for name, tower in (("own", own), ("other", other)):
        tower.save_pretrained(root / name)
        processor.image_processor.save_pretrained(root / name)
    return {name: str(root / name) for name in ("own", "other")}


# -- lmms-eval ---------------------------------------------------------------------------------------------------------


def test_lmms_evals_options():
    given = {"pretrained": "x", "vision_tower": "tiny-fare", "vision_tower_resolution": "source"}
    options = take_options(given)
    assert (options.vision_tower, options.vision_tower_resolution) == ("tiny-fare", "source")
    assert given == {"pretrained": "x"}
    assert take_options({"vision_tower": "none"}).vision_tower is None is take_options({}).vision_tower
    with pytest.raises(ConfigError, match="unknown model argument 'vision_towr'; did you mean 'vision_tower'"):
        explain_leftover({"vision_towr": "x"}, ["pretrained"], None)
    theirs = {"vision_tower": "clip"}  # a wrapper's own key, as video_chatgpt has one
    assert take_options(theirs, ["vision_tower"]).vision_tower is None and theirs == {"vision_tower": "clip"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vision_tower": "fare.pt"}, "'fare.pt', which does not exist"),
        ({"vision_tower": "nobody/nothing"}, "no config.json and no open_clip_config.json"),
        ({"vision_tower_resolution": "source"}, "there is no vision_tower"),
        ({"vision_tower": "own", "vision_tower_resolution": "sauce"}, "did you mean 'source'"),
    ],
)
def test_a_tower_that_is_not_there_is_refused_before_the_model_is_loaded(arguments, message):
    from lmms_eval.models import get_model

    with pytest.raises(ConfigError, match=message):
        get_model("smoothguard_llava")(pretrained="/no/model/is/here", **arguments)
    with pytest.raises(ConfigError, match=message):
        Subject("/no/model/is/here", "cpu", **arguments)


def evaluate(tasks, limit, **model_args):
    from lmms_eval.evaluator import simple_evaluate

    arguments = ",".join(f"{key}={value}" for key, value in {"pretrained": MODEL_DIR, **model_args}.items())
    return simple_evaluate(
        model="smoothguard_llava", model_args=arguments, tasks=tasks, limit=limit, batch_size=1, bootstrap_iters=0,
        task_manager=task_manager(),
    )  # fmt: skip


def said(results, task):
    return [sample["filtered_resps"][0] for sample in results["samples"][task]]


def keys(results, task):
    return [sample["token_counts"][0]["attack_key"] for sample in results["samples"][task]]


def test_attacks_on_one_tower_are_not_anothers(towers, trained):
    """A cached adversarial image of the model's own tower must not be asked of another."""
    task, settings = "shapes_caption_pgd", {"defense": "none", "attack_steps": 2}
    plain = evaluate([task], 2, **settings)
    own, other = (evaluate([task], 2, vision_tower=towers[name], **settings) for name in ("own", "other"))
    assert said(own, task) == said(plain, task) and keys(own, task) == keys(plain, task)
    assert not set(keys(other, task)) & set(keys(plain, task))
    assert "smoothguard_vision_tower" not in plain
    assert own["smoothguard_vision_tower"]["model_fingerprint"] == model_fingerprint(trained[0])
    assert other["smoothguard_vision_tower"]["model_fingerprint"] != model_fingerprint(trained[0])
    assert other["smoothguard_vision_tower"]["source"] == "other"


@pytest.mark.slow
def test_the_whole_way_on_the_command_line(towers, tmp_path, trained):
    """The embedded model with its own tower loaded from elsewhere answers as it does without, and the record says so."""
    task = "shapes_caption"
    command = [
        str(Path(sys.executable).parent / "lmms-eval"), "--model", "smoothguard_llava",
        "--model_args", f"pretrained={MODEL_DIR},defense=none,vision_tower={towers['own']}",
        "--tasks", task, "--limit", "4", "--log_samples", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    run = run_of_logs(tmp_path / "out", [task], name="own", about="with its own tower")
    plain = [answer.strip() for answer in said(evaluate([task], 4, defense="none"), task)]
    assert [sample.answer.strip() for sample in run.samples] == plain
    model = read_run(write_run(tmp_path / "results", run.record, run.samples)).record.model
    assert model.fingerprint == model_fingerprint(trained[0])
    assert model.vision_tower is not None and model.vision_tower["source"] == "own"
    assert len(model.vision_tower["sha256"]) == 64 and "model_fingerprint" not in model.vision_tower
    written = (tmp_path / "results/own.json").read_text()
    assert "vision_tower=own" in written and str(Path(towers["own"]).parent) not in written


# -- Subject, attack, sweep ---------------------------------------------------------------------------------------------


def test_a_subject_sees_with_another_tower(towers, trained):
    subject = Subject("tiny-llava", "cpu", vision_tower=towers["other"])
    plain = Subject("tiny-llava", "cpu")
    assert plain.tower is None and subject.tower is not None and subject.tower.source == "other"
    assert subject.fingerprint != plain.fingerprint == model_fingerprint(trained[0])
    assert subject.processing() == plain.processing()


def attack(out, *options):
    command = ["attack", str(MODEL_DIR), POPE, "--out", str(out), "--steps", "1", "--limit", "1", "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_a_booster_of_the_tower_that_was_there_is_refused(towers):
    subject = Subject("tiny-llava", "cpu")
    assert load_booster("psm", find_tower(subject.model)) is load_booster("psm", find_tower(subject.model))
    load_vision_tower(subject.model, towers["other"], subject.processor)
    with pytest.raises(ConfigError, match="psm"):
        load_booster("psm", find_tower(subject.model))


def test_smoothguard_attack_goes_on_with_the_same_tower_alone(towers, tmp_path):
    attack(tmp_path / "out", "--vision-tower", towers["own"])
    stored = json.loads((tmp_path / "out/settings.json").read_text())["settings"]["model"]
    assert set(stored["vision_tower"]) == {"source", "format", "sha256", "image_size"}
    assert "Crafted on llava with the vision tower own for" in (tmp_path / "out/README.md").read_text()
    attack(tmp_path / "out", "--vision-tower", towers["own"])
    for options in ((), ("--vision-tower", towers["other"])):
        with pytest.raises(ConfigError, match=r"holds a run with other settings: .*model\.vision_tower"):
            attack(tmp_path / "out", *options)


def test_a_run_from_before_there_were_towers_goes_on(tmp_path):
    """Its settings say nothing of one: that is the model's own."""
    store = Store(tmp_path / "out")
    store.open({"model": {"name": "x"}}, ["a"], {})
    store.open({"model": {"name": "x", "vision_tower": None}}, ["a"], {})


def test_a_sweep_with_another_tower(towers, tmp_path):
    command = ["sweep", str(MODEL_DIR), POPE, "--out", str(tmp_path / "out"), "--limit", "1", "--sigma", "0,0.1"]
    command += ["--num-samples", "2", "--attack", "none", "--device", "cpu", "--vision-tower", towers["other"]]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out/sweep.json").read_text())
    assert record["model"]["vision_tower"]["source"] == "other"
    assert "--vision-tower other --vision-tower-resolution model" in record["command"]
    assert towers["other"] not in json.dumps(record)
