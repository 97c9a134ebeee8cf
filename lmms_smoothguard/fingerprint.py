"""Which model, in a few letters: the same for the same configs and weights, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

# Of a generation config: no plain answer hangs on these.
_INERT = ("smoothguard", "transformers_version", "_from_model_config")


def model_fingerprint(model: Any) -> str:
    """A digest of the model's configs and of a sample of every parameter: which weights, without reading all of them."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    generating = getattr(model, "generation_config", None)  # encoders have none
    generation = {} if generating is None else {k: v for k, v in generating.to_dict().items() if k not in _INERT}
    hasher = hashlib.sha256(
        json.dumps([type(model).__name__, config, generation], default=str, sort_keys=True).encode()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
            hasher.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            hasher.update(sample.tobytes())
    return hasher.hexdigest()[:32]


_SAMPLED = 4


def weights_print(module: Any) -> tuple[str, list[float]]:
    """Which weights a module has, in whatever precision: a digest of all names and shapes, and a few values of each parameter.

    `same_weights` compares two of them.
    """
    hasher, values = hashlib.sha256(), []
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            hasher.update(f"{name}{tuple(parameter.shape)}".encode())
            flat = parameter.detach().reshape(-1)
            values += flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float().cpu().tolist()
    return hasher.hexdigest()[:32], values


def same_weights(one: tuple[str, list[float]], other: tuple[str, list[float]]) -> bool:
    """Whether two prints are of the same weights, up to the rounding of half precision (bfloat16: 2^-8)."""
    return one[0] == other[0] and all(
        abs(a - b) <= 1e-5 + 2**-7 * max(abs(a), abs(b)) for a, b in zip(one[1], other[1], strict=True)
    )
