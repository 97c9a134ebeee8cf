"""Runs spread over two processes, through lmms-eval's own command line, against the same run in one."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from launching import on_two, ranks
from managers import task_manager

pytest.importorskip("lmms_eval")

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.objective import answer_ids
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import choose
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.harness import sharding
from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.noise import NoiseSource
from lmms_smoothguard.reproducible import reproducible_sums
from lmms_smoothguard.tiny.model import MODEL_DIR

PER_RUN = {"seconds", "attack_seconds"}


def arguments(**given):
    common = {"pretrained": MODEL_DIR, "num_samples": 3, "sigma": 0.2, "noise_space": "pixel", "attack_steps": 3}
    return ",".join(f"{key}={value}" for key, value in (common | given).items())


def launch(tmp_path, runs, kind="torchrun"):
    """Starts lmms-eval on two processes; `runs` go one after the other, each {tasks, limit, model_args, output_path}."""
    config = tmp_path / "runs.yaml"
    config.write_text(yaml.safe_dump([{"model": "smoothguard_llava", "log_samples": True, **run} for run in runs]))
    command = [sys.executable, *on_two(kind), "-m", "lmms_eval", "--config", str(config)]
    with open(tmp_path / "log", "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        )


def finish(process, tmp_path, timeout=240):
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail("the processes wait for each other: " + (tmp_path / "log").read_text()[-3000:])
    return code, (tmp_path / "log").read_text()


def written(out, task):
    """(results, samples in order of their documents) of a run's own files, without what differs from run to run."""
    results = json.loads(next(Path(out).rglob("*_results.json")).read_text())["results"][task]
    lines = next(Path(out).rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
    samples = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    kept = [
        {
            "doc": sample["doc_id"],
            "answer": sample["filtered_resps"],
            "scores": {key: sample[key] for key in sample if key.startswith(("asr", "pope", "recovery"))},
            "info": {key: value for key, value in sample["token_counts"][0].items() if key not in PER_RUN},
        }
        for sample in samples
    ]
    return results, kept


def alone(tmp_path, task, limit, model_args):
    """The same run in this one process, and its files."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker(output_path=str(tmp_path))
    command_line = argparse.Namespace(reasoning_tags='[["<think>", "</think>"]]', process_with_media=True)
    found = simple_evaluate(
        model="smoothguard_llava", model_args=model_args, tasks=[task], limit=limit, batch_size=1, cli_args=command_line,
        task_manager=task_manager(), evaluation_tracker=tracker, datetime_str="now",
    )  # fmt: skip
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples, datetime_str="now")
    tracker.save_results_samples(task_name=task, samples=samples[task])
    return written(tmp_path, task)


def pictures(cache):
    """{file name: digest} of all adversarial images."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(cache).rglob("*.png")}


def whole_entries(cache):
    """Keys of the attacks that the cache vouches for; fails on a damaged one."""
    records = [path for path in Path(cache).rglob("*.json") if "images" in json.loads(path.read_bytes())]
    assert all(AttackCache(Path(cache)).get(path.stem) is not None for path in records)
    return {path.stem for path in records}


def same_as_alone(tmp_path, kind, name="two", extra=()):
    """Five attacked samples on two processes: three and two."""
    run = {
        "tasks": "shapes_pope_pgd",
        "limit": 5,
        "model_args": arguments(attack_cache=tmp_path / name),
        "output_path": str(tmp_path / "out"),
    }
    code, log = finish(launch(tmp_path, [run, *extra], kind), tmp_path)
    assert code == 0, log[-3000:]
    assert "Running on rank 1" in log
    one = alone(tmp_path / "one", "shapes_pope_pgd", 5, arguments(attack_cache=tmp_path / "cache"))
    assert len(one[1]) == 5
    results = json.loads(next((tmp_path / "out").rglob("*_results.json")).read_text())
    assert results["smoothguard_attacks"]["shapes_pope_pgd"]["attacked"] == 5  # of both processes
    assert written(tmp_path / "out", "shapes_pope_pgd") == one
    assert len(pictures(tmp_path / "cache")) == 5
    assert pictures(tmp_path / name) == pictures(tmp_path / "cache")
    assert whole_entries(tmp_path / name) == whole_entries(tmp_path / "cache")
    return log


def test_torchrun_gives_what_one_process_gives(tmp_path):
    """Unequal shares, a process without any sample, another defence from the same cache, and no attack at all."""
    cache = tmp_path / "two"
    others = {
        "lonely": ("shapes_pope_pgd", 1, arguments(attack_cache=cache, attack_steps=2, defense="none")),
        "clean": ("shapes_safety", 3, arguments(defense="none", attack_cache=cache)),
    }
    extra = [
        {"tasks": task, "limit": limit, "model_args": args, "output_path": str(tmp_path / name)}
        for name, (task, limit, args) in others.items()
    ]
    log = same_as_alone(tmp_path, "torchrun", name="first", extra=extra)
    assert "Building contexts for shapes_pope_pgd on rank 1" in log
    assert "Traceback" not in log
    for name, (task, limit, args) in others.items():
        aside = args.replace(str(cache), str(tmp_path / f"{name} cache"))
        assert written(tmp_path / name, task) == alone(tmp_path / f"{name} alone", task, limit, aside)
    assert len(pictures(cache)) == 1
    assert pictures(cache) == pictures(tmp_path / "lonely cache")
    bars = [
        line for line in log.replace("\r", "\n").splitlines() if line.startswith(("crafting", "answering", "clean"))
    ]
    assert bars
    assert not [bar for bar in bars if "crafting 2" in bar]  # the second process's share


@pytest.mark.slow
def test_accelerate_gives_what_one_process_gives(tmp_path):
    same_as_alone(tmp_path, "accelerate")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("again", ["one process", "two processes"])
def test_a_killed_process_ends_the_run_and_the_next_goes_on(tmp_path, again):
    cache, limit = tmp_path / "cache", 8
    settings = {"attack_steps": 80, "attack_batch_size": 1, "defense": "none"}
    run = {
        "tasks": "shapes_pope_pgd", "limit": limit, "model_args": arguments(attack_cache=cache, **settings),
        "output_path": str(tmp_path / "out"),
    }  # fmt: skip
    process = launch(tmp_path, [run])
    deadline = time.monotonic() + 200
    while len(list(cache.rglob("*.png"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(ranks(process)[1], signal.SIGKILL)
    code, log = finish(process, tmp_path, 60)
    assert code != 0
    assert "SIGKILL" in log

    before = whole_entries(cache)
    assert 0 < len(before) < limit
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*.png") if path.stem[:-2] in before}
    assert len(stamps) == len(before)
    if again == "two processes":
        code, log = finish(launch(tmp_path, [run]), tmp_path)
        assert code == 0, log[-3000:]
        resumed = written(tmp_path / "out", "shapes_pope_pgd")
    else:
        resumed = alone(tmp_path / "out", "shapes_pope_pgd", limit, run["model_args"])
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # none was made again
    fresh = arguments(attack_cache=tmp_path / "fresh", **settings | {"attack_batch_size": 32})
    assert resumed == alone(tmp_path / "one", "shapes_pope_pgd", limit, fresh)
    assert pictures(cache) == pictures(tmp_path / "fresh")
    assert len(whole_entries(cache)) == limit


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["doc_to_visual", "process_results"])
def test_one_process_that_fails_ends_the_others(tmp_path, broken):
    """lmms-eval prints the exception and exits with 0: the launcher would take that for a run that went well."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/utils.py").write_text(
        "import os\n"
        "from lmms_smoothguard.tasks.shapes import utils\n"
        "def sometimes(own):\n"
        "    def call(*args, **kwargs):\n"
        "        if os.environ['RANK'] == '1': raise RuntimeError('this share is broken')\n"
        "        return own(*args, **kwargs)\n"
        "    return call\n"
        "doc_to_visual = sometimes(utils.doc_to_visual)\n"
        "process_results = sometimes(utils.pope_process_results)\n"
    )
    (tmp_path / "tasks/broken.yaml").write_text(
        f"include: {tasks_path()}/shapes/_pope_template\n"
        "task: broken\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tasks_path()}/shapes/data/pope.parquet\n"
        f"{broken}: !function utils.{broken}\n"
    )
    run = {"tasks": "broken", "limit": 4, "model_args": arguments(defense="none"), "output_path": str(tmp_path / "out")}
    code, log = finish(launch(tmp_path, [run | {"include_path": str(tmp_path / "tasks")}]), tmp_path, 120)
    assert "this share is broken" in log
    assert "rank 1 failed" in log
    assert code != 0


def test_an_exception_stays_one_in_a_run_of_one_process(monkeypatch):
    with pytest.raises(ZeroDivisionError), sharding.all_or_none():
        raise ZeroDivisionError
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left, sharding.all_or_none():
        raise ZeroDivisionError
    assert left.value.code == 1


def test_a_sharded_run_takes_leave_of_its_process_group_while_python_runs(monkeypatch):
    """gloo's threads, left to the interpreter's end, abort a process now and then whose work is done."""
    from lmms_eval import evaluator

    last_calls = []
    monkeypatch.setattr("atexit.register", last_calls.append)
    monkeypatch.setattr(evaluator, "evaluate", lambda: "evaluated")
    sharding.guard_evaluator()
    assert not last_calls  # a run of one process has nobody to leave
    monkeypatch.setenv("WORLD_SIZE", "2")
    sharding.guard_evaluator()
    assert evaluator.evaluate() == "evaluated"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for call in last_calls * 2:  # a group that is gone already is nothing to end
            call()
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# -- why shards can craft on their own ---------------------------------------------------------------------------------


@pytest.fixture
def strangers(trained, scenes, images, batch):
    """Jobs whose prompts and answers have several lengths."""
    _, processor = trained

    def make(**settings):
        made = []
        for n in range(6):
            inputs = dict(batch(n, question="Describe the image." if n == 2 else None))
            text = "A red circle and a blue star." if n in (2, 5) else "Yes"
            answer = tuple(answer_ids(processor.tokenizer, inputs["input_ids"][0].tolist(), text))
            made.append(Job(AttackSettings(**settings), (images[n],), inputs, answer))
        assert len({(job.inputs["input_ids"].shape[1], len(job.answer)) for job in made}) >= 4
        return made

    return make


@pytest.mark.parametrize("eot", [0, 3])
def test_an_image_is_a_function_of_its_job_alone(trained, strangers, tmp_path, eot):
    """Alone, in a batch of strangers, in another order and on more threads; so are the figures in its record."""
    model, processor = trained
    jobs = strangers(steps=4 if eot else 10, eot=eot)
    defense = choose(SmoothGuardConfig(sigma=0.2, noise_space="pixel"))

    def craft(name, listed, **kwargs):
        cache = AttackCache(tmp_path / name)
        return Crafter(model, processor.image_processor, cache, defense, quiet=True, **kwargs).craft(listed)

    threads = torch.get_num_threads()
    together = craft("together", jobs)
    ways = {
        "alone": [craft(f"alone {n}", [job])[0] for n, job in enumerate(jobs)],
        "reversed": craft("reversed", jobs[::-1], batch_size=2 * max(1, eot))[::-1],
        "shards": [entry for pair in zip(craft("0", jobs[::2]), craft("1", jobs[1::2]), strict=True) for entry in pair],
    }
    torch.set_num_threads(2)
    try:
        ways["threads"] = craft("threads", jobs)
    finally:
        torch.set_num_threads(threads)
    for way, entries in ways.items():
        for n, (entry, other) in enumerate(zip(entries, together, strict=True)):
            assert (entry.images[0] == other.images[0]).all(), (way, n)
            assert entry.record | {"seconds": 0} == other.record | {"seconds": 0}, (way, n)


def test_eot_draws_differ_between_samples_and_steps(trained, strangers, tmp_path, monkeypatch):
    """Two rows of a batch, two slots, two steps: every draw is another one, and none is the defence's own."""
    from lmms_smoothguard.noise import randomness as module

    model, processor = trained
    drawn = []
    add_noise = module.add_noise
    monkeypatch.setattr(
        module, "add_noise", lambda values, noise, *rest: drawn.append(noise) or add_noise(values, noise, *rest)
    )
    first, *_, fifth = strangers(steps=2, eot=2)[:5]
    text = processor(images=[*first.images, *fifth.images], text="<image><image> Same?", return_tensors="pt")
    jobs = [
        Job(
            first.settings,
            pair,
            dict(processor(images=list(pair), text="<image><image> Same?", return_tensors="pt")),
            first.answer,
        )
        for pair in ((*first.images, *first.images), (*fifth.images, *first.images))
    ]
    assert all(job.inputs["input_ids"].shape == text["input_ids"].shape for job in jobs)
    defense = choose(SmoothGuardConfig(sigma=0.2))
    Crafter(model, processor.image_processor, AttackCache(tmp_path), defense, quiet=True).craft(jobs)
    monkeypatch.setattr(module, "add_noise", add_noise)
    assert len(drawn) == 2 * 2 * 2 * 2
    assert len({noise.numpy().tobytes() for noise in drawn}) == len(drawn)
    images = find_images(text, model.config)
    source = NoiseSource(images, sigma=1.0, statistics=None, seed=defense.config.seed)
    for number in range(1, 10):
        for own in source.copy(number) - images.values:
            assert min(float((own - noise).abs().mean()) for noise in drawn) > 0.5


def test_deterministic_kernels_are_asked_for_and_given_back(trained, strangers, tmp_path, monkeypatch):
    from lmms_smoothguard.attacks.pgd import PGD

    model, processor = trained
    run, seen = PGD.run, []

    def watched(*args, **kwargs):
        filling = torch.utils.deterministic.fill_uninitialized_memory
        seen.append((torch.are_deterministic_algorithms_enabled(), filling))
        return run(*args, **kwargs)

    monkeypatch.setattr(PGD, "run", watched)
    Crafter(model, processor.image_processor, AttackCache(tmp_path), quiet=True).craft(strangers(steps=1)[:1])
    assert seen == [(True, False)]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # torch's own default


def test_sums_are_reproducible_unless_the_user_wants_other_ones(monkeypatch):
    monkeypatch.delenv("MKL_CBWR")
    reproducible_sums()
    assert os.environ["MKL_CBWR"] == "AUTO,STRICT"
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    reproducible_sums()
    assert os.environ["MKL_CBWR"] == "COMPATIBLE"
