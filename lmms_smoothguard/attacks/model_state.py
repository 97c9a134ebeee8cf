"""The model's state while it is attacked, given back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels where there are any: some on a GPU sum in whatever order their threads arrive.

    Torch then also fills memory that nobody has written yet, for those who read it; nothing here does, and it took a tenth of a step.
    """
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if not enabled:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextlib.contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No gradients for the weights, and evaluation mode, for the time of an attack."""
    training = model.training
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def rows_apart(model: Any) -> Iterator[None]:
    """Convolutions over time that round a row alike whatever its batch, on CPUs in float32: oneDNN picks another way for every
    batch size, torch's own do not and took no longer. Nothing is changed elsewhere."""
    backend: Any = torch.backends.mkldnn
    enabled = backend.enabled
    if model.device.type == "cpu" and model.dtype == torch.float32:
        backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = enabled
