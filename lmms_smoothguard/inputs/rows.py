"""Which user row each picture and each sound belongs to, from the tokens that stand for them in the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lmms_smoothguard.inputs.layouts import Layout, PackedPatches


def image_tokens(inputs: Mapping[str, Any], config: Any) -> torch.Tensor | None:
    """(rows, length), true where the prompt has a picture's token."""
    ids = inputs.get("input_ids")
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    return ids == token if isinstance(ids, torch.Tensor) and ids.ndim == 2 and token is not None else None


def runs(row: Sequence[bool]) -> list[int]:
    """Lengths of the stretches of true."""
    return [len(list(group)) for true, group in itertools.groupby(row) if true]


def rows_of_images(
    inputs: Mapping[str, Any], config: Any, slices: tuple[slice, ...], layout: Layout, dimensions: int
) -> tuple[int, ...] | None:
    """Which user row each image belongs to, from the image placeholders in the prompt."""
    packed = isinstance(layout, PackedPatches)
    vision_type = getattr(getattr(config, "vision_config", None), "model_type", None)
    if not packed and (dimensions > 4 or vision_type == "pixtral"):
        return None  # an image's tokens depend on its size, so a neighbour could shift the count
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    found = image_tokens(inputs, config)
    if found is None or not found.any():
        return tuple(range(len(slices))) if len(slices) == len(ids) else None
    per_row, total = found.sum(1).tolist(), int(found.sum())
    by_count = _by_count([layout.tokens(s, total, len(slices)) for s in slices], per_row)
    if by_count is not None or not packed:
        return by_count
    # With tokens for ends of lines, and the like.
    rows = tuple(row for row, tokens in enumerate(found.tolist()) for _ in runs(tokens))
    return rows if len(rows) == len(slices) else None


def _by_count(needs: Sequence[int], per_row: Sequence[int]) -> tuple[int, ...] | None:
    """Each image's row, where the images' tokens fill every row exactly."""
    rows, row, left = [], 0, per_row[0]
    for need in needs:
        while left == 0 and row + 1 < len(per_row):
            row, left = row + 1, per_row[row + 1]
        if need > left:
            return None
        rows.append(row)
        left -= need
    return tuple(rows) if left == 0 and not any(per_row[row + 1 :]) else None


def rows_of_sounds(inputs: Mapping[str, Any], config: Any, count: int) -> tuple[int, ...] | None:
    """Each sound's user row: one stretch of its tokens in the prompt a sound."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        return None
    if len(ids) == 1:
        return (0,) * count
    names = ("audio_token_id", "audio_token_index")
    token = next((found for name in names if (found := getattr(config, name, None)) is not None), None)
    if token is None:
        return None
    rows = tuple(row for row, tokens in enumerate((ids == token).tolist()) for _ in runs(tokens))
    return rows if len(rows) == count else None
