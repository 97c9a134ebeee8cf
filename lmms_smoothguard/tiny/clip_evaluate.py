"""The dual encoder's held-out figures, through plain transformers: no defence, one view a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmms_smoothguard.evaluation.rates import Rate, rate
from lmms_smoothguard.tiny.clip_model import class_prompts
from lmms_smoothguard.tiny.clip_testsets import presence_set, retrieval_set, zero_shot_set
from lmms_smoothguard.tiny.evaluate import noisy

if TYPE_CHECKING:
    import torch

_BATCH = 100
SIGMAS = (0.0, 0.1, 0.2, 0.25)
"""Noise of one noisy copy in [0, 1] pixel units."""


def image_embeddings(model: Any, processor: Any, images: np.ndarray) -> torch.Tensor:
    """Embeddings of uint8 pictures (n, h, w, 3): (n, width), of length 1."""
    import torch
    from PIL import Image

    found = []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            pictures = [Image.fromarray(image) for image in images[start : start + _BATCH]]
            pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
            found.append(model.get_image_features(pixel_values=pixels).pooler_output)
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def text_embeddings(model: Any, processor: Any, texts: Sequence[str]) -> torch.Tensor:
    """Embeddings of sentences: (n, width), of length 1."""
    import torch

    with torch.inference_mode():
        tokens = processor(text=list(texts), padding=True, return_tensors="pt")
        found = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return torch.nn.functional.normalize(found.pooler_output, dim=-1)


def within(similarity: torch.Tensor, places: int) -> list[bool]:
    """Whether row i's own column i is among the `places` most similar; equals count against it."""
    own = similarity.diagonal()[:, None]
    return ((similarity >= own).sum(1) <= places).tolist()


def held_out_figures(directory: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Rate]:
    """Every figure of the model card by name."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(directory).eval(), CLIPProcessor.from_pretrained(directory)
    figures: dict[str, Rate] = {}

    def state(name: str, hits: Sequence[bool]) -> None:
        figures[name] = rate(hits)
        say(f"{name}: {figures[name]}")

    def copy(sigma: float) -> str:
        return f", one noisy copy, sigma {sigma}" if sigma else ""

    classes = text_embeddings(model, processor, class_prompts())
    single = zero_shot_set()
    for sigma in SIGMAS:
        seen = image_embeddings(model, processor, noisy(single.images, sigma)) @ classes.T
        state(f"zero-shot, 30 classes{copy(sigma)}", (seen.argmax(1).numpy() == single.labels).tolist())
    scenes = presence_set()
    rows = np.arange(len(scenes.images))
    for sigma in SIGMAS:
        seen = image_embeddings(model, processor, noisy(scenes.images, sigma)) @ classes.T
        above = seen[rows, scenes.present] > seen[rows, scenes.absent]
        state(f"present above absent{copy(sigma)}", above.tolist())
    pairs = retrieval_set()
    captions = text_embeddings(model, processor, pairs.captions)
    for sigma in SIGMAS:
        seen = image_embeddings(model, processor, noisy(pairs.images, sigma)) @ captions.T
        for direction, similarity in (("image to text", seen), ("text to image", seen.T)):
            for places in (1, 5):
                state(f"{direction}, R@{places}{copy(sigma)}", within(similarity, places))
    return figures
