"""A directory as `smoothguard demo` leaves it, with logs and images written by hand: what the page makes of any text."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.report.documents import documents

ATTACK = {
    "name": "pgd", "norm": "linf", "eps": 4 / 255, "steps": 40, "step_size": None, "loss": "margin", "target": None,
    "eot": 0, "random_start": True, "seed": 0,
}  # fmt: skip

CONFIGS = {
    task: {
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": "/elsewhere/tasks/shapes/data/pope.parquet"}},
        "test_split": "test",
    }
    for task in ("shapes_pope", "shapes_pope_pgd")
}


def answers_of(number, target):
    """(answer, candidates, labels) of a defended attacked sample: the unchanged copy is misled; every fifth is lost."""
    wrong = "No" if target == "yes" else "Yes"
    right = "Yes" if target == "yes" else "No"
    if number % 5 == 1:
        return wrong, [wrong] * 10, [0] * 10
    return right, [wrong] + [right] * 9, [0] + [1] * 9


def write_runs(directory, count=12, answers=answers_of, warnings=(), num_samples=10):
    """Writes `plain` and `smoothguard` with `count` questions each, and the attack cache."""
    cache, random = AttackCache(directory / "cache" / "attacks"), np.random.default_rng(0)
    rows = {(run, task): [] for run in ("plain", "smoothguard") for task in ("shapes_pope", "shapes_pope_pgd")}
    for number, document in enumerate(list(documents("shapes_pope", with_images=True).values())[:count]):
        clean = np.asarray(Image.open(io.BytesIO(document["image"]["bytes"])).convert("RGB")).astype(int)
        attacked = np.clip(clean + random.choice([-4, 4], clean.shape), 0, 255)
        key = f"{number:064x}"
        cache.put(key, [attacked.astype(np.uint8)], {})
        target = document["answer"]
        right, wrong = ("Yes", "No") if target == "yes" else ("No", "Yes")
        attack = {
            "attack": ATTACK, "attack_key": key, "attack_linf": float(np.abs(attacked - clean).max()) / 255,
            "attack_seconds": 0.1, "clean_answer": f" {right}",
        }  # fmt: skip
        answer, candidates, labels = answers(number, target)
        noisy = labels[1:]
        verdict = {
            "agreement": max(labels.count(label) for label in labels) / len(labels),
            "suspicion": sum(label != labels[0] for label in noisy) / len(noisy),
            "suspected": labels[0] != max(set(labels), key=labels.count),
            "num_samples_used": len(candidates), "candidates": candidates, "labels": labels, "warnings": list(warnings),
        }  # fmt: skip
        unanimous = {"agreement": 1.0, "suspicion": 0.0, "suspected": False, "candidates": [right] * num_samples,
                     "labels": [0] * num_samples, "warnings": [], "num_samples_used": num_samples}  # fmt: skip
        rows["plain", "shapes_pope"].append((document, right, {"seconds": 0.02}))
        rows["plain", "shapes_pope_pgd"].append((document, wrong, {"seconds": 0.02, **attack}))
        rows["smoothguard", "shapes_pope"].append((document, right, {"seconds": 0.05, **unanimous}))
        rows["smoothguard", "shapes_pope_pgd"].append((document, answer, {"seconds": 0.05, **attack, **verdict}))
    for (run, task), samples in rows.items():
        folder = directory / run / "tiny__llava"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {
                "doc_id": place,
                "target": document["answer"],
                "filtered_resps": answer,
                "token_counts": [info],
                "input": document["question"],
                "asr": {
                    "question_id": document["question_id"],
                    "right": normalize_answer(answer) == document["answer"],
                    "clean_right": True,
                },
            }
            for place, (document, answer, info) in enumerate(samples)
        ]
        (folder / f"1_samples_{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        settings = "defense=none" if run == "plain" else f"sigma=0.2,noise_space=pixel,num_samples={num_samples},seed=3"
        results = {"config": {"model_args": f"pretrained=somewhere,{settings}"}, "configs": CONFIGS}
        (folder / "1_results.json").write_text(json.dumps(results))
    return directory


HOSTILE = "<script>window.broken = 1</script>"
HOSTILE_IMAGE = '"><img src="https://example.org/x.png" onerror="window.broken = 1">'


def hostile_answers(number, target):
    """Twenty long answers in nine groups, among them text that would like to be markup."""
    texts = [HOSTILE, HOSTILE_IMAGE, "{{ 7 * 7 }}", "a very long answer without any end " * 6, "x" * 300, "é ü 猫 🐈"]
    texts += ["An orange circle and an orange star.", "&lt;b&gt;", "No"]
    candidates = [texts[0]] * 8 + [texts[1]] * 4 + texts[2:] + [texts[2]]
    order = list(dict.fromkeys(candidates))
    return texts[0], candidates, [order.index(text) for text in candidates]
