"""Robustness against cost of feature smoothing on the embedded model: over the purifier's size, passes and sigma.

python benchmarks/booster_curve.py --booster small=runs/booster-small/booster --booster psm=psm    # results/booster_curve.json

The pictures are crafted on the undefended model, once; every point answers the same questions. What an answer costs is counted in
encoder and purifier time on this machine (benchmarks/smoothing_cost.py measures whole answers).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import typer
from PIL import Image

from bench import hardware
from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.objective import answer_ids
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import choose
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.machine import environment
from lmms_smoothguard.evaluation.rates import rate
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.smoothing.context import make_smoother
from lmms_smoothguard.subject import EMBEDDED, Subject
from lmms_smoothguard.tiny.model import prompt
from lmms_smoothguard.tiny.testsets import test_sets

RESULTS = Path(__file__).parent / "results"
_BATCH, _TIMED = 20, 5
Rows = Sequence[dict[str, Any]]


def run(
    booster: Annotated[
        list[str] | None, typer.Option(help="NAME=SOURCE; may be repeated. No booster is always there.")
    ] = None,
    samples: Annotated[str, typer.Option(help="n0.")] = "2,4,8,16,32",
    sigmas: Annotated[str, typer.Option()] = "0.1,0.2,0.25",
    limit: Annotated[int, typer.Option(min=1, help="Questions.")] = 200,
    cache: Annotated[Path, typer.Option()] = Path("runs/results/cache/attacks"),
    out: Annotated[Path, typer.Option()] = RESULTS / "booster_curve.json",
) -> None:
    """Measure every point and write the result file."""
    subject, sets = Subject(EMBEDDED), test_sets()
    rows, faint = sets["pope"][:limit], sets["pope_faint"][:limit]
    attacked = {eps: _crafted(subject, rows, eps, cache) for eps in (4, 8)}
    sources: dict[str, str | None] = {"none": None}
    for one in booster or ["psm=psm"]:
        name, equals, source = one.partition("=")
        if not equals:
            raise ConfigError(f"booster is {one!r}; expected NAME=SOURCE, such as psm=psm")
        sources[name] = source
    points = []
    for name, source in sources.items():
        for sigma in map(float, sigmas.split(",")):
            for count in map(int, samples.split(",")):
                config = FeatureSmoothingConfig(num_samples=count, sigma=sigma, booster=source)
                defense = {"defense": "feature_smoothing", "num_samples": count, "sigma": sigma, "booster": source}
                right = {
                    "clean": _right(subject, rows, [row["image"] for row in rows], defense),
                    "faint": _right(subject, faint, [row["image"] for row in faint], defense),
                    **{f"eps{eps}": _right(subject, rows, images, defense) for eps, images in attacked.items()},
                }
                point = {
                    "booster": name,
                    "sigma": sigma,
                    "num_samples": count,
                    "seconds": _seconds(subject, rows[0], config),
                }
                point |= {f"accuracy_{key}": rate(values).figure().to_dict() for key, values in right.items()}
                points.append(point)
                shown = ", ".join(f"{key} {np.mean(values):.3f}" for key, values in right.items())
                print(f"{name}, sigma {sigma:g}, n0 {count}: {shown}; {1000 * point['seconds']:.0f} ms", flush=True)
    parameters = {name: _parameters(subject, source) for name, source in sources.items()}
    result = {
        "name": "booster_curve",
        "command": "python benchmarks/" + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": {**environment(), **hardware("cpu")},
        "parameters": parameters,
        "points": points,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


def _crafted(subject: Subject, rows: Rows, eps: int, cache: Path) -> list[np.ndarray]:
    jobs = []
    for row in rows:
        inputs = _inputs(subject, [row], [row["image"]])
        ids = answer_ids(subject.tokenizer, inputs["input_ids"][0].tolist(), row["answer"].capitalize())
        jobs.append(Job(AttackSettings(eps=eps / 255), (Image.fromarray(row["image"]),), inputs, tuple(ids)))
    return [entry.images[0] for entry in Crafter(subject.model, subject.processor, AttackCache(cache)).craft(jobs)]


def _inputs(subject: Subject, rows: Rows, images: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    pictures, texts = [Image.fromarray(image) for image in images], [prompt(row["question"]) for row in rows]
    return dict(subject.processor(images=pictures, text=texts, padding=True, return_tensors="pt"))


def _right(subject: Subject, rows: Rows, images: Sequence[np.ndarray], defense: dict[str, Any]) -> list[bool]:
    found: list[bool] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        inputs = _inputs(subject, part, images[start : start + _BATCH])
        with torch.inference_mode():
            output = subject.model.generate(**inputs, max_new_tokens=3, do_sample=False, smoothguard=choose(defense))
        texts = subject.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip(" .").lower() == row["answer"] for text, row in zip(texts, part, strict=True)]
    return found


def _seconds(subject: Subject, row: dict[str, Any], config: FeatureSmoothingConfig) -> float:
    """The median time of one picture's smoothed tower."""
    pixels, taken = _inputs(subject, [row], [row["image"]])["pixel_values"], []
    for _ in range(_TIMED):
        smoother = make_smoother(subject.model, config, subject.processor.image_processor)
        started = time.perf_counter()
        with torch.inference_mode():
            smoother(pixels, output_hidden_states=True)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def _parameters(subject: Subject, source: str | None) -> int:
    smoother = make_smoother(
        subject.model, FeatureSmoothingConfig(booster=source, sigma=0.1), subject.processor.image_processor
    )
    if smoother.booster is None:
        return 0
    parts = [smoother.booster.purifier, *(smoother.booster.mappers or [])]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


if __name__ == "__main__":
    typer.run(run)
