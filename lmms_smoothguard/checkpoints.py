"""Checkpoints of a training: one safetensors file that replaces its predecessor atomically, and knows its place in the recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmms_smoothguard.errors import ConfigError

FILE = "checkpoint.safetensors"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's state, a name for each tensor."""
    return {
        f"{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives an optimiser over the same parameters the state that `optimizer_tensors` named."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(directory: Path, tensors: Mapping[str, torch.Tensor], recipe: Any, place: Any) -> None:
    """Writes tensors, recipe and place in the recipe (both JSON) as one file; a kill leaves the old one or the new one."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    scratch = directory / f"{FILE}.tmp"
    about = {"about": json.dumps({"recipe": recipe, "place": place})}
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}, scratch, about)
    os.replace(scratch, directory / FILE)


def load_checkpoint(directory: Path, recipe: Any) -> tuple[dict[str, torch.Tensor], Any] | None:
    """(tensors, place) of a checkpoint of the same recipe; None where there is none.

    Raises ConfigError for a torn file, or one of another recipe, and names what differs.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    weights = directory / FILE
    if not weights.exists():
        return None
    try:
        with safe_open(weights, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
        tensors = load_file(weights)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{weights} is no checkpoint of ours ({error}); remove it, or give another directory"
        ) from error
    asked = json.loads(json.dumps(recipe))
    if about["recipe"] != asked:
        differing = sorted(k for k in {*asked, *about["recipe"]} if asked.get(k) != about["recipe"].get(k))
        raise ConfigError(
            f"{weights} was made by another recipe ({', '.join(differing)} differ); expected the same settings. Give another "
            "directory, or remove the file to start again"
        )
    return tensors, about["place"]


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
