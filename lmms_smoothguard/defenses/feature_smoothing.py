"""Feature-space smoothing as a defence: one answer, from a vision tower whose features are means over noisy passes."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

from lmms_smoothguard.boosting.booster import load_booster
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.defenses import smoothguard
from lmms_smoothguard.defenses.request import Defended, Defense, Request
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.noise import NOISE, Inside, Randomness
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig, check_smoothing
from lmms_smoothguard.smoothing.context import make_smoother, smoothed
from lmms_smoothguard.smoothing.noise import DrawnNoise
from lmms_smoothguard.smoothing.towers import find_tower


def defend(request: Request, config: FeatureSmoothingConfig) -> Defended | None:
    """The model's own answer, its vision tower smoothed; None where there is no picture.

    Raises UndefendableError where the tower cannot be smoothed, or did not see the request's pictures.
    """
    if request.images() is None:
        return None
    with smoothed(request.model, config, request.image_processor) as smoother:
        output = request.generate(**request.arguments)
    if not smoother.calls:
        raise UndefendableError(
            f"generate() of {type(request.model).__name__} never called its vision tower {smoother.tower.name}, so this answer would "
            "be undefended; expected a model that reads pictures through it. Use defense=smoothguard"
        )
    return Defended(output, [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CombinedConfig(SmoothGuardConfig):
    """SmoothGuard over a smoothed vision tower: N noisy copies, each answered through feature smoothing.

    All of SmoothGuard's fields, whose noise comes first and has to leave pictures pictures (noise_space "pixel"); feature_samples, feature_sigma, booster, mapper: `num_samples`, `sigma`,
    `booster` and `mapper` of feature smoothing.
    """

    noise_space: str = "pixel"
    feature_samples: int = 8
    feature_sigma: float = 0.1
    booster: str | None = None
    mapper: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_space != "pixel":
            raise ConfigError(
                f"noise_space is {self.noise_space!r}; expected 'pixel' here, for the smoothed tower takes copies as pictures, with "
                "values from 0 to 1"
            )
        check_smoothing("feature_samples", self.feature_samples, "feature_sigma", self.feature_sigma)
        self.features()

    def features(self) -> FeatureSmoothingConfig:
        """The part that is feature smoothing's."""
        return FeatureSmoothingConfig(
            num_samples=self.feature_samples,
            sigma=self.feature_sigma,
            booster=self.booster,
            mapper=self.mapper,
            seed=self.seed,
        )


def defend_both(request: Request, config: CombinedConfig) -> Defended | None:
    """SmoothGuard's answer, every copy of it through the smoothed tower; None where there is no picture."""
    if request.images() is None:
        return None
    with smoothed(request.model, config.features(), request.image_processor) as smoother:
        defended = smoothguard.defend(request, config)
    if not smoother.calls:
        raise UndefendableError(
            f"generate() of {type(request.model).__name__} never called its vision tower {smoother.tower.name}; use "
            "defense=smoothguard"
        )
    return defended


def _check(model: Any, config: FeatureSmoothingConfig, image_processor: Any) -> None:
    """A model without a tower, another model's booster, a noise level it was not trained on, pixels without a scale."""
    make_smoother(model, config, image_processor)


def _check_both(model: Any, config: CombinedConfig, image_processor: Any) -> None:
    _check(model, config.features(), image_processor)


# -- what an adaptive attacker averages over ---------------------------------------------------------------------------


def _inside(inside: Inside, config: FeatureSmoothingConfig) -> AbstractContextManager[Any]:
    """The attacked model's own forward, smoothed with as many passes as the attacker draws."""
    drawn = dataclasses.replace(config, num_samples=max(2, inside.draws), max_copies_per_batch=None)
    return smoothed(inside.model, drawn, inside.image_processor, DrawnNoise(config.sigma, inside.generators))


def _inside_both(inside: Inside, config: CombinedConfig) -> AbstractContextManager[Any]:
    """Two passes for every noisy copy that the attacker draws."""
    return _inside(inside._replace(draws=2), config.features())


def _booster(model: Any, config: FeatureSmoothingConfig | CombinedConfig) -> Any:
    """Which weights purify and map."""
    if config.booster is None:
        return None
    return load_booster(config.booster, find_tower(model), mapper=config.mapper).digest


DEFENSE = Defense(
    FeatureSmoothingConfig, defend, Randomness(("sigma", "mapper"), inside=_inside, content=_booster), _check
)
COMBINED = Defense(
    CombinedConfig,
    defend_both,
    Randomness((*NOISE.fields, "feature_sigma", "mapper"), NOISE.draw, _inside_both, _booster),
    _check_both,
)
