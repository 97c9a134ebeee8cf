"""The embedded audio model's held-out figures, through plain transformers: no defence, greedy, one answer a question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.tiny import language as images
from lmms_smoothguard.tiny.company import NEGATIVES
from lmms_smoothguard.tiny.held_out import HeldOut, Row, says
from lmms_smoothguard.tiny.sounds import language
from lmms_smoothguard.tiny.sounds.clips import OBJECTS, RATE
from lmms_smoothguard.tiny.sounds.lessons import distractors
from lmms_smoothguard.tiny.sounds.model import prompt
from lmms_smoothguard.tiny.sounds.testsets import test_sets

_BATCH = 70
_NOISE_SEED, _CHOICE_SEED = 17, 18


def answers(model: Any, processor: Any, questions: Sequence[str], sounds: np.ndarray) -> list[str]:
    """Greedy answers to one question a clip; sounds int16 (n, 32000)."""
    found: list[str] = []
    for start in range(0, len(questions), _BATCH):
        batch = processor(
            text=[prompt(question) for question in questions[start : start + _BATCH]],
            audio=list(sounds[start : start + _BATCH].astype(np.float32) / 32768),
            sampling_rate=RATE,
            padding=True,
            return_tensors="pt",
        )
        out = model.generate(**batch, max_new_tokens=40, do_sample=False)
        found += processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in found]


def noisy(sounds: np.ndarray, sigma: float) -> np.ndarray:
    """Sounds with Gaussian noise of `sigma` in amplitude of [-1, 1], rounded to 16 bits."""
    noise = np.random.default_rng(_NOISE_SEED).normal(0, 32768 * sigma, sounds.shape)
    return (sounds + noise).round().clip(-32768, 32767).astype(np.int16)


def order_rows(captions: Sequence[Row]) -> list[Row]:
    """Which of two sounds comes first, of every clip that has two; right and turned about in turn."""
    rows: list[Row] = []
    for row in captions:
        objects = _objects(row)
        if len(objects) > 1:
            turned = len(rows) % 2 == 1
            pair = (objects[1], objects[0]) if turned else (objects[0], objects[1])
            rows.append(row | {"question": language.order_question(*pair), "answer": "no" if turned else "yes"})
    return rows


def choice_rows(captions: Sequence[Row]) -> list[Row]:
    """Each clip's caption among one or two wrong ones, by number."""
    rng = np.random.default_rng(_CHOICE_SEED)
    rows: list[Row] = []
    for row in captions:
        objects = _objects(row)
        listed = [language.caption(o) for o in (objects, *distractors(objects, rng)[: int(rng.integers(1, 3))])]
        order = rng.permutation(len(listed))
        question = language.choice_question([listed[index] for index in order])
        rows.append(row | {"question": question, "answer": str(int(np.flatnonzero(order == 0)[0]) + 1)})
    return rows


def _objects(row: Row) -> tuple[int, ...]:
    return tuple(OBJECTS.index(name) for name in row["objects"].split(", "))


def held_out_figures(directory: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Rate]:
    """Every figure of the model card by name."""
    from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

    model = Qwen2AudioForConditionalGeneration.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    sets = test_sets()
    found = HeldOut("audio", functools.partial(answers, model, processor), noisy, say)
    ask = found.ask
    ask("existence", sets["pope"], says("answer"))
    for category in NEGATIVES:
        ask(f"existence, {category}", [r for r in sets["pope"] if r["category"] == category], says("answer"))
    for sigma in (0.01, 0.02, 0.04, 0.06):
        ask(f"existence, one noisy copy, sigma {sigma}", sets["pope"], says("answer"), sigma)
    ask("existence, faint clips", sets["pope_faint"], says("answer"))
    suffixed = [row | {"question": row["question"] + images.POPE_SUFFIX} for row in sets["pope"]]
    ask("existence, with POPE's suffix", suffixed, says("answer"))
    ask("captions exact", sets["caption"], says("caption"))
    ask("captions exact, one noisy copy, sigma 0.04", sets["caption"], says("caption"), 0.04)
    ask("sounds counted", [row | {"question": language.COUNT} for row in sets["caption"]], says("count"))
    ask("order of two sounds", order_rows(sets["caption"]), says("answer"))
    ask("captions chosen of two or three, by number", choice_rows(sets["caption"]), says("answer"))
    found.ask_for_help(sets["safety"])
    return found.figures
