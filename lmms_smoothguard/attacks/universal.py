"""One picture for a whole corpus (Qi et al. 2023, "Visual Adversarial Examples Jailbreak Aligned Large Language Models"), or one
change for all sounds (after Moosavi-Dezfooli et al. 2017, "Universal adversarial perturbations")."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from lmms_smoothguard.attacks.base import Attack, value_and_gradients
from lmms_smoothguard.attacks.corpus import corpus_of
from lmms_smoothguard.attacks.files import load_picture
from lmms_smoothguard.attacks.media import SOUNDS, Medium, Slots, medium_of
from lmms_smoothguard.attacks.objective import Threat
from lmms_smoothguard.attacks.pictures import Objective, Progress
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.universal_clips import load_clips
from lmms_smoothguard.errors import AttackError, ConfigError, did_you_mean
from lmms_smoothguard.sounds import Sound

OPTIMIZERS = ("adam", "sign")
_GREY = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniversalOptions:
    """corpus: where the pairs of instruction and response stand (`corpus.load_corpus`); base: path of the picture to start
    from, None = mid-grey; size: side of the grey square, None = what the model's image processor asks for; batch: pairs a
    step; optimizer: "sign" (signed gradients, as Qi et al.) or "adam", both with a step that falls to a tenth. Sounds have
    neither base nor size: what is made is a change, as long as what the model hears at once, to be added to any clip; clips: where
    those stand that it is learnt on (`universal_clips.load_clips`), for a corpus that names none of its own."""

    corpus: str | None = None
    base: str | None = None
    size: int | None = None
    batch: int = 8
    optimizer: str = "sign"
    clips: str | None = None

    def __post_init__(self) -> None:
        for name, expected in (
            ("corpus", "a file or a Hugging Face data set"),
            ("base", "the path of a picture"),
            ("clips", "a sound file, a folder of them, or a table with a column of sounds"),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ConfigError(f"attack {name} is {value!r}; expected {expected}")
        for name, value in (("batch", self.batch), ("size", 1 if self.size is None else self.size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"attack {name} is {value!r}; expected a whole number of at least 1")
        if self.base is not None and self.size is not None:
            raise ConfigError(f"attack size is {self.size!r}, but base {self.base!r} has a size; expected one of them")
        if self.clips is not None and (self.base is not None or self.size is not None):
            raise ConfigError(
                f"attack clips is {self.clips!r}, of sounds, and base is {self.base!r} and size {self.size!r}, of pictures; expected "
                "those of one medium"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"attack optimizer is {self.optimizer!r}; {did_you_mean(str(self.optimizer), OPTIMIZERS)}"
            )


class Universal(Attack):
    """Stochastic steps on one picture, or one change of sounds: every step asks the objective for minibatches anew."""

    options = UniversalOptions
    sounds = True
    defaults = MappingProxyType({"eps": 32 / 255, "steps": 500})

    @classmethod
    def check(cls, settings: AttackSettings) -> None:
        """Refuses what one picture for a corpus has no use for."""
        if settings.target is not None:
            raise ConfigError(
                f"attack target is {settings.target!r}; attack=universal forces the responses of its corpus. Expected a corpus"
            )
        if settings.loss != AttackSettings.loss:
            raise ConfigError(
                f"attack loss is {settings.loss!r}; attack=universal always lowers the cross-entropy of its corpus' responses. "
                "Expected no loss"
            )
        if settings.restarts != 1:
            raise ConfigError(
                f"attack restarts is {settings.restarts!r}; attack=universal makes one, expected 1 or other seeds"
            )
        if settings.norm != "linf":
            raise ConfigError(f"attack norm is {settings.norm!r}; attack=universal knows linf alone")

    @classmethod
    def content(cls, settings: AttackSettings) -> Mapping[str, Any]:
        """The corpus, and the picture it starts from or the digests of the clips it is learnt on."""
        own, pairs = settings.options, corpus_of(settings)
        found: dict[str, Any] = {"corpus": [pair.content for pair in pairs]}
        clips = None if own.clips is None else [sha256(clip).hexdigest() for clip in load_clips(own.clips, len(pairs))]
        return found | {"clips": clips} | ({} if own.base is None else {"base": load_picture(own.base, "base")})

    def objective(self, threat: Threat) -> Objective:
        """Refused: a request has no picture or sound of its own here."""
        raise AttackError(
            "attack=universal makes one picture for a corpus, not one for a request (of sounds one change); expected a universal crafter "
            "(lmms-eval's attack=universal), or attack=pgd with a target"
        )

    def start(self, clean: Slots, number: int) -> Slots:
        """Near the base: a wide ball's middle is a better beginning than its corners."""
        if not self.settings.random_start:
            return clean
        offsets = super().start(clean, number)
        return tuple(slot + _START * (new - slot) for new, slot in zip(offsets, clean, strict=True))

    def search(self, objective: Objective, clean: Slots, start: Slots, progress: Progress) -> Slots:
        """Projected Adam or signed gradients; `objective` may be the sum of parts, each with a graph of its own."""
        leaves, first = [slot.clone() for slot in start], self.rate(medium_of(clean))
        adam = torch.optim.Adam(leaves, lr=first)
        for number in range(self.settings.steps):
            parts = objective.parts() if isinstance(objective, InParts) else [objective]
            values, gradients = _summed(parts, tuple(leaves), first=number == 0)
            rate = first * (1 - 0.9 * number / self.settings.steps)
            if self.settings.options.optimizer == "adam":
                adam.param_groups[0]["lr"] = rate
                for leaf, towards in zip(leaves, gradients, strict=True):
                    leaf.grad = -towards
                adam.step()
            else:
                for leaf, towards in zip(leaves, gradients, strict=True):
                    leaf += rate * towards.sign()
            for leaf, old in zip(leaves, clean, strict=True):
                leaf.copy_(self.project(leaf, old))
            progress(number + 1, values)
        return tuple(leaves)

    def rate(self, medium: Medium) -> float:
        """The first step's length, in the medium's own units."""
        return self.settings.step_size or min(0.03, max(self.settings.eps / 12, medium.shortest))


