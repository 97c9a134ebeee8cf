"""What all tiny models share: the tokenizer, the sizes, how a request is written."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from lmms_smoothguard.tiny.model import build_processor

SIDE, PATCH = 56, 14
IMAGE_MEAN, IMAGE_STD = [0.45, 0.5, 0.4], [0.2, 0.25, 0.35]
NORMALISED = {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": PATCH,
}  # fmt: skip

Row = tuple[Sequence[Image.Image], str]
"""One user row: its pictures and its question."""


@dataclass(frozen=True)
class Architecture:
    """image: what stands for a picture in the prompt; nested: the processor takes a list of pictures a row; several: a row
    may have several pictures; mixed: a row without pictures may stand beside rows with some; ask: how rows become inputs
    where the processor is not called the common way."""

    name: str
    build: Callable[[], tuple[Any, Any]]
    image: str
    nested: bool = False
    several: bool = True
    mixed: bool = True
    template: str = "<s>USER: {images}\n{text} ASSISTANT:"
    ask: Callable[[Any, Sequence[Row]], dict[str, Any]] | None = None

    def inputs(self, processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
        """The ordinary path from pictures and questions to the arguments of `generate`."""
        if self.ask is not None:
            return self.ask(processor, rows)
        texts = [self.template.format(images=self.image * len(pictures), text=text) for pictures, text in rows]
        nested = [list(pictures) for pictures, _ in rows]
        flat = [picture for pictures in nested for picture in pictures]
        images = nested if self.nested else flat
        made = processor(images=images if flat else None, text=texts, padding=True, return_tensors="pt")
        return {key: value for key, value in made.items() if key != "labels"}


@functools.cache
def _tokenizer() -> Any:
    return build_processor().tokenizer


def tokenizer(*special: str, **named: str) -> Any:
    """The project's own tokenizer, left-padding, with more special tokens; `named` ones become attributes."""
    from transformers import PreTrainedTokenizerFast

    own = _tokenizer()
    made = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(own._tokenizer),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=named,
    )
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def text_config(tok: Any, **changes: Any) -> dict[str, Any]:
    """A language model of two layers."""
    return {
        "vocab_size": len(tok), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id,
    } | changes  # fmt: skip


def finish(make: Callable[[], Any], tok: Any, scale: float = 5.0) -> Any:
    """The model in evaluation mode, its matrices scaled so that random weights notice the picture."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    settings = model.generation_config
    settings.bos_token_id, settings.pad_token_id = tok.bos_token_id, tok.pad_token_id
    settings.eos_token_id = tok.eos_token_id
    return model
