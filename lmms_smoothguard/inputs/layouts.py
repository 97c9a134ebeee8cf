"""How one image lies in the model's input tensor: where its channels are, what of it is padding, which values are twins."""

from __future__ import annotations

from typing import Protocol

import torch


class Layout(Protocol):
    """Everything noise needs to know about a tensor's shape."""

    def unpadded(self, image: torch.Tensor, where: slice) -> list[torch.Tensor]:
        """The parts of one image that are no padding: its identity, whatever it was batched with."""

    def standard_noise(self, image: torch.Tensor, where: slice, generator: torch.Generator) -> torch.Tensor:
        """N(0, 1) noise of the image's shape, float32 on the CPU, 0 on padding, twins equal."""

    def per_channel(self, values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """A (channels,) vector in a shape that broadcasts against the image."""

    def tokens(self, where: slice, total: int, images: int) -> int:
        """How many of the prompt's `total` image tokens stand for the image at `where`, of `images` in all."""


class ChannelsFirst:
    """(images, [tiles, ...] channels, height, width): LLaVA, Gemma 3, Idefics 3, Mllama and most others.

    In tensors with tiles an all-zero tile is padding; `mask` (images, tiles, height, width) marks padded margins.
    """

    def __init__(self, mask: torch.Tensor | None = None) -> None:
        self._mask = mask

    def _extents(self, image: torch.Tensor, where: slice) -> list[tuple[int, int, int]]:
        """(tile, height, width) of every tile that is no padding."""
        tiles = image.reshape(-1, *image.shape[-3:])
        mask = None if self._mask is None else self._mask[where].reshape(-1, *self._mask.shape[-2:]).bool()
        extents = []
        for index in range(len(tiles)):
            if image.ndim > 4 and not tiles[index].any():
                continue
            height, width = tiles.shape[-2:]
            if mask is not None:
                height, width = int(mask[index].any(1).sum()), int(mask[index].any(0).sum())
            extents.append((index, height, width))
        return extents

    def unpadded(self, image: torch.Tensor, where: slice) -> list[torch.Tensor]:
        tiles = image.reshape(-1, *image.shape[-3:])
        return [tiles[i, :, :h, :w] for i, h, w in self._extents(image, where)]

    def standard_noise(self, image: torch.Tensor, where: slice, generator: torch.Generator) -> torch.Tensor:
        noise = torch.zeros(image.shape, dtype=torch.float32).reshape(-1, *image.shape[-3:])
        for index, height, width in self._extents(image, where):
            noise[index, :, :height, :width] = torch.randn(noise.shape[1], height, width, generator=generator)
        return noise.reshape(image.shape)

    def per_channel(self, values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 1, 1)

    def tokens(self, where: slice, total: int, images: int) -> int:
        return total // images if total % images == 0 else total + 1


class PackedPatches:
    """(patches, values of a patch), images one after the other: Qwen-VL and kin; or, where a mask tells which patches are no
    padding, (images, patches, values): Gemma 4, LFM2-VL.

    A still is repeated `frames` times; its repetitions share one draw, or the noise of a still would be averaged away.
    """

    def __init__(
        self, channels: int, frames: int, merge: int, order: str = "CTA", mask: torch.Tensor | None = None
    ) -> None:
        """`order`: how a patch's values lie, slowest first, of its (C)hannels, (T) frames and (A)rea; `mask`: (images, patches),
        true where there is a picture; `merge`: patches a side that become one token."""
        self._channels, self._frames, self._merge = channels, frames, merge
        self._order = order if "T" in order else f"T{order}"  # one frame, wherever it stands
        self._mask = None if mask is None else mask.bool()

    def _patch(self, image: torch.Tensor) -> tuple[torch.Size, int]:
        """The shape of one patch, and its area."""
        shape = image.shape[1 if self._mask is None else 2 :]
        return shape, shape.numel() // (self._channels * self._frames)

    def _laid(self, values: torch.Tensor) -> torch.Tensor:
        """(..., channels, frames, area) in the order of a patch."""
        first = values.ndim - 3
        return values.permute(*range(first), *(first + "CTA".index(axis) for axis in self._order))

    def unpadded(self, image: torch.Tensor, where: slice) -> list[torch.Tensor]:
        return [image if self._mask is None else image[self._mask[where].to(image.device)]]

    def standard_noise(self, image: torch.Tensor, where: slice, generator: torch.Generator) -> torch.Tensor:
        shape, area = self._patch(image)
        inside = None if self._mask is None else self._mask[where].cpu()
        count = image.shape[0] if inside is None else int(inside.sum())
        once = torch.randn(count, self._channels, 1, area, generator=generator)
        noise = self._laid(once.expand(-1, -1, self._frames, -1)).reshape(count, *shape)
        if inside is None:
            return noise
        padded = torch.zeros(image.shape, dtype=torch.float32)
        padded[inside] = noise
        return padded

    def per_channel(self, values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        shape, area = self._patch(image)
        each = values.expand(self._channels).view(-1, 1, 1).expand(-1, self._frames, area)
        return self._laid(each).reshape(shape)

    def tokens(self, where: slice, total: int, images: int) -> int:
        patches = where.stop - where.start if self._mask is None else int(self._mask[where].sum())
        return patches // self._merge**2
