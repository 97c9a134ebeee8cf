"""The pictures of one attacked sample."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.runs import Sample
from lmms_smoothguard.report.gallery import Exhibit, Exhibits, Gallery


class PictureGallery(Gallery):
    """The difference is around mid-grey; the noisy copy is at the model's own resolution."""

    medium = "image"

    def of(self, sample: Sample) -> Exhibits:
        document = self.document(sample)
        clean = np.asarray(Image.open(io.BytesIO(document["image"]["bytes"])).convert("RGB"))
        adversarial = self.entry(sample).images[0]
        change = adversarial.astype(int) - clean
        largest = int(np.abs(change).max())
        self.check(sample, largest / 255)
        magnified = max(1, 127 // max(1, largest))
        difference = np.clip(128 + magnified * change, 0, 255).astype(np.uint8)
        return Exhibits(
            {
                "clean": Exhibit(clean),
                "adversarial": Exhibit(adversarial),
                "difference": Exhibit(difference),
                "noisy": Exhibit(self._noisy(adversarial, document["question"])),
            },
            magnified,
            f"at most {largest} grey levels",
        )

    def _noisy(self, picture: np.ndarray, question: str) -> np.ndarray:
        """Copy 1 as the defence drew it: same image tensor, settings and seed, hence the same noise."""
        from lmms_smoothguard.inputs.media import find_images
        from lmms_smoothguard.inputs.statistics import statistics_of
        from lmms_smoothguard.noise import NoiseSource
        from lmms_smoothguard.tiny.model import prompt

        inputs = self.processor(images=[Image.fromarray(picture)], text=prompt(question), return_tensors="pt")
        images = find_images(inputs, self.model_config)
        statistics = statistics_of(self.processor.image_processor, "processor")
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
