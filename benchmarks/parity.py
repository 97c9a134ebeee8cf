"""Our attacks against those of adversarial-robustness-toolbox and torchattacks: `make parity`, or

.venv-parity/bin/python benchmarks/parity.py                                              # results/parity.json
.venv-parity/bin/python benchmarks/parity.py --questions 12 --steps 4 --rounds 2 --out x  # a trial

Same model, questions, budget, steps, first step, seed, 8-bit rounding and ordinary scoring. Times are measured after the
attacks, each beside the bare model: leave the machine alone meanwhile. What was attacked is kept in runs/parity, so that
a killed run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import typer
from rich.progress import track

from lmms_smoothguard.evaluation.differences import paired_difference
from lmms_smoothguard.evaluation.machine import environment
from lmms_smoothguard.evaluation.rates import attack_success_rate
from lmms_smoothguard.files import replace_file
from lmms_smoothguard.fingerprint import model_fingerprint
from peers.attackers import BUDGETS, CASES, OURS, Case, run_of
from peers.questions import QUESTIONS, Question, QuestionClassifier, Subject, pictures_of
from peers.table import print_table
from timing.paired import ratio, run_paired

ROOT = Path(__file__).parent.parent
PEERS = ("adversarial-robustness-toolbox", "torchattacks")
PLACES = ("lmms_smoothguard/attacks", "lmms_smoothguard/inputs", "lmms_smoothguard/tiny", "benchmarks/peers")
"""Code that attacked pictures hang on."""
ASKED = {"linf": CASES, "l2": tuple(case for case in CASES if case[1] == "ce")}
"""Attacks and losses in each norm: in L2 the one loss that everybody has."""
_BARE = 10
"""Forward and backward passes in one measurement of the bare model."""


def main(
    questions: Annotated[int, typer.Option(help="how many, from the first")] = 200,
    steps: Annotated[int, typer.Option(help="of every attack")] = 40,
    rounds: Annotated[int, typer.Option(help="of the timing")] = 8,
    batch_size: Annotated[int, typer.Option(help="of the attacks; timing takes one batch of half of it")] = 32,
    seed: Annotated[int, typer.Option(help="of everybody's random starts")] = 0,
    out: Annotated[Path, typer.Option(help="the result file")] = ROOT / "benchmarks" / "results" / "parity.json",
) -> None:
    """Attacks, scores, times; writes a result file and shows a table."""
    subject = Subject()
    asked = subject.questions(questions)
    cases = [Case(*kind, norm, steps, batch_size, seed) for norm, kinds in ASKED.items() for kind in kinds]
    rows = [row for case in track(cases, "attacks") for row in _compared(subject, case, asked)]
    for norm in ASKED:
        _timed([row for row in rows if row["norm"] == norm], subject, asked[: max(1, batch_size // 2)], rounds)
    result = {
        "command": "make parity",
        "steps": steps,
        "batch_size": batch_size,
        "seed": seed,
        "rows": [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows],
        "environment": environment()
        | {"torch_threads": torch.get_num_threads()}
        | {name: importlib.metadata.version(name) for name in PEERS},
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)


def _compared(subject: Subject, case: Case, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """ASR of every side that has this attack, and ours minus theirs over the same questions."""
    clean = [question.clean_right for question in asked]
    scenes = {question.name: question.scene for question in asked}
    right = {side: _still_right(subject, case, side, asked) for side in case.sides}
    rows = []
    for side, answers in right.items():
        row = {
            "norm": case.norm,
            "eps": BUDGETS[case.norm],
            "attack": case.attack,
            "loss": case.loss,
            "side": side,
            "asr": attack_success_rate(clean, answers).figure().to_dict(),
            "_case": case,
        }
        if side != OURS:
            ours, theirs = (_fooled(asked, found) for found in (right[OURS], answers))
            row["ours_minus_theirs"] = paired_difference(ours, theirs, scenes).to_dict()
        rows.append(row)
    return rows


def _fooled(asked: Sequence[Question], right: Sequence[bool]) -> dict[str, bool]:
    """By question, of those answered rightly when clean."""
    return {q.name: not now for q, now in zip(asked, right, strict=True) if q.clean_right}


def _still_right(subject: Subject, case: Case, side: str, asked: Sequence[Question]) -> list[bool]:
    """Whether each question is still answered rightly after the attack."""
    versions = [importlib.metadata.version(name) for name in (*PEERS, "torch", "transformers")]
    code = [path.read_bytes() for place in PLACES for path in _sources(place)]
    data = hashlib.sha256(QUESTIONS.read_bytes()).hexdigest()
    plan = json.dumps([dataclasses.asdict(case), side, len(asked), versions, model_fingerprint(subject.model), data])
    key = hashlib.sha256(b"\0".join([plan.encode(), *code])).hexdigest()[:24]
    kept = ROOT / "runs" / "parity" / f"{key}.json"
    if not kept.exists():
        found = run_of(side, subject, case)(asked)
        answers = [subject.still_right(question, picture) for question, picture in zip(asked, found, strict=True)]
        replace_file(kept, json.dumps(answers).encode())
    listed: list[bool] = json.loads(kept.read_text())
    return listed


def _sources(place: str) -> list[Path]:
    return sorted((ROOT / place).rglob("*.py"))


def _timed(rows: Sequence[dict[str, Any]], subject: Subject, asked: Sequence[Question], rounds: int) -> None:
    """Adds to each row the time of a step over that of one bare forward and backward pass of the same batch."""
    classifier = QuestionClassifier(subject, asked)
    carried = classifier.carrying(pictures_of(asked), range(len(asked)))
    labels = torch.tensor([question.label for question in asked])

    def bare(_: int) -> None:
        for _ in range(_BARE):
            pixels = carried.clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(classifier(pixels), labels, reduction="sum")
            torch.autograd.grad(loss, pixels)

    for row in track(rows, "timing"):
        run, steps = run_of(row["side"], subject, row["_case"]), row["_case"].steps
        # Each attack beside bare passes of its own: what a machine does in the minutes between two attacks is in no ratio.
        seconds = run_paired({"bare": bare, "attack": lambda _, run=run: run(asked)}, rounds, warmup=0).seconds
        each, alone = ([value / count for value in seconds[of]] for of, count in (("attack", steps), ("bare", _BARE)))
        row["step_to_bare"] = ratio(each, alone).to_dict()


if __name__ == "__main__":
    typer.run(main)
