"""Robustness against cost of feature smoothing on the embedded model: over the purifier's size, passes and sigma.

smoothguard train booster --widths 16,32,64 --out runs/booster-small
smoothguard train booster --widths 48,96,128 --out runs/booster-large
python benchmarks/booster_curve.py --booster small=runs/booster-small/booster --booster large=runs/booster-large/booster

The pictures are crafted on the undefended model, once; every point answers the same questions. What an answer costs is counted in
bare passes of the vision tower on this machine (benchmarks/smoothing_cost.py measures whole answers). Started again, it goes on.
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
from lmms_smoothguard.boosting.booster import Booster, load_booster
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.machine import environment
from lmms_smoothguard.evaluation.rates import rate
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.smoothing.context import make_smoother
from lmms_smoothguard.smoothing.towers import find_tower
from lmms_smoothguard.subject import EMBEDDED, Subject
from lmms_smoothguard.tiny.model import prompt
from lmms_smoothguard.tiny.testsets import test_sets

RESULTS = Path(__file__).parent / "results"
_BATCH, _TIMED = 20, 9
Rows = Sequence[dict[str, Any]]


def run(
    booster: Annotated[
        list[str] | None, typer.Option(help="NAME=SOURCE; may be repeated. No booster and psm are always there.")
    ] = None,
    samples: Annotated[str, typer.Option(help="n0, at the main sigma.")] = "2,4,8,16,32",
    sigmas: Annotated[str, typer.Option(help="At the main n0.")] = "0.1,0.2,0.3,0.4",
    main: Annotated[tuple[float, int], typer.Option(help="Sigma and n0 of what is served.")] = (0.3, 8),
    limit: Annotated[int, typer.Option(min=1, help="Questions.")] = 200,
    cache: Annotated[Path, typer.Option()] = Path("runs/results/cache/attacks"),
    out: Annotated[Path, typer.Option()] = RESULTS / "booster_curve.json",
    retime: Annotated[bool, typer.Option(help="Take the costs anew of points that are there.")] = False,
) -> None:
    """Measure every point that the result file does not have, and write it after each: a star around what is served.

    n0 is varied for no booster and for psm, sigma for every booster. A booster that was trained anew is measured anew. Costs want
    a machine that does nothing else: `--retime`.
    """
    subject, sets = Subject(EMBEDDED), test_sets()
    rows, faint = sets["pope"][:limit], sets["pope_faint"][:limit]
    attacked = {eps: crafted(subject, rows, eps, cache) for eps in (4, 8)}
    sources: dict[str, str | None] = {"none": None, "psm": "psm", **dict(map(_named, booster or []))}
    setting = {"questions": limit, "sigma": main[0], "num_samples": main[1]}
    points = _done(out, setting)
    for name, source in sources.items():
        counts = [int(count) for count in samples.split(",")] if name in ("none", "psm") else []
        settings = [(main[0], count) for count in counts] + [(float(sigma), main[1]) for sigma in sigmas.split(",")]
        found = None if source is None else load_booster(source, find_tower(subject.model))
        weights = None if found is None else found.digest
        points = [point for point in points if point["booster"] != name or point["weights"] == weights]
        for sigma, count in dict.fromkeys(settings):
            config = FeatureSmoothingConfig(num_samples=count, sigma=sigma, booster=source)
            key = {"booster": name, "weights": weights, "sigma": sigma, "num_samples": count}
            known = next((point for point in points if key.items() <= point.items()), None)
            if known is not None and retime:
                known["passes"] = _over_plain(subject, rows[0], config)
                _write(out, setting, points)
            if known is not None:
                continue
            right = {
                "clean": _right(subject, rows, [row["image"] for row in rows], config),
                "faint": _right(subject, faint, [row["image"] for row in faint], config),
                **{f"eps{eps}": _right(subject, rows, images, config) for eps, images in attacked.items()},
            }
            parameters = {"parameters": _parameters(found), "passes": _over_plain(subject, rows[0], config)}
            shares = {f"accuracy_{what}": rate(values).figure().to_dict() for what, values in right.items()}
            points.append(key | parameters | shares)
            shown = ", ".join(f"{what} {np.mean(values):.3f}" for what, values in right.items())
            print(f"{name}, sigma {sigma:g}, n0 {count}: {shown}; {parameters['passes']:.1f} plain passes", flush=True)
            _write(out, setting, points)


def _write(out: Path, setting: dict[str, Any], points: Sequence[dict[str, Any]]) -> None:
    told = [word for word in sys.argv[1:] if word != "--retime"]
    result = {
        "name": "booster_curve",
        "command": "python benchmarks/" + shlex.join([Path(sys.argv[0]).name, *told]),
        "setting": setting,
        "environment": {**environment(), **hardware("cpu")},
        "points": list(points),
    }
    out.write_text(json.dumps(result, indent=1) + "\n")


def _done(out: Path, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The points that are there. Raises ConfigError for those of other settings."""
    if not out.exists():
        return []
    found: dict[str, Any] = json.loads(out.read_text())
    if found["setting"] != setting:
        raise ConfigError(f"{out} was measured with {found['setting']}; expected {setting}: take another --out")
    points: list[dict[str, Any]] = found["points"]
    return points


