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
