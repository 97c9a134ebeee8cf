"""The embedded model's held-out figures, through plain transformers: no defence, greedy, one answer a question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.company import NEGATIVES
from lmms_smoothguard.tiny.held_out import HeldOut, says
from lmms_smoothguard.tiny.model import prompt
from lmms_smoothguard.tiny.testsets import test_sets

_BATCH = 100
_NOISE_SEED = 17


def answers(model: Any, processor: Any, questions: Sequence[str], images: np.ndarray) -> list[str]:
    """Greedy answers to one question an image; images uint8 (n, 64, 64, 3)."""
    from PIL import Image

    found: list[str] = []
    for start in range(0, len(questions), _BATCH):
        batch = processor(
            images=[Image.fromarray(image) for image in images[start : start + _BATCH]],
            text=[prompt(question) for question in questions[start : start + _BATCH]],
            padding=True,
            return_tensors="pt",
        )
        out = model.generate(**batch, max_new_tokens=32, do_sample=False)
        found += processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


def noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    """Images with Gaussian noise of `sigma` in [0, 1] units, rounded to 8 bits."""
    noise = np.random.default_rng(_NOISE_SEED).normal(0, 255 * sigma, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def held_out_figures(directory: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Rate]:
    """Every figure of the model card by name."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    sets = test_sets()
    found = HeldOut("image", functools.partial(answers, model, processor), noisy, say)
    ask = found.ask
    ask("existence", sets["pope"], says("answer"))
    for category in NEGATIVES:
        ask(f"existence, {category}", [r for r in sets["pope"] if r["category"] == category], says("answer"))
    for sigma in (0.1, 0.2, 0.25):
        ask(f"existence, one noisy copy, sigma {sigma}", sets["pope"], says("answer"), sigma)
    ask("existence, faint scenes", sets["pope_faint"], says("answer"))
    suffixed = [row | {"question": row["question"] + language.POPE_SUFFIX} for row in sets["pope"]]
    ask("existence, with POPE's suffix", suffixed, says("answer"))
    ask("captions exact", sets["caption"], says("caption"))
    ask("captions exact, one noisy copy, sigma 0.2", sets["caption"], says("caption"), 0.2)
    found.ask_for_help(sets["safety"])
    return found.figures
