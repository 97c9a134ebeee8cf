"""What a defended answer costs: `make bench`, or

python benchmarks/bench.py                                                 # on the CPU: results/bench.json
python benchmarks/bench.py --device cuda --model llava-1.5-7b --rounds 5   # on a GPU: results/bench_cuda.json

All variants run in turn in one process (timing/paired.py); peak memory and the parts of an answer's time are measured in
passes of their own.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer

from lmms_smoothguard.evaluation.machine import environment
from timing import memory, parts, streaming, subjects, variants
from timing.paired import Interval, Rounds, median, ratio, run_paired
from timing.table import markdown
from timing.variants import AGAIN, EXACT, NAIVE, OURS, PLAIN, TOKEN, Length

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RATIOS = ((AGAIN, PLAIN), (OURS, PLAIN), (EXACT, PLAIN), (TOKEN, PLAIN), (NAIVE, OURS), (NAIVE, PLAIN))

app = typer.Typer(pretty_exceptions_enable=False)
Threads = Annotated[int | None, typer.Option(min=1, help="torch's threads; by default as many as torch takes.")]


class Case(NamedTuple):
    """A row of the table: requests of one kind, answered at one length."""

    kind: str
    length: Length
    compared: Sequence[str] = (PLAIN, AGAIN, OURS, EXACT, TOKEN, NAIVE)
    sigma: float = variants.SIGMA


class Plan(NamedTuple):
    """How everything is measured."""

    device: str = "cpu"
    rounds: int = 20
    warmup: int = 2
    instrumented: int = 10
    processes: int = 5
    seed: int = 0
    threads: int | None = None


def cases(model: str) -> list[Case]:
    """What is timed on a model."""
    most = Length(128 if model == "llava-1.5-7b" else 32)
    forced = [Case(subjects.MIXED, Length(1)), Case(subjects.MIXED, most)]
    if model != "embedded":
        # Random weights disagree about every noisy copy; without noise they agree, as a trained model does when clean.
        return [*forced, Case(subjects.MIXED, most, (PLAIN, OURS, EXACT), sigma=0.0)]
    own = Length(32, forced=False)
    return [*forced, Case(subjects.QUESTIONS, own), Case(subjects.CAPTIONS, own)]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    model: Annotated[list[str] | None, typer.Option(help="embedded, random-9m, llava-1.5-7b; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of every row.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those, which do not count.")] = 2,
    instrumented_rounds: Annotated[int, typer.Option(min=1, help="Rounds of the pass that times parts.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the order within rounds.")] = 0,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="Result file; by default benchmarks/results/bench.json, or bench_cuda.json.")
    ] = None,
) -> None:
    """Measure what a defended answer costs and write the result file; leave the machine alone meanwhile."""
    if context.invoked_subcommand:
        return
    if threads is not None:
        torch.set_num_threads(threads)
    names = model or ["embedded", "random-9m"]
    target = out or RESULTS / ("bench_cuda.json" if device.startswith("cuda") else "bench.json")
    started, load = time.perf_counter(), os.getloadavg()[0]
    result: dict[str, Any] = {
        "name": "bench",
        "command": "python benchmarks/" + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "environment": {**environment(), **hardware(device)},
        "setting": dict(variants.SETTING),
        "seed": seed,
        "models": {},
        "rows": [],
        "notes": ["a forced length suppresses the end-of-sequence token: texts run on, and copies come apart there"],
    }
    for name in names:
        subject = subjects.load(name, device)
        result["models"][name] = subject.facts()
        print(f"{name}: {result['models'][name]}", flush=True)
        for case in cases(name):
            plan = Plan(device, rounds, warmup, instrumented_rounds, seed=seed, threads=threads)
            result["rows"].append({"model": name, **measure(subject, case, plan)})
        del subject
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    result["environment"] |= {
        "load_before": round(load, 2),  # of other programs: a busy machine shows here
        "seconds": round(time.perf_counter() - started),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    print(f"\nwritten to {target}; notes: {result['notes']}")


def measure(subject: subjects.Subject, case: Case, plan: Plan) -> dict[str, Any]:
    """Every figure of one row of the table, ready for JSON."""
    compared, asked = case.compared, subjects.requests(subject, plan.rounds, case.kind)

    def task(variant: str) -> Any:
        return lambda number: variants.answer(subject, asked[number], variant, case.length, case.sigma)

    tasks = {variant: task(variant) for variant in compared}
    timed = run_paired(tasks, plan.rounds, warmup=plan.warmup, seed=plan.seed, device=plan.device)
    row: dict[str, Any] = {
        "requests": case.kind,
        "new_tokens": case.length.tokens,
        "forced": case.length.forced,
        "sigma": case.sigma,
        "rounds": plan.rounds,
        "seconds": {variant: median(taken).to_dict() for variant, taken in timed.seconds.items()},
        "ratios": {
            f"{above} : {below}": ratio(timed.seconds[above], timed.seconds[below]).to_dict()
            for above, below in RATIOS
            if above in compared and below in compared
        },
        "copies": {variant: found for variant in compared if (found := _copies(timed, variant))},
        "naive_answers_as_smoothguard": _same(timed),
    }
    shown = ", ".join(f"{name} {interval['value']:.2f}" for name, interval in row["ratios"].items())
    print(f"{subject.name}, {case.kind}, sigma {case.sigma:g}, tokens: {case.length}: {shown}", flush=True)
    defended = [variant for variant in (PLAIN, OURS, EXACT, TOKEN) if variant in compared]
    if case.length.forced and case.sigma:
        row["parts"] = {
            variant: parts.measure(subject.model, plan.device, min(plan.instrumented, plan.rounds), tasks[variant])
            for variant in defended
        }
    if case.length.forced and case.sigma and case.length.tokens > 1:
        streamed = [variant for variant in defended if variant != EXACT]
        row["first_token_seconds"] = _first_tokens(subject, asked, streamed, case.length, plan)
        row["memory"] = {variant: _memory(subject, asked[0], variant, case.length, plan) for variant in (PLAIN, OURS)}
    return row


def _copies(timed: Rounds, variant: str) -> dict[str, Any]:
    """What the copies did: without it a time with early stopping says nothing."""
    verdicts = [answer.verdict for answer in timed.answered[variant] if answer.verdict is not None]
    if not verdicts:
        return {}
    used = [verdict.num_samples_used for verdict in verdicts]
    return {
        "num_samples_used": sum(used) / len(used),
        "distinct_answers": sum(len(set(verdict.candidates)) for verdict in verdicts) / len(verdicts),
        "agreement": sum(verdict.agreement for verdict in verdicts) / len(verdicts),
    }


def _same(timed: Rounds) -> float | None:
    if NAIVE not in timed.answered:
        return None
    pairs = zip(timed.answered[NAIVE], timed.answered[OURS], strict=True)
    return sum(naive.ids == ours.ids for naive, ours in pairs) / len(timed.answered[OURS])


def _first_tokens(
    subject: subjects.Subject, asked: Sequence[Any], streamed: Sequence[str], length: Length, plan: Plan
) -> dict[str, Any]:
    """Seconds to the first token of each variant, and its ratio to the plain one's."""

    def task(variant: str) -> Any:
        def first(number: int) -> float:
            streamer = streaming.FirstToken(asked[number]["input_ids"].numel())
            streamer.start()
            variants.answer(subject, asked[number], variant, length, streamer=streamer)
            if streamer.seconds is None:
                raise RuntimeError(f"{variant} streamed no token of {length}; expected at least one")
            return streamer.seconds

        return first

    rounds = max(1, len(asked) // 2)
    tasks = {variant: task(variant) for variant in streamed}
    found = run_paired(tasks, rounds, warmup=1, seed=plan.seed, device=plan.device).answered
    intervals: dict[str, Interval] = {variant: median(seconds) for variant, seconds in found.items()}
    return {
        variant: {**interval.to_dict(), "ratio_to_plain": ratio(found[variant], found[PLAIN]).to_dict()}
        for variant, interval in intervals.items()
    }


def _memory(subject: subjects.Subject, inputs: Any, variant: str, length: Length, plan: Plan) -> dict[str, float]:
    if plan.device.startswith("cuda"):  # what torch allocates there is the same every time
        return memory.above_loaded(
            [memory.on_device(plan.device, lambda: variants.answer(subject, inputs, variant, length))]
        )
    return memory.above_loaded(
        [memory.peak_of(variant, subject.name, length, plan.threads) for _ in range(plan.processes)]
    )


@app.command("memory", hidden=True)
def memory_here(variant: str, model: str, tokens: int, threads: Threads = None) -> None:
    """Print the peak memory of one answer in this process."""
    if threads is not None:
        torch.set_num_threads(threads)
    print(json.dumps(memory.here(variant, model, Length(tokens))))


def hardware(device: str) -> dict[str, Any]:
    """What the machine has beside what `environment` says."""
    found: dict[str, Any] = {"device": device, "torch_threads": torch.get_num_threads(), "system": platform.system()}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


if __name__ == "__main__":
    app()
