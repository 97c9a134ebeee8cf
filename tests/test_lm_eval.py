"""lm-eval on the embedded model: its own evaluation around our model and tasks, and the same samples through lmms-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from launching import on_two
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from lmms_smoothguard.errors import AttackError, ConfigError, UndefendableError
from lmms_smoothguard.harness.lm_eval import registering
from lmms_smoothguard.tiny.model import MODEL_DIR

DEFENSE = {"sigma": 0.2, "noise_space": "pixel", "num_samples": 4}
registering.register()


def evaluated(tasks, tmp_path, *, model=registering.MODEL, limit=3, manager=None, **arguments):
    import lm_eval.evaluator

    if model == registering.MODEL:
        arguments = {"attack_cache": str(tmp_path / "attacks")} | arguments
    more = {"use_cache": arguments.pop("use_cache")} if "use_cache" in arguments else {}
    return lm_eval.evaluator.simple_evaluate(
        model=model, model_args={"pretrained": str(MODEL_DIR), **arguments}, tasks=tasks, limit=limit, batch_size=1,
        bootstrap_iters=0, apply_chat_template=True, log_samples=True,
        device="cpu", task_manager=manager or TaskManager(include_defaults=False, include_path=str(registering.TASKS)), **more,
    )  # fmt: skip


def told(results, task):
    return [sample["smoothguard"] for sample in results["samples"][task]]


@pytest.fixture(scope="module")
def wrapper():
    return get_model(registering.MODEL)(pretrained=str(MODEL_DIR), **DEFENSE)


def request(media, task="a task", kind="generate_until"):
    return Instance(kind, {"answer": "yes"}, ("<image>Is it?", {"until": []}, *media), 0, (task, 0, 1))


# -- results -----------------------------------------------------------------------------------------------------------


def test_the_same_samples_fare_alike_in_both_harnesses(tmp_path):
    """Prompts, clean answers, adversarial pictures, copies and verdicts: only the harness around them is another."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.evaluator import simple_evaluate
    from managers import task_manager

    task, attack = "shapes_pope_pgd", {"attack_steps": 12, "attack_cache": tmp_path / "theirs"}
    ours = evaluated([task], tmp_path, attack_steps=12, **DEFENSE)
    arguments = ",".join(f"{key}={value}" for key, value in {"pretrained": MODEL_DIR, **DEFENSE, **attack}.items())
    theirs = simple_evaluate(
        model="smoothguard_llava", model_args=arguments, tasks=[task], limit=3, batch_size=1, bootstrap_iters=0,
        task_manager=task_manager("smoothguard_llava"),
    )  # fmt: skip
    other = [sample["token_counts"][0] for sample in theirs["samples"][task]]
    for mine, its in zip(told(ours, task), other, strict=True):
        for field in ("attack_key", "attack_linf", "clean_answer", "candidates", "labels", "agreement"):
            assert mine[field] == its[field], field
    for metric in ("pope_accuracy", "asr", "asr_low", "asr_high", "asr_count", "recovery", "attack_left_out"):
        assert ours["results"][task][f"{metric},none"] == theirs["results"][task][f"{metric},none"], metric
    assert ours["smoothguard_attacks"] == theirs["smoothguard_attacks"]


def test_an_undefended_attack_succeeds_and_the_clean_twin_does_not_suffer(tmp_path):
    found = evaluated(["shapes_pope", "shapes_pope_pgd_eps8"], tmp_path, defense="none")
    attacked, clean = found["results"]["shapes_pope_pgd_eps8"], found["results"]["shapes_pope"]
    assert clean["pope_accuracy,none"] == 1.0
    assert attacked["asr,none"] == 1.0
    assert attacked["asr_count,none"] == 3
    assert attacked["pope_accuracy,none"] == 0.0
    for info in told(found, "shapes_pope_pgd_eps8"):
        assert 0 < info["attack_linf"] <= 8 / 255 + 1e-6
        assert info["attack"]["steps"] == 40
        assert "candidates" not in info  # undefended
    assert all("attack" not in info for info in told(found, "shapes_pope"))


