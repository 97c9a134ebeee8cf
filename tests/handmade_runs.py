"""A directory as `smoothguard demo` leaves it, with logs, images and sounds written by hand: what the page makes of any text."""

from __future__ import annotations

import io
import json

import numpy as np
from PIL import Image

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.report.documents import documents
from lmms_smoothguard.report.experiments import SEEING
from lmms_smoothguard.sounds import PCM, Sound, sound_of

ATTACK = {
    "name": "pgd", "norm": "linf", "eps": 4 / 255, "steps": 40, "step_size": None, "loss": "margin", "target": None,
    "eot": 0, "random_start": True, "seed": 0,
}  # fmt: skip


def configs_of(on):
    """What lmms-eval logs of the two tasks."""
    data = {"test": f"/elsewhere/tasks/{on.clean.partition('_')[0]}/data/pope.parquet"}
    told = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": data}, "test_split": "test"}
    return {on.clean: told, on.attacked: told}


CONFIGS = configs_of(SEEING)


def change_picture(document, random):
    """(images, sounds, largest change) of an adversarial picture."""
    clean = np.asarray(Image.open(io.BytesIO(document["image"]["bytes"])).convert("RGB")).astype(int)
    attacked = np.clip(clean + random.choice([-4, 4], clean.shape), 0, 255)
    return [attacked.astype(np.uint8)], (), {"attack_linf": float(np.abs(attacked - clean).max()) / 255}


def change_clip(document, random):
    """The same of a clip, 32 steps of 16-bit PCM up or down."""
    clean = sound_of(document["audio"])
    attacked = np.clip(clean.pcm.astype(int) + random.choice([-32, 32], clean.pcm.shape), -PCM, PCM - 1)
    told = {"attack_linf": float(np.abs(attacked - clean.pcm).max()) / PCM, "attack_snr": 41.5}
    return [], [Sound.from_pcm(attacked.astype(np.int16), clean.rate)], told


def answers_of(number, target):
    """(answer, candidates, labels) of a defended attacked sample: the unchanged copy is misled; every fifth is lost."""
    wrong = "No" if target == "yes" else "Yes"
    right = "Yes" if target == "yes" else "No"
    if number % 5 == 1:
        return wrong, [wrong] * 10, [0] * 10
    return right, [wrong] + [right] * 9, [0] + [1] * 9


def write_runs(directory, count=12, answers=answers_of, warnings=(), num_samples=10, on=SEEING):
    """Writes `plain` and `smoothguard` with `count` questions each, and the attack cache."""
    cache, random = AttackCache(directory / "cache" / "attacks"), np.random.default_rng(0)
    rows = {(run, task): [] for run in ("plain", "smoothguard") for task in (on.clean, on.attacked)}
    change = change_picture if on is SEEING else change_clip
    for number, document in enumerate(list(documents(on.clean, with_media=True).values())[:count]):
        images, sounds, distance = change(document, random)
        key = f"{number:064x}"
        cache.put(key, images, {}, sounds)
        target = document["answer"]
        right, wrong = ("Yes", "No") if target == "yes" else ("No", "Yes")
        attack = {
            "attack": ATTACK, "attack_key": key, **distance, "attack_seconds": 0.1, "clean_answer": f" {right}",
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
        rows["plain", on.clean].append((document, right, {"seconds": 0.02}))
        rows["plain", on.attacked].append((document, wrong, {"seconds": 0.02, **attack}))
        rows["smoothguard", on.clean].append((document, right, {"seconds": 0.05, **unanimous}))
        rows["smoothguard", on.attacked].append((document, answer, {"seconds": 0.05, **attack, **verdict}))
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
        noise = "sigma=0.2,noise_space=pixel" if on is SEEING else "audio_sigma=0.02"
        settings = "defense=none" if run == "plain" else f"{noise},num_samples={num_samples},seed=3"
        results = {"config": {"model_args": f"pretrained=somewhere,{settings}"}, "configs": configs_of(on)}
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
