"""From [0, 1] pixels to the model's input tensors, differentiably, through the model's own image processor; sounds have a
renderer of their own (`sound_rendering`).

torchvision-backed processors keep the autograd graph of float tensors. Whether the path ends where the ordinary 8-bit path
ends is checked on the clean images, every time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from lmms_smoothguard.attacks.media import Slots
from lmms_smoothguard.attacks.pictures import Pictures
from lmms_smoothguard.errors import AttackError

PIXELS = "pixel_values"
log = logging.getLogger(__name__)
EXACT_ENOUGH = 0.03
"""Mean absolute difference from the 8-bit path, in normalised units (two grey levels of CLIP's), that a resize explains:
it rounds and clips there, and not here. Beyond it something else happens to the image, such as JPEG."""
_TOO_FAR = 0.15


class Rendering(Protocol):
    """What attacks ask of a renderer. key: the model's input that is attacked."""

    key: str

    def __call__(self, slots: Slots, /) -> dict[str, torch.Tensor]:
        """The model's inputs for slots of any number of rows, `key` among them, differentiably."""

    def check(self, clean: Slots, captured: Mapping[str, Any], key: str, /) -> list[float]:
        """How far each request is from what the ordinary path gave. Raises AttackError for another path."""


class Renderer:
    """Renders a batch of pictures to what the ordinary path gives: pixel_values and, for some models, their sizes.

    processor: the model's whole processor, whose settings for images count too (InternVL's cuts them into tiles), or its
    image processor alone.
    """

    def __init__(self, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._processor = getattr(processor, "image_processor", processor)
        self._settings = _settings_for_images(processor)
        self._device, self._dtype = device, dtype
        self.key = PIXELS
        self._nested = False
        self._wanted: frozenset[str] | None = None

    def __call__(self, pictures: Pictures) -> dict[str, torch.Tensor]:
        """Tensors of the whole batch, images in the order of rows, then slots."""
        # In grey levels, as files are: what a processor paints around a picture (LLaVA-OneVision's mean colour) is too.
        rows = [[slot[row] * 255 for slot in pictures] for row in range(len(pictures[0]))]
        images = rows if self._nested else [image for row in rows for image in row]
        try:
            batch = self._processor(images=images, **self._settings | {"return_tensors": "pt"})
        except (TypeError, ValueError, RuntimeError) as error:
            raise AttackError(
                f"{type(self._processor).__name__} takes no float tensors ({error}), so no gradient reaches the pixels; "
                "expected a torchvision-backed image processor (install torchvision, use_fast=True)"
            ) from error
        if not isinstance(batch, Mapping):
            raise AttackError(
                f"{type(self._processor).__name__} gives a bare {type(batch).__name__}; expected tensors by their names. Attacks "
                "through it are not supported."
            )
        return {
            key: value.to(self._device, self._dtype if value.is_floating_point() else None)
            for key, value in batch.items()
            if isinstance(value, torch.Tensor) and (self._wanted is None or key in self._wanted)
        }

    def check(self, clean: Pictures, captured: Mapping[str, Any], key: str) -> list[float]:
        """Each request's mean difference between the clean pictures rendered here and what the ordinary path made of
        them, in normalised units. Raises AttackError where they are not the same picture."""
        if key not in captured:
            raise AttackError(
                f"the request has no {key} (it has {', '.join(captured)}), which is what is attacked; expected a model that takes "
                "its pictures so"
            )
        expected = captured[key].float()
        self._wanted = frozenset(captured)  # processors keep counts of tiles and crops to themselves
        problem = ""
        for nested in (False, True):
            self._nested = nested
            try:
                rendered = self(clean).get(key)
            except AttackError as error:
                problem = problem or str(error)
                continue
            if rendered is None:
                problem = "the image processor makes no tensor of that name of its own"
                continue
            if rendered.shape != expected.shape:
                problem = f"shape {tuple(rendered.shape)} instead of {tuple(expected.shape)}"
                continue
            gaps: list[float] = (rendered.float() - expected).abs().reshape(len(clean[0]), -1).mean(1).tolist()
            if max(gaps) <= _TOO_FAR:
                return gaps
            problem = f"{max(gaps):.3g} off on average in one request, in normalised units"
        raise AttackError(
            f"the differentiable preprocessing does not reproduce {key}: {problem}. The caller preprocesses images in a "
            "way of its own, so an attack would be scored on other pixels than it was crafted on."
        )


def warn_of(gaps: Sequence[float]) -> None:
    """Says where requests are attacked through less than their whole path."""
    if max(gaps) > EXACT_ENOUGH:
        log.warning(
            "the caller changes images before the model sees them (%.3g off on average, in normalised units; JPEG, "
            "perhaps): the attack is crafted without that step and scored with it, so it is weaker than it could be",
            max(gaps),
        )


def _settings_for_images(processor: Any) -> dict[str, Any]:
    """What a whole processor passes to its image processor unless told otherwise; nothing for an image processor."""
    if not hasattr(processor, "image_processor"):
        return {}
    defaults = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {})
    return {**getattr(processor, "images_kwargs", {}), **defaults.get("images_kwargs", {})}
