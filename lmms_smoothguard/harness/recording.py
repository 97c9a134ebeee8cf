"""Watches a wrapper's ordinary path through one clean, undefended answer: what `generate` is given, what it gives."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lmms_smoothguard.attacks.cache import AttackCache, content_key
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.inputs.carried import CLIPS, CarriedClips

_MEDIA = ("pixel_values", "input_features")


@dataclasses.dataclass
class PlainPass:
    """`inputs`: the tensors generate was given; `answer`: the token ids it gave, without the end; `text`: the wrapper's;
    `clips`: the sounds that its features were made of, float32 (n,) each, as a protected processor got them (None where it is
    not protected)."""

    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    answer: tuple[int, ...] = ()
    text: str = ""
    clips: tuple[np.ndarray, ...] | None = None


@contextlib.contextmanager
def recorded(model: Any, fingerprint: str, cache: AttackCache) -> Iterator[PlainPass]:
    """Records the one call of `model.generate` made inside, without any defence; a known answer comes from the cache.

    Raises AttackError when there is no such call, or one that an attack cannot work with.
    """
    seen, own = PlainPass(), type(model).generate
    failures: list[Exception] = []

    def generate(*args: Any, **kwargs: Any) -> Any:
        try:
            return _answer(model, own, fingerprint, cache, seen, args, kwargs)
        except Exception as error:
            failures.append(error)  # wrappers swallow exceptions
            raise

    model.generate = generate
    try:
        yield seen
    finally:
        del model.generate
    if failures:
        raise failures[0]
    if not seen.inputs:
        raise AttackError(f"generate() of {type(model).__name__} was never called; its wrapper cannot be attacked")


def _answer(
    model: Any, own: Any, fingerprint: str, cache: AttackCache, seen: PlainPass, args: Any, kwargs: dict[str, Any]
) -> torch.Tensor:
    if args or "input_ids" not in kwargs or not any(name in kwargs for name in _MEDIA):
        raise AttackError(
            f"generate() is called with {', '.join(kwargs)}; expected input_ids and {' or '.join(_MEDIA)} by name"
        )
    seen.inputs = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}
    if isinstance(carried := kwargs.get(CLIPS), CarriedClips):
        seen.clips = carried.clips
    ids = kwargs["input_ids"]
    if ids.shape[0] != 1:
        raise AttackError(f"generate() is called with {ids.shape[0]} rows; expected one request at a time")
    # Every tensor, since any may change the answer: a grid's shape, an image's own size, a mask over padding.
    tensors = {f"tensor {name}": _array(value) for name, value in _tensors(kwargs)}
    # The clips that came along are told by their features.
    settings = {k: repr(v) for k, v in kwargs.items() if not isinstance(v, torch.Tensor) and k != CLIPS}
    # What tells of itself by its address (criteria that stop at a word) is no key that another run would find.
    told = not any(" at 0x" in text for text in settings.values())
    key = content_key(kind="clean answer", model=fingerprint, settings=settings, **tensors) if told else None
    stored = cache.get_answer(key) if key is not None else None
    if stored is not None:
        tokens = [int(token) for token in stored.split()]
        output = torch.cat([ids, torch.tensor([tokens], dtype=ids.dtype, device=ids.device)], dim=1)
    else:
        output = own(model, smoothguard=False, **kwargs)
        if not isinstance(output, torch.Tensor) or not torch.equal(output[:, : ids.shape[1]], ids):
            raise AttackError(f"{type(model).__name__}.generate does not return prompt and answer in one tensor")
        tokens = output[0, ids.shape[1] :].tolist()
        if key is not None:
            cache.put_answer(key, " ".join(map(str, tokens)))
    ends = model.generation_config.eos_token_id
    stop = {*(ends if isinstance(ends, list) else [ends]), kwargs.get("eos_token_id")}
    cut = next((index for index, token in enumerate(tokens) if token in stop), len(tokens))
    seen.answer = tuple(tokens[:cut])
    return output


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested mappings and sequences, by its path."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for part, inner in items:
            yield from _tensors(inner, f"{name}/{part}")


def _array(tensor: torch.Tensor) -> np.ndarray:
    whole = tensor.detach().cpu()
    return np.asarray((whole.float() if whole.is_floating_point() else whole).numpy())  # numpy has no bfloat16
