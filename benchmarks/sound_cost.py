"""What a defended answer about a sound costs: against the plain one, and against the loop of N separate recordings.

python benchmarks/sound_cost.py     # results/sound_cost.json; a minute, leave the machine alone meanwhile
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer

from bench import hardware
from lmms_smoothguard.evaluation.machine import environment
from lmms_smoothguard.harness.questions import find_questions
from lmms_smoothguard.inputs.media import Media, find_media
from lmms_smoothguard.noise import WaveformNoise
from lmms_smoothguard.subject import GREEDY, Subject
from timing.paired import median, ratio, run_paired

RESULTS = Path(__file__).parent / "results"
COPIES, SIGMA = 10, 0.02
PLAIN, OURS, NAIVE, EXTRACTION = "plain", "SmoothGuard, N = 10", "naive loop", "features of nine noisy copies"


def run(
    rounds: Annotated[int, typer.Option(min=1)] = 20,
    warmup: Annotated[int, typer.Option(min=0)] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the order within rounds.")] = 0,
    out: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Measure and write the result file."""
    load = os.getloadavg()[0]
    subject = Subject("tiny-audio", "cpu")
    asked = [subject.inputs(question) for question in find_questions("sounds_pope", limit=rounds)]
    measured: dict[str, Any] = {}
    for tokens in (4, 16):
        tasks = _tasks(subject, asked, {**GREEDY, "max_new_tokens": tokens, "min_new_tokens": tokens})
        seconds = run_paired(tasks, rounds, warmup=warmup, seed=seed).seconds
        against = {OURS: PLAIN, NAIVE: OURS, EXTRACTION: OURS}
        measured[str(tokens)] = {
            name: {
                "seconds": median(taken).to_dict(),
                **({"ratio": ratio(taken, seconds[against[name]]).to_dict(), "to": against[name]} if name in against else {}),
            }
            for name, taken in seconds.items()
        }  # fmt: skip
    result = {
        "name": "sound_cost",
        "command": "python benchmarks/" + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": {**environment(), **hardware("cpu"), "load_before": round(load, 2)},
        "setting": {"copies": COPIES, "audio_sigma": SIGMA, "rounds": rounds, "seed": seed, "clip_seconds": 2.0},
        "model": "tiny-audio",
        "tokens": measured,
    }
    target = out or RESULTS / "sound_cost.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    for tokens, found in measured.items():
        for name, one in found.items():
            above = one.get("ratio")
            said = f", {above['value']:.2f} ({above['low']:.2f}-{above['high']:.2f}) of {one['to']}" if above else ""
            print(f"{tokens} tokens, {name}: {1000 * one['seconds']['value']:.1f} ms{said}")
    print(f"written to {target}")


def _tasks(subject: Subject, asked: Any, settings: Mapping[str, Any]) -> dict[str, Callable[[int], Any]]:
    def task(defense: Any) -> Callable[[int], Any]:
        return lambda number: subject.model.generate(**asked[number], **settings, smoothguard=defense)

    def media(number: int) -> Media:
        found = find_media(asked[number], subject.model.config)
        assert found is not None and found.sounds is not None
        return found

    def noise(number: int) -> WaveformNoise:
        sounds = media(number).sounds
        assert sounds is not None
        return WaveformNoise(sounds, sigma=SIGMA, snr=None, seed=0)

    def naive(number: int) -> None:
        """Ten calls, each with features of its own, as nine recordings and the clean one would be asked about."""
        source = noise(number)
        for copy in range(COPIES):
            inputs = dict(asked[number])
            if copy:
                inputs["input_features"] = source.copies([copy])[0]
            subject.model.generate(**inputs, **settings, smoothguard=False)

    return {
        PLAIN: task(False),
        OURS: task({"audio_sigma": SIGMA, "num_samples": COPIES, "aggregator": "vote"}),
        NAIVE: naive,
        EXTRACTION: lambda number: noise(number).copies(range(1, COPIES)),
    }


if __name__ == "__main__":
    typer.run(run)
