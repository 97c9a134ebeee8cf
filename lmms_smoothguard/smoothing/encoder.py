"""A vision tower as certificates take it: clean features of one picture, and features of noisy copies of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.smoothing.context import make_smoother
from lmms_smoothguard.smoothing.features import normalized
from lmms_smoothguard.smoothing.noise import DrawnNoise
from lmms_smoothguard.smoothing.towers import Tower, find_tower


class Call(NamedTuple):
    """What the model calls its vision tower with for one request: the `pixels` of this encoder."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Reached(Exception):
    """The tower was called: nothing behind it is needed."""


def tower_call(tower: Tower, run: Callable[[], Any]) -> Call:
    """How the tower is called when the model runs; the model is stopped there.

    Raises UndefendableError where it runs without calling the tower.
    """
    seen: list[Call] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call(args, kwargs))
        raise _Reached

    hook = tower.module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.inference_mode():
            run()
    except _Reached:
        return seen[0]
    finally:
        hook.remove()
    raise UndefendableError(f"the model ran without its vision tower {tower.name}; expected a request with a picture")


class TowerEncoder:
    """`certify.Encoder` of a model's vision tower: the tokens that the language model reads of it (the projected embedding of a
    dual encoder), with the booster behind noisy copies alone.

    config: sigma and booster; `max_copies_per_batch` copies at once.
    """

    def __init__(self, model: Any, config: FeatureSmoothingConfig, image_processor: Any = None) -> None:
        self.model, self.config, self._processor = model, config, image_processor
        self.tower = find_tower(model)
        booster = make_smoother(model, config, image_processor).booster  # refuses now what it cannot smooth
        self.booster_digest = None if booster is None else booster.digest

    @property
    def sigma(self) -> float:
        """In [0, 1] pixel units."""
        return self.config.sigma

    @torch.inference_mode()
    def clean(self, pixels: Call) -> torch.Tensor:
        """(T, d): rows and selected layers one behind the other."""
        output = self.tower.module(*pixels.args, **pixels.kwargs)
        layers = [normalized(layer)[0] for layer in self.tower.selected(output)]
        return torch.cat(layers, dim=1).flatten(0, 1)

    def noisy(self, pixels: Call, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """(copies, T, d) parts. Each picture of a call has a generator of its own, so batches change no draw."""
        seeds: list[int] = []

        def own(pictures: int) -> Sequence[torch.Generator]:
            while len(seeds) < pictures:
                seeds.append(int(torch.randint(2**62, (), generator=generator)))
            return [torch.Generator().manual_seed(seed) for seed in seeds[:pictures]]

        config = dataclasses.replace(self.config, num_samples=max(2, count))
        smoother = make_smoother(self.model, config, self._processor, DrawnNoise(self.sigma, own))
        smoother.samples = count
        with torch.inference_mode():
            for features in smoother.features(*pixels.args, **pixels.kwargs):
                yield features.flatten(1, 2)
