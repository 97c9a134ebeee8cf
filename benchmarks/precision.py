"""How often bf16 changes an answer that fp32 gives: plain, one copy of a defended request, and the defended answer.

.venv/bin/python benchmarks/precision.py        # writes benchmarks/results/precision.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch

import hf_integration
from lmms_smoothguard.evaluation.machine import environment
from lmms_smoothguard.evaluation.means import mean
from lmms_smoothguard.evaluation.rates import rate
from lmms_smoothguard.tiny.model import MODEL_DIR, prompt

ROOT = Path(__file__).parent.parent
DEFENSE = {"sigma": 0.2, "noise_space": "pixel"}
SETS = {"existence questions": "pope", "captions": "caption"}
COUNT = 150


def answers(model: Any, processor: Any, rows: list[dict[str, Any]]) -> list[tuple[str, tuple[str, ...], str]]:
    """(plain answer, every copy's answer, defended answer) of each row."""
    found = []
    for row in rows:
        inputs = processor(images=[row["image"].convert("RGB")], text=prompt(row["question"]), return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        start = inputs["input_ids"].shape[1]
        plain = model.generate(**inputs, max_new_tokens=32)
        out = model.generate(**inputs, max_new_tokens=32, smoothguard=DEFENSE, return_dict_in_generate=True)
        texts = out.smoothguard[0].texts
        found.append((processor.decode(plain[0, start:]), texts, texts[out.smoothguard[0].chosen]))
    return found


def _share_flipped(full: Sequence[str], half: Sequence[str]) -> float:
    return sum(x != y for x, y in zip(full, half, strict=True)) / len(full)


def main() -> None:
    """Both precisions on the first questions of each set."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    hf_integration.enable()
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    models = [
        AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    figures: dict[str, Any] = {}
    for name, file in SETS.items():
        path = str(ROOT / "tasks" / "shapes" / "data" / f"{file}.parquet")
        rows = list(datasets.load_dataset("parquet", data_files={"t": path}, split="t").select(range(COUNT)))
        full, half = (answers(model, processor, rows) for model in models)
        figures[name] = {
            "plain": rate(a[0] != b[0] for a, b in zip(full, half, strict=True)).figure().to_dict(),
            # Copies of one question depend on each other, so a question's share of flipped copies is what counts.
            "copies": mean([_share_flipped(a[1], b[1]) for a, b in zip(full, half, strict=True)]).figure().to_dict(),
            "defended": rate(a[2] != b[2] for a, b in zip(full, half, strict=True)).figure().to_dict(),
        }
    result = {
        "command": "python benchmarks/precision.py",
        "defense": DEFENSE,
        "seed": 0,
        "flips": figures,
        "environment": environment(),
    }
    (ROOT / "benchmarks" / "results" / "precision.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
