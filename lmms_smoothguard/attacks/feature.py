"""Attacks on what the vision side makes of a picture; no answer is needed.

Towards a target picture's features, as in M-Attack (Li et al. 2025) with its random crops; towards a text's embedding; or
away from the clean picture's own features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from lmms_smoothguard.attacks.crops import random_crops
from lmms_smoothguard.attacks.features import image_features, text_feature
from lmms_smoothguard.attacks.files import load_picture
from lmms_smoothguard.attacks.objective import Threat
from lmms_smoothguard.attacks.pgd import PGD, PGDOptions
from lmms_smoothguard.attacks.pictures import Objective, Pictures, repeated
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.inputs.tiling import tile_media


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureOptions(PGDOptions):
    """target_image: path of a picture to be taken for; target_text: a text to be taken for (a weak target, see
    `features.text_feature`); neither: away from the clean picture. crops: random crops a step, 0 = the whole picture;
    crop_low: the smallest crop's share of the picture."""

    target_image: str | None = None
    target_text: str | None = None
    crops: int = 0
    crop_low: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_image is not None and self.target_text is not None:
            raise ConfigError(
                f"attack target_image is {self.target_image!r} and target_text {self.target_text!r}; expected one of them"
            )
        for name in ("target_image", "target_text"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                expected = "the path of a picture" if name == "target_image" else "words"
                raise ConfigError(f"attack {name} is {value!r}; expected {expected}")
        if isinstance(self.crops, bool) or not isinstance(self.crops, int) or self.crops < 0:
            raise ConfigError(f"attack crops is {self.crops!r}; expected a whole number of at least 0")
        low = self.crop_low
        if isinstance(low, bool) or not isinstance(low, int | float) or not 0 < low <= 1:
            raise ConfigError(f"attack crop_low is {low!r}; expected a share of the picture, above 0 to 1")


class Feature(PGD):
    """PGD on cosines of projected image tokens."""

    options = FeatureOptions
    sounds = False
    defaults = MappingProxyType({"eps": 8 / 255})

    @classmethod
    def check(cls, settings: AttackSettings) -> None:
        """Refuses a text to be forced, a loss over answers, and a start where the gradient is zero."""
        if settings.target is not None:
            raise ConfigError(
                f"attack target is {settings.target!r}, an answer to be forced; attack=feature knows no answers. Expected "
                "target_text or target_image, or attack=pgd"
            )
        if settings.loss != AttackSettings.loss:
            raise ConfigError(
                f"attack loss is {settings.loss!r}, of answers; attack=feature compares image tokens. Expected no loss, or "
                "attack=pgd"
            )
        own = settings.options
        if own.target_image is None and own.target_text is None and not settings.random_start:
            raise ConfigError(
                "attack random_start is False; away from the clean picture's features no gradient leads at the picture "
                "itself. Expected true, or a target_image or target_text"
            )

    @classmethod
    def rows(cls, settings: AttackSettings) -> int:
        """Every crop's gradient is kept until all are added."""
        return super().rows(settings) * max(1, int(settings.options.crops))

    @classmethod
    def content(cls, settings: AttackSettings) -> Mapping[str, Any]:
        """The target picture's pixels."""
        path = settings.options.target_image
        return {} if path is None else {"target_image": load_picture(path, "target_image")}

    def objective(self, threat: Threat) -> Objective:
        """Cosine to the target, or minus the cosine to the clean picture."""
        generators = [self._crop_generator(threat.clean, row) for row in range(len(threat.clean[0]))]
        return FeatureLoss(threat, self.settings.options, generators)

    def _crop_generator(self, clean: Pictures, row: int) -> torch.Generator:
        return self.generator(torch.cat([slot[row].flatten() for slot in clean]), _CROPPING)


_CROPPING = -1  # no restart has this number


class FeatureLoss:
    """Cosines of image tokens, meaned over draws of crops and of a defence's noise.

    Whole pictures are compared token by token; crops, which show other places than the target's, by their mean token, and a
    text too.
    """

    def __init__(self, threat: Threat, options: FeatureOptions, generators: list[torch.Generator]) -> None:
        self._threat, self._options, self._generators = threat, options, generators
        # A Q-Former reads the question; no other model's image tokens depend on anything of the prompt.
        names = [name for name in threat.prompts[0] if name.startswith("qformer_")]
        self._text = {name: torch.cat([prompt[name] for prompt in threat.prompts]) for name in names}
        self._sign = 1.0
        self._goal: Pictures | None = None
        if options.target_text is not None:
            self._fixed = text_feature(threat.model, threat.processor, options.target_text).expand(
                len(generators), 1, -1
            )
            return
        if options.target_image is not None:
            self._goal = tuple(_fitted(options.target_image, slot) for slot in threat.clean)
        else:
            self._goal, self._sign = threat.clean, -1.0
        with torch.no_grad():
            self._fixed = self._features(self._goal, noisy=False)

    def __call__(self, pictures: Pictures) -> torch.Tensor:
        """(R * batch,): larger is better for the attacker."""
        if not self._options.crops:
            return self._sign * self._likeness(pictures, self._fixed)
        return self._sign * torch.stack([self._cropped(pictures) for _ in range(self._options.crops)]).mean(0)

    def _cropped(self, pictures: Pictures) -> torch.Tensor:
        """Crops are held against the features of crops of the target, drawn apart (M-Attack, section 3)."""
        low = self._options.crop_low
        shown = random_crops(pictures, self._generators, low)
        if self._goal is None:
            return self._likeness(shown, self._fixed)
        with torch.no_grad():
            goal = self._features(random_crops(self._goal, self._generators, low), noisy=False)
        return self._likeness(shown, goal)

    def _likeness(self, pictures: Pictures, goal: torch.Tensor) -> torch.Tensor:
        rows = len(pictures[0])
        found = self._features(pictures, noisy=True)
        if self._options.crops or self._options.target_text is not None:
            found, goal = found.mean(1, keepdim=True), goal.mean(1, keepdim=True)
        goal = goal.repeat(len(found) // len(goal), 1, 1)
        return cosine_similarity(found, goal, dim=-1).mean(1).view(-1, rows).mean(0)

    def _features(self, pictures: Pictures, *, noisy: bool) -> torch.Tensor:
        """(rows, tokens, width) of the bare pictures, or (draws * rows, ...) of every draw of the defence's noise."""
        rows = len(pictures[0])
        rendered, draws = self._threat.rendered(pictures, noisy=noisy)
        text = {name: torch.cat([value] * (rows // len(self._generators))) for name, value in self._text.items()}
        inputs = tile_media({**text, **rendered}, draws)
        return image_features(self._threat.model, inputs, rows * len(draws))


def _fitted(path: str, slot: torch.Tensor) -> torch.Tensor:
    """The target picture at the size of a slot's pictures, once a row: so it has as many image tokens."""
    from PIL import Image

    height, width = slot.shape[-2:]
    image = Image.fromarray(load_picture(path, "target_image")).resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]
    return repeated((pixels.to(slot),), len(slot))[0]