_START = 0.05


class InParts:
    """An objective that is a sum, drawn anew for every step: gradients are taken part by part, so that memory holds one."""

    def __init__(self, draw: Callable[[], Sequence[Objective]]) -> None:
        self.parts = draw

    def __call__(self, slots: Slots) -> torch.Tensor:
        """(batch,): the sum of one draw."""
        return torch.stack([part(slots) for part in self.parts()]).sum(0)


def _summed(parts: Sequence[Objective], slots: Slots, *, first: bool) -> tuple[torch.Tensor, Slots]:
    found = [value_and_gradients(part, slots, first=first) for part in parts]
    values, gradients = zip(*found, strict=True)
    return torch.stack(values).sum(0), tuple(torch.stack(parts_of).sum(0) for parts_of in zip(*gradients, strict=True))


class Minibatches:
    """Draws of `count` different members, seeded and uniform, split into those that can share a forward pass.

    groups: members by whatever their shapes have in common.
    """

    def __init__(self, groups: Mapping[Any, Sequence[int]], count: int, seed: int) -> None:
        self._group_of = {member: place for place, group in enumerate(groups.values()) for member in group}
        self._count, self._random = count, np.random.default_rng(seed)

    def draw(self) -> list[list[int]]:
        """Members, group by group."""
        drawn: dict[int, list[int]] = defaultdict(list)
        for member in self._random.choice(sorted(self._group_of), size=self._count, replace=False).tolist():
            drawn[self._group_of[member]].append(member)
        return list(drawn.values())


def base_picture(settings: AttackSettings, processor: Any) -> np.ndarray:
    """(height, width, 3) uint8: the picture that the search starts from and its budget is measured from.

    Raises ConfigError for settings of sounds.
    """
    own = settings.options
    if own.clips is not None:
        raise ConfigError(
            f"attack clips is {own.clips!r}, of sounds, and what is asked has none; expected no clips for a picture"
        )
    if own.base is not None:
        return load_picture(own.base, "base")
    height, width = (own.size, own.size) if own.size is not None else _native_size(processor)
    return np.full((height, width, 3), _GREY, np.uint8)


def with_change(sound: Sound, change: Sound) -> Sound:
    """A clip with a universal change from its beginning on, as 16-bit PCM holds it: cut to the clip's length, silent after its own.

    Raises AttackError for another rate.
    """
    if sound.rate != change.rate:
        raise AttackError(f"a sound has a rate of {sound.rate} Hz, and the change {change.rate} Hz; expected one rate")
    clean = torch.from_numpy(sound.pcm.astype(np.float32) / SOUNDS.steps)[None]
    (changed,) = added((clean,), (torch.from_numpy(change.samples)[None],))
    return Sound.from_pcm((changed[0] * SOUNDS.steps).round().to(torch.int16).numpy(), sound.rate)


def added(clips: Slots, changes: Slots) -> Slots:
    """Clips (batch, samples) with the change (1, samples) on each from its beginning on, differentiably."""
    (change,) = changes
    made = []
    for slot in clips:
        fitted = torch.nn.functional.pad(change[:, : slot.shape[1]], (0, max(0, slot.shape[1] - change.shape[1])))
        made.append((slot + fitted).clamp(SOUNDS.low, SOUNDS.high))
    return tuple(made)


def _native_size(processor: Any) -> tuple[int, int]:
    """What an image processor crops or resizes to, where it says so in height and width; else CLIP-L's 336."""
    image_processor = getattr(processor, "image_processor", processor)
    for name in ("crop_size", "size"):
        size = getattr(image_processor, name, None)
        height, width = getattr(size, "height", None), getattr(size, "width", None)
        if isinstance(size, Mapping):
            height, width = size.get("height"), size.get("width")
        if height and width:
            return int(height), int(width)
    return 336, 336
