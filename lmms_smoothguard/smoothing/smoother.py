"""One call of a vision tower, smoothed: n0 noisy copies of its pictures, in as few batches as memory allows, and their mean."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lmms_smoothguard.boosting.booster import Booster
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.arrangements import layout_of
from lmms_smoothguard.inputs.media import Images
from lmms_smoothguard.inputs.statistics import PixelStatistics
from lmms_smoothguard.inputs.tiling import tile
from lmms_smoothguard.smoothing.features import Mean, normalized, walk
from lmms_smoothguard.smoothing.towers import Place, Tower, follow

log = logging.getLogger(__name__)

_EMBEDDING: Place = ("embedding",)
_PER_PICTURE = frozenset({"grid_thw", "image_grid_thw", "image_sizes", "pixel_attention_mask", "patch_attention_mask",
                          "aspect_ratio_ids", "aspect_ratio_mask", "spatial_shapes"})  # fmt: skip
"""Tensors beside the pixels with an entry a picture. A call with any other is made copy by copy."""


class Noise(Protocol):
    """Where noisy copies come from: the defence's seeded noise, or an attacker's own draws."""

    def copies(self, images: Images, statistics: PixelStatistics, numbers: Sequence[int]) -> torch.Tensor:
        """(len(numbers), *images.values.shape), copies with those numbers, counted from 1."""


@dataclass
class Smoother:
    """Answers for a tower. `original`: the tower's own forward; `calls`: how often it was asked with pixels."""

    tower: Tower
    original: Callable[..., Any]
    statistics: PixelStatistics
    noise: Noise
    samples: int
    sigma: float
    booster: Booster | None = None
    most: int | None = None
    calls: int = field(default=0, init=False)
    embedding: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, init=False)
    """Of a dual encoder: (the pooled output that was handed out, the smoothed embedding its projection becomes)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `original` would return, each feature the norm-preserving mean over the noisy passes.

        Raises UndefendableError for pixels of unknown layout, and features without a direction.
        """
        key, arguments = self._bound(args, kwargs)
        images = self._images(key, arguments)
        means: dict[Place, Mean] = {}
        template: Any = None
        for output, copies in self._passes(key, arguments, images):
            template = output
            self._add(means, output, copies)
        self.calls += 1
        smoothed = walk(template, lambda place, value: means[place].result(value.dtype))
        if self.tower.dual and self.tower.tail is not None:
            pooled = follow(smoothed, self.tower.places(smoothed)[0])
            self.embedding = (pooled, means[_EMBEDDING].result(pooled.dtype))
        return smoothed

    def features(self, *args: Any, **kwargs: Any) -> Iterator[torch.Tensor]:
        """Unit features of single passes, as they come: (copies, rows, tokens, width), those of several layers as more tokens."""
        key, arguments = self._bound(args, kwargs)
        images = self._images(key, arguments)
        for output, copies in self._passes(key, arguments, images):
            layers = [self._mapped(n, f) for n, f in enumerate(self.tower.selected(output))]
            yield torch.cat([normalized(f.view(copies, -1, *f.shape[1:]))[0] for f in layers], dim=2)

    # -- the passes ----------------------------------------------------------------------------------------------------

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The name of the pixels, and all arguments by name."""
        names = [name for name in inspect.signature(self.original).parameters if name != "self"]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        key = names[0]
        if not isinstance(arguments.get(key), torch.Tensor):
            raise UndefendableError(
                f"the vision tower {self.tower.name} was called without a tensor of {key}; expected pixels to smooth"
            )
        return key, arguments

    def _images(self, key: str, arguments: Mapping[str, Any]) -> Images:
        beside = {"image_grid_thw": arguments.get("grid_thw"), "image_sizes": arguments.get("image_sizes")}
        layout, slices = layout_of("pixel_values", arguments[key], beside, self.tower.config)
        return Images(key, arguments[key], layout, slices, None)

    def _passes(self, key: str, arguments: dict[str, Any], images: Images) -> Iterator[tuple[Any, int]]:
        """(an output, copies in it), copy-major, until there were as many as samples."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        largest = min(self.samples, self.most or self.samples)
        if any(
            isinstance(v, torch.Tensor) and v.ndim and k != key and k not in _PER_PICTURE for k, v in arguments.items()
        ):
            largest = 1
        done = 0
        while done < self.samples:
            count = min(largest, self.samples - done)
            try:
                output = self._pass(key, arguments, images, range(done + 1, done + count + 1))
            except RuntimeError as error:
                if count == 1 or not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                largest = count // 2
                log.warning("out of memory with %d noisy passes in a batch; going on with %d", count, largest)
                clear_device_cache(garbage_collection=True)
                continue
            if not _splits(output, count):
                largest = 1  # such as Pixtral's, which packs all pictures of a call into one row
                continue
            yield output, count
            done += count

    def _pass(self, key: str, arguments: dict[str, Any], images: Images, numbers: Sequence[int]) -> Any:
        copies = self.noise.copies(images, self.statistics, numbers)
        if self.booster is not None:
            copies = self._purified(images, copies)
        if len(numbers) == 1:
            return self.original(**{**arguments, key: copies[0]})
        return self.original(**tile(arguments, list(copies), key))

    def _purified(self, images: Images, copies: torch.Tensor) -> torch.Tensor:
        assert self.booster is not None
        if copies.ndim != 5:
            raise UndefendableError(
                f"pixels of shape {tuple(images.values.shape)} are no pictures as a purifier takes them; expected (pictures, "
                "channels, height, width). Feature smoothing without a booster takes packed patches and tiles too"
            )
        mean, std = (value.to(copies.device).view(-1, 1, 1) for value in self.statistics[:2])
        pixels = (copies.flatten(0, 1).float() * std + mean).clamp(0, 1)
        purified = self.booster.purify(pixels, self.sigma)
        return ((purified - mean) / std).to(copies.dtype).view(copies.shape)

    # -- their mean ----------------------------------------------------------------------------------------------------

    def _add(self, means: dict[Place, Mean], output: Any, copies: int) -> None:
        tail = self.tower.dual and self.tower.tail is not None
        layers = {} if tail else {place: number for number, place in enumerate(self.tower.places(output))}

        def visit(place: Place, value: torch.Tensor) -> torch.Tensor:
            split = value.view(copies, -1, *value.shape[1:]) if copies > 1 else value[None]
            lengths = None
            if place in layers and self.booster is not None and self.booster.maps:
                lengths = split.float().norm(dim=-1, keepdim=True)
                kept, read = split[..., : self.tower.skipped, :], split[..., self.tower.skipped :, :]
                split = torch.cat([kept, self._mapped(layers[place], read.flatten(0, 1)).view(read.shape)], dim=-2)
            means.setdefault(place, Mean()).add(split, lengths)
            return value

        walk(output, visit)
        if tail:
            embedded = self._mapped(0, self.tower.selected(output)[0])
            means.setdefault(_EMBEDDING, Mean()).add(embedded.view(copies, -1, embedded.shape[-1]))

    def _mapped(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        if self.booster is None or not self.booster.maps:
            return features
        return self.booster.map(layer, features.float(), self.sigma).to(features.dtype)


def _splits(output: Any, copies: int) -> bool:
    """Whether every tensor's first axis holds the copies one after the other."""
    fine = True

    def visit(place: tuple[Any, ...], value: torch.Tensor) -> torch.Tensor:
        nonlocal fine
        fine = fine and value.ndim > 1 and value.shape[0] % copies == 0
        return value

    walk(output, visit)
    return fine
