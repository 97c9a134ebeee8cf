"""Logits in float32 from a model in half precision, for the time of an attack.

A bfloat16 logit of 20 is a multiple of 1/8, so losses come in steps, and a search that compares them (APGD, Square, restarts)
sees none where there is one. The last product alone in float32 mends that; everything before it stays the deployed model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import linear


@contextlib.contextmanager
def exact_logits(model: Any) -> Iterator[None]:
    """The output embedding in float32. A model in float32, or with an output layer that is no plain linear one, is left alone."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not torch.nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    weight = head.weight.detach().float()
    bias = None if head.bias is None else head.bias.detach().float()

    def in_float32(_module: Any, arguments: tuple[Any, ...], _output: Any) -> torch.Tensor:
        return linear(arguments[0].float(), weight, bias)

    handle = head.register_forward_hook(in_float32)
    try:
        yield
    finally:
        handle.remove()