def test_without_a_defence_answers_are_those_of_the_stock_model(tmp_path):
    """Of both tasks, and the stock model's results have nothing of ours in them."""
    ours = evaluated(["shapes_pope", "shapes_caption"], tmp_path, defense="none")
    stock = evaluated(["shapes_pope", "shapes_caption"], tmp_path, model="hf-multimodal")
    for task in ("shapes_pope", "shapes_caption"):
        assert [s["resps"] for s in ours["samples"][task]] == [s["resps"] for s in stock["samples"][task]]
        assert all("smoothguard" not in sample for sample in stock["samples"][task])
        assert ours["results"][task] == stock["results"][task]
    assert "smoothguard_attacks" not in stock


def test_an_attack_asked_for_in_the_models_arguments(tmp_path):
    """On a task that knows of none: away from the model's own answer, with the rates of any task."""
    found = evaluated(
        ["shapes_caption"], tmp_path, limit=2, defense="none", attack="pgd", attack_eps="16/255", attack_steps=20
    )
    summary = found["smoothguard_attacks"]["shapes_caption"]
    assert summary["attacked"] == 2
    assert summary["answer_changed"]["value"] == 1.0
    assert found["results"]["shapes_caption"]["answer_changed,none"] == 1.0


def test_pope_itself_on_a_miniature(tmp_path):
    """The task's own prompt and scoring; only the data are ours, in POPE's own schema."""
    import datasets

    from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path

    stored = datasets.load_dataset("parquet", data_files=str(tasks_path() / "shapes/data/pope.parquet"), split="train")
    stored.select(range(2)).to_parquet(tmp_path / "mini.parquet")
    (tmp_path / "mini.yaml").write_text(
        f"include: {registering.TASKS}/pope_pgd.yaml\ntask: mini\ndataset_path: parquet\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n    adversarial: {tmp_path}/mini.parquet\n"
    )
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    found = evaluated(["mini"], tmp_path, manager=manager, defense="none", attack_steps=2)
    sample = found["samples"]["mini"][0]
    assert "\nAnswer the question using a single word or phrase." in sample["arguments"][0][0]
    assert {f"{metric},none" for metric in ("pope_accuracy", "pope_yes_ratio", "asr", "asr_count", "recovery")} <= set(
        found["results"]["mini"]
    )


def test_scores_of_two_attacked_tasks_on_the_same_documents_are_not_mixed_up(tmp_path):
    """A scorer is handed the document alone, and both tasks have the same ones."""
    found = evaluated(["shapes_pope_pgd", "shapes_pope_pgd_eps8"], tmp_path, limit=1, defense="none", attack_steps=30)
    keys = [told(found, task)[0]["attack_key"] for task in ("shapes_pope_pgd", "shapes_pope_pgd_eps8")]
    assert keys[0] != keys[1]
    assert set(found["smoothguard_attacks"]) == {"shapes_pope_pgd", "shapes_pope_pgd_eps8"}


# -- names -------------------------------------------------------------------------------------------------------------


