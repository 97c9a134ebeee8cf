"""Where a model looks at pictures: its vision tower, and which of the tower's outputs the rest of the model reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmms_smoothguard.errors import UndefendableError

Place = tuple[str | int, ...]
"""The way to a tensor in an output: fields and indices."""
NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder")
"""What vision towers are called, here and in every model inside the model."""


@dataclass(frozen=True, eq=False)
class Tower:
    """A vision tower inside a model.

    module: what is called with pixels; name: where it stands; config: of the whole model; layers: the hidden states that
    the model selects (LLaVA's `vision_feature_layer`), none where it reads the last output; skipped: leading tokens of each
    picture that it does not read (the class token); dual: it stands beside a text tower, and the feature is its pooled output
    after `tail`, the projection, where there is one.
    """

    module: Any
    name: str
    config: Any
    layers: tuple[int, ...] = ()
    skipped: int = 0
    dual: bool = False
    tail: Any = None

    def places(self, output: Any) -> tuple[Place, ...]:
        """Where in an output stands what the rest of the model reads (of a dual encoder: what its tail takes)."""
        if self.dual:
            return (_place(output, "pooler_output", 1),)
        hidden = getattr(output, "hidden_states", None)
        if self.layers and hidden is not None:
            return tuple(("hidden_states", layer % len(hidden)) for layer in self.layers)
        last = _place(output, "last_hidden_state", 0)
        if follow(output, last).ndim == 2 and getattr(output, "pooler_output", None) is not None:
            return (("pooler_output",),)  # packed patches, merged for the language model
        return (last,)

    def selected(self, output: Any) -> tuple[torch.Tensor, ...]:
        """What the rest of the model reads, of each layer (rows, tokens, width): one token for a dual encoder, and one row for
        packed patches."""
        return tuple(self._read(follow(output, place)) for place in self.places(output))

    def _read(self, found: torch.Tensor) -> torch.Tensor:
        if self.dual:
            return (found if self.tail is None else self.tail(found))[:, None]
        if found.ndim == 2:
            return found[None]
        return found.reshape(-1, *found.shape[-2:])[:, self.skipped :]


def find_tower(model: Any) -> Tower:
    """The vision tower of a multimodal or dual-encoder model.

    Raises UndefendableError for a model without one, and says what was looked for.
    """
    found = next(_candidates(model), None)
    if found is None:
        raise UndefendableError(
            f"{type(model).__name__} has no vision tower that is known here; looked for modules named {', '.join(NAMES)} in it "
            "and in the models inside it. Feature smoothing needs one; SmoothGuard (defense=smoothguard) does not"
        )
    name, module = found
    config = getattr(model, "config", None)
    if hasattr(model, "get_text_features") and not hasattr(model, "generate"):
        return Tower(module, name, config, dual=True, tail=getattr(model, "visual_projection", None))
    layers = getattr(config, "vision_feature_layer", None)
    layers = getattr(config, "vision_feature_layers", None) if layers is None else layers
    chosen = () if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
    skipped = int(getattr(config, "vision_feature_select_strategy", "full") == "default")
    return Tower(module, name, config, chosen, skipped)


def _candidates(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules of a known name, the outermost first; what is inside a tower is not looked at."""
    level: Sequence[tuple[str, Any]] = [("", model)]
    while level:
        following = []
        for path, module in level:
            for name, child in module.named_children():
                if name in NAMES:
                    yield f"{path}{name}", child
                elif not isinstance(child, torch.nn.ModuleList | torch.nn.Sequential):
                    following.append((f"{path}{name}.", child))
        level = following


def follow(output: Any, place: Place) -> torch.Tensor:
    """The tensor that stands there."""
    for step in place:
        output = output[step] if isinstance(step, int) else getattr(output, step)
    return output  # type: ignore[no-any-return]


def _place(output: Any, name: str, index: int) -> Place:
    """Of a field: its name in transformers' outputs, its index in tuples, nothing where the output is one tensor."""
    if isinstance(output, torch.Tensor):
        return ()
    return (index,) if isinstance(output, tuple) else (name,)
