"""Which processor a model is used with."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any

from lmms_smoothguard.inputs.fitting import misfits

log = logging.getLogger(__name__)

_attached: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def attach(model: Any, processor: Any) -> None:
    """Tells the defence which processor a model is used with: its tokenizer decodes the answers that are clustered,
    its image processor gives the scale of pixel-space noise. Without it both are looked up in the model's directory."""
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None and hasattr(processor, "image_mean"):
        image_processor = processor
    tokenizer = getattr(processor, "tokenizer", processor if hasattr(processor, "batch_decode") else None)
    for sentence in misfits(model, tokenizer, image_processor):
        log.warning("%s", sentence)
    for one in with_wrapped(model):
        _attached[one] = (tokenizer, image_processor)


def with_wrapped(model: Any) -> Iterator[Any]:
    """A model and those inside it whose `generate` answers for it: torch.compile's, PEFT's and data-parallel wrappers."""
    while model is not None:
        yield model
        inside = getattr(model, "get_base_model", None)
        model = (
            inside()
            if callable(inside)
            else model.__dict__.get("_modules", {}).get("_orig_mod", model.__dict__.get("_modules", {}).get("module"))
        )


def attachments(model: Any) -> tuple[Any, Any]:
    """A model's tokenizer and image processor, None for what is not known."""
    if model not in _attached:
        from transformers import AutoTokenizer

        tokenizer, where = None, getattr(model, "name_or_path", "")
        if where:
            with contextlib.suppress(OSError, ValueError, ImportError, KeyError):
                tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        _attached[model] = (tokenizer, None)
    return _attached[model]
