"""N copies of a request as one batch, copy-major: row n * B + b is copy n of user row b.

`torch.cat` of whole copies is right for every layout, packed patches included, where a tensor-level
`repeat_interleave` is not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lmms_smoothguard.inputs.carried import CLIPS


@functools.cache
def _controls() -> frozenset[str]:
    """Arguments of `generate` that steer it and belong to no row."""
    from transformers import GenerationConfig, GenerationMixin

    parameters = set(inspect.signature(inspect.unwrap(GenerationMixin.generate)).parameters) - {
        "self",
        "inputs",
        "kwargs",
    }
    return frozenset(
        parameters
        | set(GenerationConfig().to_dict())
        | {"tokenizer", "assistant_tokenizer", "use_cache", "cache_position"}
    )


def _for_every_copy(allowed: Callable[[int, Any], Any], rows: int) -> Callable[[int, Any], Any]:
    """A row's constraint holds for all its copies."""
    return lambda row, ids: allowed(row % rows, ids)


def tile(inputs: Mapping[str, Any], copies: Sequence[torch.Tensor], key: str) -> dict[str, Any]:
    """The keyword arguments of a batch of copies: `copies` are the values of `key`, everything per-row is repeated."""
    return tile_media(inputs, [{key: values} for values in copies])


def tile_media(inputs: Mapping[str, Any], copies: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """The same where several inputs differ from copy to copy; the clips that sounds came with are left behind."""
    count = len(copies)
    ids = inputs.get("input_ids")
    rows = ids.shape[0] if isinstance(ids, torch.Tensor) else next(iter(copies[0].values())).shape[0]
    tiled: dict[str, Any] = {}
    for name, value in inputs.items():
        if name == CLIPS:
            continue
        if name in copies[0]:
            tiled[name] = torch.cat([copy[name] for copy in copies])
        elif name == "prefix_allowed_tokens_fn" and value is not None:
            tiled[name] = _for_every_copy(value, rows)
        elif name in _controls() and not name.startswith("negative_prompt"):
            tiled[name] = value
        elif isinstance(value, torch.Tensor) and value.ndim:
            along = (
                1 if name == "position_ids" and value.ndim == 3 else 0
            )  # (3, batch, length): multi-axis rotary positions
            tiled[name] = torch.cat([value] * count, dim=along)
        elif isinstance(value, list | tuple):
            tiled[name] = type(value)(list(value) * count)
        else:
            tiled[name] = value
    return tiled
