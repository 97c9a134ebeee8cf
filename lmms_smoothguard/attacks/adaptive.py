"""What an attacker knows of a defence: its randomness, averaged over with draws of the attacker's own (EOT)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.media import Slots
from lmms_smoothguard.attacks.objective import InnerDraws, Jitter, Perturb, attackers_generator
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.inputs.statistics import PixelStatistics, pixel_statistics
from lmms_smoothguard.noise import Draw, Inside, Randomness


class Adaptive:
    """The defence before and inside one model; None for an attacker of the bare model."""

    def __init__(self, model: Any, processor: Any, defense: Choice | None) -> None:
        self._model, self._processor, self._defense = model, processor, defense

    def _known_randomness(self, eot: int, *, sounds: bool = False) -> dict[str, Any] | None:
        """The defence that EOT averages over, as far as its randomness hangs on it; None without EOT."""
        if not eot:
            return None
        if self._defense is None or (randomness := _randomness_of(self._defense)) is None:
            name = "none" if self._defense is None else self._defense.name
            raise AttackError(
                f"attack_eot is {eot}, an average over the defence's randomness, and defense={name} shows none; expected a "
                "defence with `randomness`, such as defense=smoothguard"
            )
        if sounds and randomness.sound is None:
            raise AttackError(
                f"attack_eot is {eot}, an average over the defence's randomness, and defense={self._defense.name} shows none on "
                "sounds; expected defense=smoothguard, or attack_eot=0"
            )
        names = randomness.sound_fields if sounds else randomness.fields
        if "seed" in names:
            raise AttackError(
                f"the randomness of defence {self._defense.name!r} hangs on its seed; expected a distribution, for no attacker "
                "knows the seed that an answer is given with"
            )
        fields = {field: getattr(self._defense.config, field) for field in names}
        if randomness.content is not None and not sounds:
            fields["content"] = randomness.content(self._model, self._defense.config)
        return {"defense": self._defense.name, **fields, "code": plugins.provenance("defenses", self._defense.name)}

    def _chance(
        self, settings: AttackSettings, keys: Sequence[str], inner: InnerDraws | None, *, sounds: bool = False
    ) -> dict[str, Any]:
        """The attacker's draws of the defence's randomness, before the model and inside it, as a threat has them."""
        if not settings.eot:
            return {}
        assert self._defense is not None
        randomness = _randomness_of(self._defense)
        assert randomness is not None
        if sounds:
            assert randomness.sound is not None
            return {"jitter": self._jitter(settings, keys, randomness.sound), "draws": settings.eot}
        found: dict[str, Any] = {}
        if randomness.draw is not None:
            found |= {"perturb": self._perturbation(settings, keys, randomness.draw), "draws": settings.eot}
        if inner is not None:
            found["expect"] = functools.partial(inner.expect, keys)
        return found

    def _perturbation(
        self, settings: AttackSettings, keys: Sequence[str], drawn: Callable[[Draw, Any], torch.Tensor]
    ) -> Perturb:
        """One draw of the defence's randomness a call, keyed by the attacker's seed and each row's own key.

        So a row's draws depend on no neighbour, restarts of a row share them, and evaluation seeds stay unseen.
        """
        assert self._defense is not None
        config, draws = _without_seed(self._defense.config), itertools.count()

        def perturb(rendered: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
            images = find_images(rendered, self._model.config)
            if images is None:
                raise AttackError("the image processor rendered no pixels; expected pixel_values")
            draw, slots = next(draws), range(len(images.slices) // rows)
            places = itertools.product(list(keys) * (rows // len(keys)), slots)
            generators = [attackers_generator(settings.seed, key, slot, draw) for key, slot in places]
            return drawn(Draw(images, generators, self._statistics), config)

        return perturb

    def _jitter(
        self,
        settings: AttackSettings,
        keys: Sequence[str],
        drawn: Callable[[torch.Tensor, Sequence[torch.Generator], Any], torch.Tensor],
    ) -> Jitter:
        """`_perturbation` on waveforms."""
        assert self._defense is not None
        config, draws = _without_seed(self._defense.config), itertools.count()

        def jitter(sounds: Slots) -> Slots:
            draw, rows = next(draws), list(keys) * (len(sounds[0]) // len(keys))
            return tuple(
                drawn(clips, [attackers_generator(settings.seed, key, slot, draw) for key in rows], config)
                for slot, clips in enumerate(sounds)
            )

        return jitter

    @contextlib.contextmanager
    def _attacked(self, settings: AttackSettings, *, sounds: bool = False) -> Iterator[InnerDraws | None]:
        """The model as it is attacked: with what the defence does inside it under EOT, whose chance is handed out; else bare."""
        randomness = _randomness_of(self._defense) if settings.eot and self._defense is not None else None
        if self._defense is None or randomness is None or randomness.inside is None or sounds:
            yield None
            return
        processor, inner = getattr(self._processor, "image_processor", self._processor), InnerDraws(settings.seed)
        config = _without_seed(self._defense.config)
        with randomness.inside(Inside(self._model, processor, settings.eot, inner), config):
            yield inner

    def _statistics(self) -> PixelStatistics:
        return pixel_statistics(self._model, getattr(self._processor, "image_processor", self._processor))


def _without_seed(config: Any) -> Any:
    """A defence's settings as an attacker knows them."""
    if not any(field.name == "seed" for field in dataclasses.fields(config)):
        return config
    return dataclasses.replace(config, seed=None)


def _randomness_of(defense: Choice) -> Randomness | None:
    return getattr(plugins.load("defenses", defense.name), "randomness", None)
