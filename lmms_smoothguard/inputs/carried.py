"""Sounds beside their features: what a protected processor hands to `generate`, so that noise can go where it belongs.

`generate` sees log-mel features, and noise on those is not noise on the waveform. So every call of a feature extractor is kept, with
the clips it was given and how, and made again with noisy clips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.sounds import beyond_full_scale

CLIPS = "smoothguard_clips"
"""The key under which they travel with a processor's output."""

Arrange = Callable[[Sequence[torch.Tensor], torch.Size], torch.Tensor]


class Extraction(NamedTuple):
    """One call of a feature extractor. clips: (n,) float32 each; options: its keyword arguments; features: what came out."""

    clips: tuple[np.ndarray, ...]
    options: Mapping[str, Any]
    features: torch.Tensor


def _joined(parts: Sequence[torch.Tensor], like: torch.Size) -> torch.Tensor:
    return torch.cat(list(parts))


def _windows(parts: Sequence[torch.Tensor], like: torch.Size) -> torch.Tensor:
    """Frames of each clip cut into windows, one behind the other, as Voxtral's processor does it."""
    cut = [part.reshape(part.shape[0], part.shape[1], -1, like[-1]).transpose(1, 2).flatten(0, 1) for part in parts]
    return torch.cat(cut)


def _lengthened(parts: Sequence[torch.Tensor], like: torch.Size) -> torch.Tensor:
    """Frames, which stand before the channels, filled up with zeros, as NeMo's processor does it."""
    return torch.nn.functional.pad(torch.cat(list(parts)), (0, 0, 0, like[1] - parts[0].shape[1]))


_ARRANGEMENTS = (_joined, _windows, _lengthened)


@dataclass(frozen=True, eq=False)
class CarriedClips:
    """The clips of a request, and the way from them to its features.

    extractor: the processor's own; name: of its features among its outputs; key: of the request's features; features: as they left
    the processor; arrange: what the processor did to the extractor's outputs, given the shape of the features; problem: why this
    cannot be done, where it cannot.
    """

    extractor: Any
    name: str
    calls: tuple[Extraction, ...]
    key: str
    features: torch.Tensor | None
    arrange: Arrange = _joined
    problem: str = ""

    def to(self, *_: Any, **__: Any) -> CarriedClips:
        """Itself: clips and extractor stay where they are, whatever device the rest of the inputs goes to."""
        return self

    def __len__(self) -> int:
        return sum(len(call.clips) for call in self.calls)

    @property
    def clips(self) -> tuple[np.ndarray, ...]:
        """All of them, (n,) float32 each, in order."""
        return tuple(clip for call in self.calls for clip in call.clips)

    def extract(self, versions: Sequence[Sequence[np.ndarray]]) -> list[torch.Tensor]:
        """Features of several versions of all clips, each in the shape of the request's own; every extractor call is made once, for
        all versions together."""
        assert self.features is not None
        made: list[list[torch.Tensor]] = [[] for _ in versions]
        first = 0
        for call in self.calls:
            places = slice(first, first + len(call.clips))
            first = places.stop
            together = self.extractor(
                [np.asarray(clip) for version in versions for clip in version[places]], **call.options
            )
            parts = torch.as_tensor(together[self.name]).split(len(call.features))
            for version, part in zip(made, parts, strict=True):
                version.append(part)
        return [self.arrange(parts, self.features.shape) for parts in made]


def carried(
    extractor: Any, calls: Sequence[Extraction], key: str, name: str, features: Any, maker: str, problem: str = ""
) -> CarriedClips:
    """What goes along with a processor's output; `maker` names the processor; `problem`: what stands in the way already."""
    tensor = (
        features.clone() if isinstance(features, torch.Tensor) else None
    )  # the caller may write into the request's own
    if problem:
        return CarriedClips(extractor, name, tuple(calls), key, tensor, problem=problem)
    for arrange in _ARRANGEMENTS if tensor is not None else ():
        if tensor is not None and _gives(arrange, [call.features for call in calls], tensor):
            return CarriedClips(extractor, name, tuple(calls), key, tensor, arrange)
    problem = (
        f"{maker} gave {key} as a {type(features).__name__}; expected a tensor (return_tensors='pt')"
        if tensor is None
        else f"{maker} makes {key} from its {type(extractor).__name__}'s outputs in a way of its own, which is not known"
    )
    return CarriedClips(extractor, name, tuple(calls), key, tensor, problem=problem)


