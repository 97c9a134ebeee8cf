"""What a robust tower keeps and what it loses, before and after: features, zero-shot classification, the embedded LLaVA's answers."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lmms_smoothguard.evaluation.means import mean
from lmms_smoothguard.evaluation.rates import Rate, attack_success_rate, rate, robust_accuracy
from lmms_smoothguard.training.pictures import Source, held_out_scenes, to_pixels
from lmms_smoothguard.training.robust import RobustTrainer, class_embeddings, worst_case, zero_shot_logits
from lmms_smoothguard.training.robust_card import Figures
from lmms_smoothguard.training.robust_models import Subject, load

_BATCH = 50
_STEPS = 20
_QUESTION_STEPS = 40
_NOISE = 0.25


def held_out_figures(
    trainer: RobustTrainer, tower: Any, held_out: Source, questions: int, say: Callable[[str], None] = lambda text: None
) -> list[Figures]:
    """Every figure of the card: of any model its features and, of a dual encoder with classes, its zero-shot accuracy; of the
    embedded models' tower what becomes of both the LLaVA and the dual encoder with it."""
    found: list[Figures] = []

    def state(figures: Figures) -> None:
        found.append(figures)
        say(str(figures))

    subject = trainer.subject
    for figures in feature_figures(trainer, tower, held_out):
        state(figures)
    embedded = subject.name in ("tiny-llava", "tiny-clip")
    dual = load("tiny-clip") if embedded and not subject.dual else subject
    classed = held_out_scenes(labelled=True) if embedded else held_out
    if dual.dual and classed.classes:
        for figures in zero_shot_figures(dual, tower, classed, trainer.recipe.eps):
            state(figures)
    if embedded:
        for figures in answer_figures(tower, trainer.recipe.eps, questions):
            state(figures)
    return found


def _batches(source: Source) -> Iterator[range]:
    for start in range(0, len(source), _BATCH):
        yield range(start, min(start + _BATCH, len(source)))


def feature_figures(trainer: RobustTrainer, tower: Any, held_out: Source) -> list[Figures]:
    """Mean cosine with the original's clean features, clean and under an attack on FARE's loss."""
    cosines: dict[str, list[float]] = defaultdict(list)
    for number, rows in enumerate(_batches(held_out)):
        clean = to_pixels(trainer.subject.image_processor, held_out.pictures(rows)).to(trainer.device)
        with torch.no_grad():
            kept = trainer.features(trainer.subject.original, clean)
        for when, seeing in (("before", trainer.subject.original), ("after", tower)):
            moved = functools.partial(_moved, trainer, seeing, kept)
            rng = np.random.default_rng([7, number])
            with trainer.autocast():
                attacked = worst_case(moved, clean, trainer.recipe.eps, _STEPS, rng)
            for how, pixels in (("clean", clean), ("attacked", attacked)):
                with torch.no_grad():
                    seen = F.cosine_similarity(trainer.features(seeing, pixels), kept, dim=-1).mean(1)
                cosines[f"{how} {when}"] += seen.tolist()
    what = f"cosine with the original's clean features ({trainer.reader})"
    return [
        Figures(f"{what}{ending}", mean(cosines[f"{how} before"]), mean(cosines[f"{how} after"]))
        for how, ending in (("clean", ""), ("attacked", f", PGD-{_STEPS} on them"))
    ]


def _moved(trainer: RobustTrainer, tower: Any, kept: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return (trainer.features(tower, pixels) - kept).square().sum((1, 2))


class _ZeroShot:
    """A dual encoder with one tower or another, on pictures that are not yet normalised."""

    def __init__(self, dual: Subject, tower: Any, classes: torch.Tensor) -> None:
        self._dual, self._tower, self._classes = dual, tower, classes
        self._mean, self._std = (
            torch.tensor(values, device=classes.device)[:, None, None]
            for values in (dual.image_processor.image_mean, dual.image_processor.image_std)
        )

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        return zero_shot_logits(self._dual, self._tower, (pixels - self._mean) / self._std, self._classes)

    def loss(self, labels: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(pixels), labels, reduction="none")


def zero_shot_figures(dual: Subject, tower: Any, held_out: Source, eps: float) -> list[Figures]:
    """Zero-shot accuracy of a dual encoder with either tower: clean, with noise, and under PGD on the cross-entropy."""
    classes = class_embeddings(dual, held_out.classes)
    both = {
        "before": _ZeroShot(dual, dual.original, classes),
        "after": _ZeroShot(dual, with_tower(dual.original, tower), classes),
    }
    right: dict[str, list[bool]] = defaultdict(list)
    for number, rows in enumerate(_batches(held_out)):
        clean = to_pixels(dual.image_processor, held_out.pictures(rows)).to(classes.device)
        labels = held_out.labels(rows).to(classes.device)
        for when, seen in both.items():
            rng = np.random.default_rng([8, number])
            noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), np.float32)).to(classes.device)
            with torch.autocast(clean.device.type, torch.bfloat16):
                attacked = worst_case(functools.partial(seen.loss, labels), clean, eps, _STEPS, rng)
            shown = {"clean": clean, "noised": (clean + _NOISE * noise).clamp(0, 1), "attacked": attacked}
            for how, pixels in shown.items():
                with torch.no_grad():
                    right[f"{how} {when}"] += (seen.logits(pixels).argmax(1) == labels).tolist()
    name = f"zero-shot accuracy, {len(held_out.classes)} classes"
    endings = (("clean", ""), ("noised", f", one noisy copy, sigma {_NOISE}"), ("attacked", f", PGD-{_STEPS}"))
    return [
        Figures(f"{name}{ending}", rate(right[f"{how} before"]), rate(right[f"{how} after"])) for how, ending in endings
    ]