def test_our_tasks_add_to_those_that_are_there_and_a_users_own_go_first(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(f"include: {registering.TASKS}/shapes_pope.yaml\ntask: shapes_caption\n")
    monkeypatch.setattr(TaskManager, "__init__", TaskManager.__init__)  # is put back
    before = TaskManager(include_defaults=False)
    assert not before.all_tasks
    registering.add_tasks()
    registering.add_tasks()
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    assert {"shapes_pope", "shapes_pope_pgd", "pope_adv", "pope_eot_random"} <= set(manager.all_tasks)
    assert manager.task_index["shapes_caption"].yaml_path.parent == tmp_path


def test_every_task_asks_for_an_attack_that_its_name_tells_of():
    from lm_eval.tasks._yaml_loader import load_yaml

    from lmms_smoothguard.harness.lm_eval.attacking import METADATA
    from lmms_smoothguard.harness.options import Options

    options = Options(None, {}, Path(), 1)
    for path in registering.TASKS.glob("*.yaml"):
        config = load_yaml(path)
        assert config["task"] == path.stem
        asked = options.attack_on({"attack": config["metadata"].get(METADATA)})
        names = path.stem.split("_")
        attacks = [name for name in ("pgd", "apgd", "eot", "square") if name in names]
        assert (asked is not None) == bool(attacks), path
        if asked is not None:
            assert asked.settings.name == attacks[0].replace("eot", "pgd")
            assert asked.settings.eot == (8 if attacks == ["eot"] else 0)
            assert asked.label in ("answer", "caption")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["a path in the stock command", "a name in ours"])
