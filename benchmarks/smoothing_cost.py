"""What feature smoothing costs: its encoder passes against one bare batch of the tower, and whole answers against plain ones.

python benchmarks/smoothing_cost.py                                                # on the CPU: results/smoothing_cost.json
python benchmarks/smoothing_cost.py --device cuda --model llava-1.5-7b --rounds 5  # on a GPU: results/smoothing_cost_cuda.json
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer

from bench import hardware
from lmms_smoothguard.boosting.booster import EMBEDDED
from lmms_smoothguard.evaluation.machine import environment
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.smoothing.context import make_smoother
from timing import subjects
from timing.paired import median, ratio, run_paired

RESULTS = Path(__file__).parent / "results"
PASSES, SIGMA, TOKENS = (8, 32), 0.3, 4
_SMOOTHGUARD = {"sigma": 0.2, "noise_space": "pixel"}
BATCH = 32
PLAIN, SMOOTHGUARD, BOTH, TOWER = "plain", "SmoothGuard, N = 10", "SmoothGuard + FS", f"tower, one batch of {BATCH}"


def run(
    model: Annotated[str, typer.Option(help="embedded, random-9m or llava-1.5-7b.")] = "embedded",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    warmup: Annotated[int, typer.Option(min=0)] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the order within rounds.")] = 0,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure and write the result file; leave the machine alone meanwhile."""
    started, load = time.perf_counter(), os.getloadavg()[0]
    subject = subjects.load(model, device)
    asked = subjects.requests(subject, rounds, subjects.QUESTIONS)
    boosters: dict[str, dict[str, Any]] = {"FS": {}}
    if model == "embedded":
        boosters |= {"FS + P": {"booster": EMBEDDED[0], "mapper": False}, "FS + P + M": {"booster": EMBEDDED[0]}}
    answers = run_paired(_answers(subject, asked, boosters), rounds, warmup=warmup, seed=seed, device=device).seconds
    towers = run_paired(_towers(subject, asked, boosters), rounds, warmup=warmup, seed=seed, device=device).seconds
    result = {
        "name": "smoothing_cost",
        "command": "python benchmarks/" + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": {**environment(), **hardware(device), "load_before": round(load, 2),
                        "seconds": round(time.perf_counter() - started)},
        "setting": {"sigma": SIGMA, "new_tokens": TOKENS, "rounds": rounds, "seed": seed},
        "model": {"name": model, **subject.facts()},
        "answers": _compared(answers, PLAIN),
        "towers": _compared(towers, TOWER),
    }  # fmt: skip
    target = out or RESULTS / ("smoothing_cost_cuda.json" if device.startswith("cuda") else "smoothing_cost.json")
    target.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in {**result["answers"], **result["towers"]}.items():
        seconds, above = found["seconds"]["value"], found["ratio"]
        print(f"{name}: {1000 * seconds:.1f} ms, {above['value']:.2f} ({above['low']:.2f}-{above['high']:.2f})")
    print(f"written to {target}")


def _answers(subject: Any, asked: Any, boosters: dict[str, dict[str, Any]]) -> dict[str, Callable[[int], Any]]:
    def task(defense: Any) -> Callable[[int], Any]:
        length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        return lambda number: subject.model.generate(**asked[number], **length, smoothguard=defense)

    tasks = {PLAIN: task(False), SMOOTHGUARD: task(_SMOOTHGUARD)}
    for name, booster in boosters.items():
        for passes in PASSES:
            smoothing = {"defense": "feature_smoothing", "num_samples": passes, "sigma": SIGMA}
            tasks[f"{name}, n0 = {passes}"] = task(smoothing | booster)
    both = {"defense": "smoothguard+feature_smoothing", "feature_samples": 8, "feature_sigma": 0.1, **_SMOOTHGUARD}
    tasks[BOTH] = task(both)
    return tasks


def _towers(subject: Any, asked: Any, boosters: dict[str, dict[str, Any]]) -> dict[str, Callable[[int], Any]]:
    """One picture smoothed with as many passes as the bare batch has pictures."""
    kwargs = {"output_hidden_states": True}

    def bare(number: int) -> Any:
        with torch.inference_mode():
            pixels = asked[number]["pixel_values"].expand(BATCH, -1, -1, -1).contiguous()
            return subject.model.model.vision_tower(pixels, **kwargs)

    def task(booster: dict[str, Any]) -> Callable[[int], Any]:
        config = FeatureSmoothingConfig(num_samples=BATCH, sigma=SIGMA, **booster)

        def smoothed(number: int) -> Any:
            with torch.inference_mode():
                smoother = make_smoother(subject.model, config, subject.processor.image_processor)
                return smoother(asked[number]["pixel_values"], **kwargs)

        return smoothed

    return {TOWER: bare} | {f"tower, {name}, n0 = {BATCH}": task(booster) for name, booster in boosters.items()}


def _compared(seconds: dict[str, Any], base: str) -> dict[str, Any]:
    return {
        name: {"seconds": median(taken).to_dict(), "ratio": ratio(taken, seconds[base]).to_dict()}
        for name, taken in seconds.items()
    }


if __name__ == "__main__":
    typer.run(run)
