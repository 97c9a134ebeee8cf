"""The pictures of one attacked sample: clean, adversarial, their difference magnified, and a noisy copy."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.runs import Sample
from lmms_smoothguard.report.documents import document_of


class Pictures(NamedTuple):
    """uint8 arrays (height, width, 3); `difference` is mid-grey plus `magnified` times adversarial minus clean.

    `noisy` is noisy copy 1 of the adversarial picture at the model's own resolution: bit for bit what the model was
    given, rounded to 8 bits.
    """

    clean: np.ndarray
    adversarial: np.ndarray
    difference: np.ndarray
    noisy: np.ndarray
    magnified: int


class Gallery:
    """Makes the pictures of a run's samples from its attack cache; nothing is crafted or answered again."""

    def __init__(self, cache: Path, task: str, model: Path, config: SmoothGuardConfig) -> None:
        """`config`: the defence that the run used; `model`: the directory of the model that it defended."""
        self._cache, self._task, self._model, self._config = AttackCache(cache), task, model, config

    def of(self, sample: Sample) -> Pictures:
        """Raises SmoothGuardError when the log names no adversarial image, or the cache no longer has that image."""
        document = document_of(self._task, sample, with_images=True)
        clean = np.asarray(Image.open(io.BytesIO(document["image"]["bytes"])).convert("RGB"))
        adversarial = self._adversarial(sample, clean)
        change = adversarial.astype(int) - clean
        magnified = max(1, 127 // max(1, int(np.abs(change).max())))
        difference = np.clip(128 + magnified * change, 0, 255).astype(np.uint8)
        return Pictures(clean, adversarial, difference, self._noisy(adversarial, document["question"]), magnified)

    def _adversarial(self, sample: Sample, clean: np.ndarray) -> np.ndarray:
        where = f"{self._task}[{sample.question_id}]"
        key = sample.info.get("attack_key")
        if not key:
            raise SmoothGuardError(f"the log of {where} has no attack_key; it is of an older version, so run it again")
        entry = self._cache.get(key)
        if entry is None:
            raise SmoothGuardError(
                f"the adversarial image of {where} is not in {self._cache.root} (entry {key}); run the demo again, which "
                "crafts what is missing"
            )
        image = entry.images[0]
        largest = float(np.abs(image.astype(int) - clean).max()) / 255
        if abs(largest - sample.info["attack_linf"]) > 1e-5:
            raise SmoothGuardError(
                f"the adversarial image of {where} is {largest:.5f} from the clean one, but its log says "
                f"{sample.info['attack_linf']:.5f}; expected the image of that very run, so run it again"
            )
        return image

    @functools.cached_property
    def _processor(self) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self._model)

    @functools.cached_property
    def _model_config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._model)

    def _noisy(self, picture: np.ndarray, question: str) -> np.ndarray:
        """Copy 1 as the defence drew it: same image tensor, settings and seed, hence the same noise."""
        from lmms_smoothguard.inputs.media import find_images
        from lmms_smoothguard.inputs.statistics import statistics_of
        from lmms_smoothguard.noise import NoiseSource
        from lmms_smoothguard.tiny.model import prompt

        inputs = self._processor(images=[Image.fromarray(picture)], text=prompt(question), return_tensors="pt")
        images = find_images(inputs, self._model_config)
        statistics = statistics_of(self._processor.image_processor, "processor")
        if images is None or statistics is None:
            raise SmoothGuardError(
                f"the processor in {self._model} gives no pixels, or no mean and std to show them by"
            )
        source = NoiseSource(
            images,
            sigma=self._config.sigma,
            statistics=statistics if self._config.noise_space == "pixel" else None,
            seed=self._config.seed,
        )
        pixels = source.copy(1)[0].float() * statistics.std[:, None, None] + statistics.mean[:, None, None]
        return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