def test_the_whole_way_on_the_command_line(way, tmp_path):
    module = "lm_eval" if way.startswith("a path") else "lmms_smoothguard.lm_eval"
    task = str(registering.TASKS / "shapes_pope_pgd.yaml") if module == "lm_eval" else "shapes_pope_pgd"
    command = [
        sys.executable, "-m", module, "run", "--model", registering.MODEL, "--apply_chat_template", "--limit", "2",
        "--model_args", f"pretrained={MODEL_DIR},sigma=0.2,noise_space=pixel,num_samples=4,attack_steps=3",
        "--tasks", task, "--log_samples", "--output_path", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for metric in ("pope_accuracy", "asr_count", "attack_left_out"):
        assert metric in done.stdout
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [len(line["smoothguard"]["candidates"]) for line in lines] == [4, 4]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Unequal shares of five samples, one of them padded by lm-eval: answers, pictures, votes and rates."""

    def run(name, *launcher):
        command = [
            sys.executable, *launcher, "-m", "lmms_smoothguard.lm_eval", "run", "--model", registering.MODEL, "--limit", "5",
            "--model_args", f"pretrained={MODEL_DIR},sigma=0.2,noise_space=pixel,num_samples=3,attack_steps=3,"
            f"attack_cache={tmp_path}/{name}-cache", "--apply_chat_template", "--tasks", "shapes_pope_pgd", "--log_samples",
            "--output_path", str(tmp_path / name),
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (results,) = (tmp_path / name).rglob("results_*.json")
        (samples,) = (tmp_path / name).rglob("samples_*.jsonl")
        told = json.loads(results.read_text())
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        for row in rows:
            row.pop("doc_hash")  # of the picture's address in memory: another one in every run
            for field in ("seconds", "attack_seconds"):
                row["smoothguard"].pop(field)
        return told["results"], told["smoothguard_attacks"], sorted(rows, key=lambda row: row["doc_id"])

    two = run("two", *on_two("torchrun"))
    assert two == run("one")
    assert len(two[2]) == 5


@pytest.mark.slow
def test_a_bad_value_is_said_on_the_command_line():
    command = [
        sys.executable, "-m", "lmms_smoothguard.lm_eval", "run", "--model", registering.MODEL, "--tasks", "shapes_pope",
        "--model_args", f"pretrained={MODEL_DIR},num_samples=0",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("num_samples is 0; expected")


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["sigam", "atack_eps", "num_sample", "attack_step"])
def test_a_misspelt_argument_is_refused_before_the_model_is_loaded(key):
    with pytest.raises(ConfigError, match=key):
        get_model(registering.MODEL)(pretrained="no such model", **{key: 1})


def test_likelihoods_are_refused(wrapper):
    with pytest.raises(UndefendableError, match=r"loglikelihood request \(a task\) cannot be defended"):
        wrapper.loglikelihood([request((), kind="loglikelihood")])
    with pytest.raises(UndefendableError, match="loglikelihood_rolling"):
        wrapper.loglikelihood_rolling([request((), kind="loglikelihood_rolling")])


def test_sounds_and_what_is_no_picture_are_refused(wrapper):
    with pytest.raises(UndefendableError, match=r"a task\[0\] has 1 sounds"):
        wrapper.generate_until([request(({"visual": [], "audio": [object()]},))])
    with pytest.raises(AttackError, match="has a str among its pictures; expected PIL images"):
        wrapper.generate_until([request(({"visual": ["a.png"]},))])


def test_an_answer_that_went_around_generate_is_refused(wrapper, images, monkeypatch):
    from lm_eval.models.hf_vlms import HFMultimodalLM

    monkeypatch.setattr(HFMultimodalLM, "generate_until", lambda self, requests, disable_tqdm: ["Yes"])
    with pytest.raises(UndefendableError, match="without a defended generate"):
        wrapper.generate_until([request(({"visual": [images[0]]},))])


def test_a_row_without_a_picture_needs_no_defence(wrapper, monkeypatch):
    """Its `visual` is there and empty, as in tasks that mix."""
    from lm_eval.models.hf_vlms import HFMultimodalLM

    monkeypatch.setattr(HFMultimodalLM, "generate_until", lambda self, requests, disable_tqdm: ["Yes"])
    assert wrapper.generate_until([request(({"visual": []},))]) == ["Yes"]


def test_an_error_inside_of_the_defence_surfaces(wrapper, images, monkeypatch):
    from lmms_smoothguard.defenses import Request

    def broken(*args, **kwargs):
        raise UndefendableError("a copy is lost")

    monkeypatch.setattr(Request, "copies", broken, raising=False)
    monkeypatch.setattr("lmms_smoothguard.noise.NoiseSource.copies", broken)
    with pytest.raises((UndefendableError, RuntimeError), match="a copy is lost"):
        wrapper.generate_until([request(({"visual": [images[0]]},))])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{name: pgd, label: anwser}", "has no field 'anwser', the attack's label"),
        ("{name: pgd, target_field: image}", "in its field 'image', the attack's target_field; expected a text"),
        ("{name: universal, corpus: a.json}", "universal pictures"),
        ("7", "metadata.attack is 7"),
    ],
)
def test_a_task_that_asks_for_what_cannot_be_is_refused(tmp_path, line, said):
    (tmp_path / "bad.yaml").write_text(
        f"include: {registering.TASKS}/shapes_pope.yaml\ntask: bad\nmetadata:\n  version: 1.0\n  smoothguard_attack: {line}\n"
    )
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    with pytest.raises((AttackError, ConfigError), match=said):
        evaluated(["bad"], tmp_path, manager=manager, limit=1, defense="none")


@pytest.mark.parametrize("task, arguments", [
    ("shapes_pope_pgd", {"defense": "none"}), ("shapes_pope", {"sigma": 0.2}), ("shapes_pope", {"defense": "none", "vision_tower": "tiny-fare"}),
])  # fmt: skip
def test_answers_of_a_cache_are_refused_where_its_key_does_not_tell_them_apart(tmp_path, task, arguments):
    cache = str(tmp_path / "answers")
    evaluated(["shapes_pope"], tmp_path, limit=1, use_cache=cache, defense="none")  # plain answers may be kept
    with pytest.raises(ConfigError, match="--use_cache"):
        evaluated([task], tmp_path, limit=1, use_cache=cache, **arguments)


def test_rows_without_a_picture_are_left_out_and_counted(wrapper, images):
    from lmms_smoothguard.harness.lm_eval.attacking import attack
    from lmms_smoothguard.harness.options import take_options

    options = take_options({"attack": "pgd", "attack_steps": 1})
    asked = [request(({"visual": []},))]
    (made,) = attack(wrapper.model, wrapper.processor, asked, {"a task": {}}, options, None, True).values()
    assert made.info["attack_left_out"] == "no image"
    assert made.outcome("Yes").left_out == "no image"
