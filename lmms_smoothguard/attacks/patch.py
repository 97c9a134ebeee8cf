"""Adversarial patches (Brown et al. 2017) for one request: PGD on a small rectangle, nothing changed around it."""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType

import torch

from lmms_smoothguard.attacks.pgd import PGD, PGDOptions
from lmms_smoothguard.attacks.pictures import Objective, Pictures, Progress
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import AttackError, ConfigError, did_you_mean

PLACES = MappingProxyType(
    {
        "center": (0.5, 0.5),
        "top-left": (0.0, 0.0),
        "top-right": (1.0, 0.0),
        "bottom-left": (0.0, 1.0),
        "bottom-right": (1.0, 1.0),
    }
)
"""Where a patch lies in the room it leaves: 0 = as far left or up as it goes, 1 = as far right or down."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchOptions(PGDOptions):
    """size: the patch's share of a picture's area, at the picture's own aspect ratio; place: "center", "top-left",
    "top-right", "bottom-left", "bottom-right", "random" (a function of the attack's seed and the picture) or "x,y", as in
    `PLACES` ("x:y" where a comma separates arguments)."""

    size: float = 0.05
    place: str = "center"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.size, bool) or not isinstance(self.size, int | float) or not 0 < self.size <= 1:
            raise ConfigError(f"attack size is {self.size!r}; expected the patch's share of the picture, above 0 to 1")
        if self.place != "random":
            position(self.place)


class Patch(PGD):
    """Each of a request's pictures has a patch of its own. `eps` bounds the change inside it: 1.0 is any colour.

    Two PGDs in one: the objective sees nothing of what lies outside the patch, so no gradient points there.
    """

    options = PatchOptions
    sounds = False
    defaults = MappingProxyType({"eps": 1.0})

    @classmethod
    def check(cls, settings: AttackSettings) -> None:
        """Refuses L2, where the default `eps`, any colour a pixel, would be next to nothing."""
        if settings.norm != "linf":
            raise ConfigError(
                f"attack norm is {settings.norm!r}; attack=patch bounds every pixel of its rectangle (eps 1 = any colour), "
                "expected linf, or attack=pgd"
            )

    def search(self, objective: Objective, clean: Pictures, start: Pictures, progress: Progress) -> Pictures:
        """PGD on what the patches alone change."""
        masks = tuple(map(self._masks, clean))
        try:
            found = super().search(lambda new: objective(_within(masks, new, clean)), clean, start, progress)
        except AttackError as error:
            place, size = self.settings.options.place, self.settings.options.size
            error.add_note(f"or the processor crops the patch away: place {place}, {size:g} of the area")
            raise
        return _within(masks, found, clean)

    def to_whole_steps(self, new: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """As every attack, and outside the patches not even rounded."""
        return torch.where(self._masks(clean), super().to_whole_steps(new, clean), clean)

    def _masks(self, clean: torch.Tensor) -> torch.Tensor:
        """(batch, 1, height, width), True inside the patch."""
        height, width = clean.shape[-2:]
        share = math.sqrt(self.settings.options.size)
        tall, wide = max(1, round(height * share)), max(1, round(width * share))
        masks = torch.zeros(len(clean), 1, height, width, dtype=torch.bool, device=clean.device)
        for mask, image in zip(masks, clean, strict=True):
            x, y = self._position(image)
            top, left = round(y * (height - tall)), round(x * (width - wide))
            mask[:, top : top + tall, left : left + wide] = True
        return masks

    def _position(self, image: torch.Tensor) -> tuple[float, float]:
        if self.settings.options.place != "random":
            return position(self.settings.options.place)
        x, y = torch.rand(2, generator=self.generator(image, _PLACING)).tolist()
        return x, y


_PLACING = -1  # no restart has this number


def position(place: object) -> tuple[float, float]:
    """A place by name or as "x,y". Raises ConfigError."""
    if isinstance(place, str) and place in PLACES:
        return PLACES[place]
    try:
        x, y = (float(part) for part in str(place).replace(":", ",").split(","))
    except ValueError:
        raise ConfigError(
            f'attack place is {place!r}; {did_you_mean(str(place), [*PLACES, "random"])}, or "x,y" from 0 to 1'
        ) from None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ConfigError(f"attack place is {place!r}; expected x and y from 0 (left, top) to 1 (right, bottom)")
    return x, y


def _within(masks: Pictures, new: Pictures, clean: Pictures) -> Pictures:
    return tuple(torch.where(mask, inside, old) for mask, inside, old in zip(masks, new, clean, strict=True))
