"""Draws docs/attacked.png from the demo's own runs: clean, adversarial, difference, one noisy copy, and the answers.

make demo && .venv/bin/python benchmarks/picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import hf_integration
from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.evaluation.runs import load_samples
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.noise import NoiseSource
from lmms_smoothguard.tiny.model import MODEL_DIR, prompt

ROOT = Path(__file__).parent.parent
ROWS = (0, 10, 23)  # fixed before they were looked at: in the second the attack fails


def main(runs: Path) -> None:
    """Recomputes nothing but one noisy copy; images come from the attack cache of `runs`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    hf_integration.enable()
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(MODEL_DIR).eval(),
        AutoProcessor.from_pretrained(MODEL_DIR),
    )
    documents = datasets.load_dataset(
        "parquet", data_files={"t": str(ROOT / "tasks/shapes/data/pope.parquet")}, split="t"
    )
    cached = _images(runs / "cache" / "attacks")
    plain, defended = (load_samples(runs / name, "shapes_pope_pgd") for name in ("plain", "smoothguard"))
    figure, axes = plt.subplots(len(ROWS), 4, figsize=(10, 2.9 * len(ROWS)))
    for line, number in zip(axes, ROWS, strict=True):
        clean = np.asarray(documents[number]["image"].convert("RGB")).astype(int)
        wanted = plain[number].info["attack_l2"]  # a scene is attacked once for each of its questions
        attacked = next(image for image in cached if abs(_l2(image, clean) - wanted) < 1e-4)
        inputs = processor(images=[attacked], text=prompt(documents[number]["question"]), return_tensors="pt")
        source = NoiseSource(find_images(inputs, model.config), sigma=0.2, statistics=pixel_statistics(model), seed=0)
        noisy = (source.copy(1)[0].permute(1, 2, 0).numpy() + 1) / 2
        answers = defended[number].info["candidates"]
        share = f"{sum(a.strip() == defended[number].answer for a in answers)} of {len(answers)} copies: {defended[number].answer}"
        shown = (clean, attacked, 128 + 30 * (attacked.astype(int) - clean), noisy)
        titles = (
            f"{documents[number]['question']}\nclean, undefended: {plain[number].info['clean_answer'].strip()}",
            f"adversarial (4/255)\nundefended: {plain[number].answer}",
            "the difference, 30 times",
            f"one of the noisy copies\n{share}",
        )
        for axis, picture, title in zip(line, shown, titles, strict=True):
            axis.imshow(np.clip(picture, 0, 255 if picture.max() > 1 else 1))
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "attacked.png", dpi=110)


def _l2(image: np.ndarray, clean: np.ndarray) -> float:
    return float(np.linalg.norm((image.astype(int) - clean) / 255))


def _images(directory: Path) -> list[np.ndarray]:
    """Every adversarial image of a cache."""
    cache = AttackCache(directory)
    found = (cache.get(path.name.removesuffix("-0.png")) for path in sorted(directory.rglob("*-0.png")))
    return [entry.images[0] for entry in found if entry is not None]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "demo")
