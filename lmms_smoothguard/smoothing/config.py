"""What feature smoothing is asked to do."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lmms_smoothguard.errors import ConfigError

LARGEST_SIGMA = 5.0
"""Beyond this no picture is left in any sense."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSmoothingConfig:
    """Feature-space smoothing: the vision tower's features are means over noisy passes; the language model runs once.

    num_samples: n0, noisy passes a picture; sigma: standard deviation of the noise in [0, 1] pixel units at the model's
        resolution.
    booster: None, `psm` or `gsb` (the embedded model's own), a directory that `smoothguard train booster` has filled, a hub id,
        or a diffusers pipeline of an unconditional diffusion model, whose denoiser purifies.
    mapper: whether the booster's mapper is used too, where it has one.
    seed: base seed of the noise; None draws fresh entropy for every request. Serve strangers with None: public noise is a fixed
        function that an attacker can optimise against.
    max_copies_per_batch: None = all passes at once, fewer after an out-of-memory error.
    """

    num_samples: int = 8
    sigma: float = 0.3
    booster: str | None = None
    mapper: bool = True
    seed: int | None = 0
    max_copies_per_batch: int | None = None

    def __post_init__(self) -> None:
        check_smoothing("num_samples", self.num_samples, "sigma", self.sigma)
        if self.booster is not None and (not isinstance(self.booster, str) or not self.booster.strip()):
            raise ConfigError(f"booster is {self.booster!r}; expected psm, gsb, a directory or a hub id")
        if not isinstance(self.mapper, bool):
            raise ConfigError(f"mapper is {self.mapper!r}; expected true or false")
        for name, least in (("seed", 0), ("max_copies_per_batch", 1)):
            value = getattr(self, name)
            if value is not None and not _whole(value, least):
                raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {least}, or null")


def check_smoothing(samples_name: str, samples: Any, sigma_name: str, sigma: Any) -> None:
    """Raises ConfigError for fewer than two passes, or a sigma that smooths nothing or everything; names are the user's."""
    if not _whole(samples, 2):
        raise ConfigError(
            f"{samples_name} is {samples!r}; expected a whole number of at least 2: the mean of noisy passes"
        )
    if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not math.isfinite(sigma):
        raise ConfigError(f"{sigma_name} is {sigma!r}; expected a number such as 0.25")
    if not 0 < sigma <= LARGEST_SIGMA:
        raise ConfigError(
            f"{sigma_name} is {sigma!r}; expected more than 0, for without noise nothing is smoothed, and at most "
            f"{LARGEST_SIGMA:g}, in [0, 1] pixel units. To answer undefended: defense=none"
        )


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