def with_tower(own: Any, tower: Any) -> Any:
    """A tower's weights in a copy of a model's own, which keeps the layer norm behind the class token where the tower's was
    never trained: in a LLaVA nothing reads it."""
    weights = tower.state_dict()
    untouched = bool((weights["post_layernorm.weight"] == 1).all() and (weights["post_layernorm.bias"] == 0).all())
    kept = {k: v for k, v in weights.items() if not (untouched and k.startswith("post_layernorm."))}
    tuned = copy.deepcopy(own)
    tuned.load_state_dict({**own.state_dict(), **kept})
    return tuned.eval().requires_grad_(False)


def answer_figures(tower: Any, eps: float, questions: int) -> list[Figures]:
    """The embedded LLaVA with its own tower and with this one: existence questions clean, noisy, faint and under PGD-40."""
    before, after = llava_rates(None, eps, questions), llava_rates(tower, eps, questions)
    return [Figures(name, before[name], after[name]) for name in before]


def llava_rates(tower: Any | None, eps: float, questions: int) -> dict[str, Rate]:
    """Rates of the embedded LLaVA with a tower (None: its own), on the first `questions` of its existence sets."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from lmms_smoothguard.aggregation.verdict import normalize_answer
    from lmms_smoothguard.tiny.evaluate import answers, noisy
    from lmms_smoothguard.tiny.model import MODEL_DIR
    from lmms_smoothguard.tiny.testsets import test_sets

    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR).eval()
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    if tower is not None:
        inside = model.model.vision_tower
        inside.load_state_dict(with_tower(inside, tower.cpu()).state_dict())
    sets = test_sets()

    def right(rows: list[dict[str, Any]], images: np.ndarray) -> list[bool]:
        given = answers(model, processor, [row["question"] for row in rows], images)
        return [normalize_answer(a) == normalize_answer(row["answer"]) for a, row in zip(given, rows, strict=True)]

    rows, faint = sets["pope"][:questions], sets["pope_faint"][:questions]
    images = np.stack([row["image"] for row in rows])
    clean, attacked = right(rows, images), right(rows, _attacked(model, processor, rows, eps))
    return {
        "LLaVA, existence": rate(clean),
        f"LLaVA, existence, one noisy copy, sigma {_NOISE}": rate(right(rows, noisy(images, _NOISE))),
        "LLaVA, existence, faint scenes": rate(right(faint, np.stack([row["image"] for row in faint]))),
        f"LLaVA, robust accuracy, PGD-{_QUESTION_STEPS}": robust_accuracy(clean, attacked),
        f"LLaVA, asr, PGD-{_QUESTION_STEPS}": attack_success_rate(clean, attacked),
    }


def _attacked(model: Any, processor: Any, rows: list[dict[str, Any]], eps: float) -> np.ndarray:
    """Pictures of the rows, led away from the right answer: uint8 (n, h, w, 3)."""
    from PIL import Image

    from lmms_smoothguard.attacks.cache import AttackCache
    from lmms_smoothguard.attacks.craft import Crafter, Job
    from lmms_smoothguard.attacks.objective import answer_ids
    from lmms_smoothguard.attacks.settings import AttackSettings
    from lmms_smoothguard.tiny.model import prompt

    settings = AttackSettings.parse({"name": "pgd", "eps": eps, "steps": _QUESTION_STEPS})
    jobs = []
    for row in rows:
        picture = Image.fromarray(row["image"])
        inputs = processor(images=[picture], text=[prompt(row["question"])], return_tensors="pt")
        ids = answer_ids(processor.tokenizer, inputs["input_ids"][0].tolist(), row["answer"].capitalize())
        jobs.append(Job(settings, (picture,), dict(inputs), tuple(ids)))
    with tempfile.TemporaryDirectory() as place:
        entries = Crafter(model, processor.image_processor, AttackCache(Path(place)), quiet=True).craft(jobs)
    return np.stack([entry.images[0] for entry in entries])