def _named(given: str) -> tuple[str, str]:
    name, equals, source = given.partition("=")
    if not equals:
        raise ConfigError(f"booster is {given!r}; expected NAME=SOURCE, such as small=runs/booster-small/booster")
    return name, source


def crafted(subject: Subject, rows: Rows, eps: int, cache: Path) -> list[np.ndarray]:
    """PGD-40 on the undefended model within eps / 255, of each row (height, width, 3), uint8."""
    jobs = []
    for row in rows:
        inputs = _inputs(subject, [row], [row["image"]])
        ids = answer_ids(subject.tokenizer, inputs["input_ids"][0].tolist(), row["answer"].capitalize())
        jobs.append(Job(AttackSettings(eps=eps / 255), (Image.fromarray(row["image"]),), inputs, tuple(ids)))
    return [entry.images[0] for entry in Crafter(subject.model, subject.processor, AttackCache(cache)).craft(jobs)]


def _inputs(subject: Subject, rows: Rows, images: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    pictures, texts = [Image.fromarray(image) for image in images], [prompt(row["question"]) for row in rows]
    return dict(subject.processor(images=pictures, text=texts, padding=True, return_tensors="pt"))


def _right(subject: Subject, rows: Rows, images: Sequence[np.ndarray], defense: FeatureSmoothingConfig) -> list[bool]:
    found: list[bool] = []
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        inputs = _inputs(subject, part, images[start : start + _BATCH])
        with torch.inference_mode():
            output = subject.model.generate(**inputs, max_new_tokens=3, do_sample=False, smoothguard=defense)
        texts = subject.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [text.strip(" .").lower() == row["answer"] for text, row in zip(texts, part, strict=True)]
    return found


def _over_plain(subject: Subject, row: dict[str, Any], config: FeatureSmoothingConfig) -> float:
    """What one picture costs: time of the smoothed tower over that of a bare pass, medians of alternating rounds."""
    pixels, options = _inputs(subject, [row], [row["image"]])["pixel_values"], {"output_hidden_states": True}
    tower, taken = find_tower(subject.model).module, np.zeros((_TIMED, 2))
    for number in range(_TIMED):
        smoother = make_smoother(subject.model, config, subject.processor.image_processor)
        for place, call in enumerate((tower, smoother)):
            started = time.perf_counter()
            with torch.inference_mode():
                call(pixels, **options)
            taken[number, place] = time.perf_counter() - started
    bare, smoothed = np.median(taken, axis=0)
    return float(smoothed / bare)


def _parameters(booster: Booster | None) -> int:
    parts = [] if booster is None else [booster.purifier, *(booster.mappers or [])]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


if __name__ == "__main__":
    typer.run(run)