def _gives(arrange: Arrange, parts: Sequence[torch.Tensor], features: torch.Tensor) -> bool:
    try:
        made = arrange(parts, features.shape)
    except (RuntimeError, IndexError):
        return False
    # Features of NaN have an error of their own.
    return made.shape == features.shape and torch.equal(made.to(features).nan_to_num(), features.nan_to_num())


def joined(found: Sequence[CarriedClips]) -> CarriedClips:
    """Those of several processor calls whose outputs were put into one batch, as pipelines do it. Raises UndefendableError for calls
    of different processors, or whose features had to be padded."""
    first = found[0]
    if problem := next((one.problem for one in found if one.problem), ""):
        return CarriedClips(first.extractor, first.name, first.calls, first.key, first.features, problem=problem)
    tensors = [one.features for one in found if one.features is not None]
    if (
        any(one.extractor is not first.extractor or one.key != first.key for one in found)
        or len({tensor.shape[1:] for tensor in tensors}) > 1
    ):
        shapes = ", ".join(f"{one.key} {tuple(one.features.shape)}" for one in found if one.features is not None)
        raise UndefendableError(
            f"a batch was made of {len(found)} calls of a processor, which gave {shapes}; expected features of one shape from one "
            "processor. Process the batch in one call, or ask one at a time (batch_size=1)"
        )
    calls = [call for one in found for call in one.calls]
    return carried(first.extractor, calls, first.key, first.name, torch.cat(tensors), type(first.extractor).__name__)


class Sounds(NamedTuple):
    """The sounds of a request. key: of their features; values: those, (clips or windows, ...); carried: the clips themselves;
    rows: each clip's user row, None where the prompt does not tell."""

    key: str
    values: torch.Tensor
    carried: CarriedClips
    rows: tuple[int, ...] | None


def check_carried(found: Any, key: str) -> CarriedClips:
    """The clips that came with features. Raises UndefendableError where there are none, or some that no noise can be added to."""
    if found is None:
        raise UndefendableError(
            f"{key} came without the clips that it was made of: noise belongs on the waveform, and only features reached generate(). "
            "Protect the processor before it is called, hf_integration.protect(processor), and hand on all that it gives; or pass "
            "smoothguard=False to run this request undefended."
        )
    if isinstance(found, list | tuple) and found and all(isinstance(one, CarriedClips) for one in found):
        found = joined(found)
    if not isinstance(found, CarriedClips):
        raise UndefendableError(f"{CLIPS} is a {type(found).__name__}; expected what a protected processor gives")
    refuse_problem(found)
    for number, clip in enumerate(found.clips, 1):
        _check_clip(clip, number)
    return found


def check_features(found: CarriedClips, key: str, values: torch.Tensor) -> None:
    """Raises UndefendableError for features that were not made of these clips."""
    assert found.features is not None
    same = found.key == key and found.features.shape == values.shape
    if not same or not torch.equal(found.features.to(values.device, values.dtype), values):
        raise UndefendableError(
            f"{key} of shape {tuple(values.shape)} is not what its clips gave ({found.key} of shape {tuple(found.features.shape)}); "
            "expected a processor's output as it is, apart from device and precision. Batches are made by one call of the processor"
        )


def refuse_problem(found: Any) -> None:
    """Raises UndefendableError where carried clips say themselves why nothing can be done with them."""
    if isinstance(found, CarriedClips) and found.problem:
        raise UndefendableError(f"{found.problem}; pass smoothguard=False to run this request undefended")


def _check_clip(clip: np.ndarray, number: int) -> None:
    if not len(clip):
        raise UndefendableError(f"sound {number} is empty; expected at least one sample")
    if not (finite := np.isfinite(clip)).all():
        raise UndefendableError(
            f"sound {number} holds NaN or Inf, the first at sample {finite.argmin() + 1} of {len(clip)}; expected finite samples. Check "
            "the recording and its decoding"
        )
    if problem := beyond_full_scale(clip):
        raise UndefendableError(f"sound {number} {problem}")
