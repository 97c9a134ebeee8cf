"""`smoothguard demo` and `smoothguard results`: the main job, and the rest of the README's table."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.report.experiments import ATTACKED, CLEAN, Experiment, environment, run
from lmms_smoothguard.tiny.model import MODEL_DIR

log = logging.getLogger(__name__)

_PIXEL = {"sigma": "0.2", "noise_space": "pixel"}
_NO_DEFENSE = {"defense": "none"}

# Fixed beforehand: 450 questions, L-inf 4/255, 40 steps, no early stop; SmoothGuard N = 10, sigma 0.2 in pixel units.
DEMO = (
    Experiment("plain", _NO_DEFENSE, about="undefended"),
    Experiment("smoothguard", _PIXEL, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
)
_EOT = {"attack_eot": "8", "attack_batch_size": "128"}
REST = (
    Experiment("published", {"sigma": "0.1"}, about="SmoothGuard as published: N = 10, sigma 0.1 normalized"),
    Experiment("one_noisy_copy", _PIXEL | {"num_samples": "1", "include_clean": "false"}, about="one noisy copy alone, sigma 0.2 pixel"),
    Experiment("n20", _PIXEL | {"num_samples": "20"}, about="SmoothGuard, N = 20, sigma 0.2 pixel"),
    Experiment("n20_noisy_only", _PIXEL | {"num_samples": "20", "include_clean": "false"}, about="SmoothGuard, N = 20 without the clean copy, sigma 0.2 pixel"),
    Experiment("plain_eps2", _NO_DEFENSE | {"attack_eps": "2/255"}, (ATTACKED,), about="undefended"),
    Experiment("smoothguard_eps2", _PIXEL | {"attack_eps": "2/255"}, (ATTACKED,), about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("plain_eps8", _NO_DEFENSE | {"attack_eps": "8/255"}, (ATTACKED,), about="undefended"),
    Experiment("smoothguard_eps8", _PIXEL | {"attack_eps": "8/255"}, (ATTACKED,), about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("faint_plain", _NO_DEFENSE, ("shapes_pope_faint",), 300, about="undefended"),
    Experiment("faint_smoothguard", _PIXEL, ("shapes_pope_faint",), 300, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("caption_plain", _NO_DEFENSE, ("shapes_caption", "shapes_caption_pgd"), 150, about="undefended"),
    Experiment("caption_smoothguard", _PIXEL, ("shapes_caption", "shapes_caption_pgd"), 150, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("smoothguard_eot40", _PIXEL | _EOT, (ATTACKED,), 200, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("smoothguard_eot100", _PIXEL | _EOT | {"attack_steps": "100"}, (ATTACKED,), 200, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
    Experiment("smoothguard_eot40_eps8", _PIXEL | _EOT | {"attack_eps": "8/255"}, (ATTACKED,), 200, about="SmoothGuard, N = 10, sigma 0.2 pixel"),
)  # fmt: skip


def run_demo(out: Path, limit: int) -> list[dict[str, Any]]:
    """Runs the demo's two experiments and prints the table; figures go to `out/demo.json`."""
    rows = []
    for experiment in DEMO:
        chosen = Experiment(experiment.name, experiment.model_args, experiment.tasks, limit, experiment.about)
        rows.append(_run(chosen, out))
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    print_table(rows)
    return rows


def run_results(out: Path, results: Path, only: Sequence[str] = ()) -> None:
    """Runs every experiment that has no result file yet and writes it to `results`, one file each."""
    results.mkdir(parents=True, exist_ok=True)
    known = {experiment.name for experiment in (*DEMO, *REST)}
    unknown = set(only) - known
    if unknown:
        raise SmoothGuardError(f"unknown experiment {sorted(unknown)[0]!r}; known: {', '.join(sorted(known))}")
    for experiment in (*DEMO, *REST):
        target = results / f"{experiment.name}.json"
        if target.exists() and experiment.name not in only:
            continue
        row = _run(experiment, out)
        target.write_text(json.dumps({**row, "environment": environment()}, indent=1) + "\n")
    print_table([json.loads((results / f"{e.name}.json").read_text()) for e in (*DEMO, *REST)])


def _run(experiment: Experiment, out: Path) -> dict[str, Any]:
    return run(experiment, out, MODEL_DIR, out / "cache")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The table, on a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="The embedded model under attack", caption="ASR and accuracy with Wilson 95 % intervals")
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading in _HEADINGS[:2] else "right")
    for cells in table_rows(rows):
        table.add_row(*cells)
    Console().print(table)


_HEADINGS = (
    "defence",
    "attack",
    "n",
    "clean accuracy",
    "accuracy under attack",
    "ASR",
    "agreement",
    "s / answer",
    "x plain",
)


def table_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the table, one row an experiment."""
    plain = next((_seconds(row) for row in rows if row["name"] == "plain"), None)
    cells: list[tuple[str, ...]] = []
    for row in rows:
        clean = next((row["figures"][t] for t in row["figures"] if not t.endswith("_pgd")), None)
        attacked = next((row["figures"][t] for t in row["figures"] if t.endswith("_pgd")), None)
        either: dict[str, Any] = attacked or clean or {}
        cells.append((
            row["about"] + _task_note(row),
            "-" if attacked is None else attack_name(attacked["attack"]),
            str((either.get("asr") or either["accuracy"])["count"]),
            "-" if clean is None else _percent(clean["accuracy"]),
            "-" if attacked is None else _percent(attacked["accuracy"]),
            "-" if attacked is None else _percent(attacked["asr"]),
            f"{either['agreement']:.2f}" if "agreement" in either else "-",
            f"{_seconds(row):.3f}",
            f"{_seconds(row) / plain:.1f}" if plain and _task_note(row) == "" else "-",
        ))  # fmt: skip
    return cells


def _task_note(row: dict[str, Any]) -> str:
    first = next(iter(row["figures"])).removesuffix("_pgd")
    return {CLEAN: "", "shapes_pope_faint": " (faint scenes)", "shapes_caption": " (captions)"}.get(
        first, f" ({first})"
    )


def attack_name(attack: dict[str, Any]) -> str:
    """`PGD-40, 4/255`, with EOT's draws."""
    draws = f", EOT {attack['eot']}" if attack["eot"] else ""
    return f"{attack['name'].upper()}-{attack['steps']}{draws}, {attack['eps'] * 255:g}/255"


def _seconds(row: dict[str, Any]) -> float:
    listed = [figures["seconds_per_answer"] for figures in row["figures"].values()]
    return sum(listed) / len(listed)


def _percent(value: dict[str, float]) -> str:
    return f"{100 * value['value']:.1f} % ({100 * value['low']:.1f}-{100 * value['high']:.1f})"
