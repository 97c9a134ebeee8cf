"""Random crops of pictures, resized back to full size, differentiably (Li et al. 2025, M-Attack)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import interpolate

from lmms_smoothguard.attacks.pictures import Pictures

_RATIOS = (3 / 4, 4 / 3)  # of a crop's sides, relative to the picture's, as in torchvision's RandomResizedCrop


def random_crops(pictures: Pictures, generators: Sequence[torch.Generator], low: float) -> Pictures:
    """One crop of every picture of every row: a share of its area uniform in [low, 1], stretched back to its size.

    generators: one a row. There may be any multiple of as many rows, copy after copy: copies share their row's crops.
    """
    boxes = [[_box(slot.shape[-2:], generator, low) for generator in generators] for slot in pictures]
    return tuple(
        torch.cat([_crop(slot[row : row + 1], *places[row % len(places)]) for row in range(len(slot))])
        for slot, places in zip(pictures, boxes, strict=True)
    )


def _crop(picture: torch.Tensor, top: int, left: int, tall: int, wide: int) -> torch.Tensor:
    part = picture[..., top : top + tall, left : left + wide]
    return interpolate(part, size=picture.shape[-2:], mode="bilinear", align_corners=False)


def _box(size: Sequence[int], generator: torch.Generator, low: float) -> tuple[int, int, int, int]:
    """Top, left, height, width."""
    height, width = size
    area, ratio, down, across = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    share = low + (1 - low) * area
    stretch = math.exp(math.log(_RATIOS[0]) + ratio * math.log(_RATIOS[1] / _RATIOS[0]))
    stretch = min(max(stretch, share), 1 / share)  # no side longer than the picture's
    tall = max(1, round(height * math.sqrt(share / stretch)))
    wide = max(1, round(width * math.sqrt(share * stretch)))
    return round(down * (height - tall)), round(across * (width - wide)), tall, wide
