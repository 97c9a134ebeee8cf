"""A request to `generate` as a defence sees it, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.fitting import misfits
from lmms_smoothguard.inputs.media import AUDIO_KEYS, Images, Media, find_images, find_media
from lmms_smoothguard.noise import Randomness


@dataclass(frozen=True)
class SmoothGuardOutput:
    """The verdict on one user row.

    candidates: the token ids of every copy's answer, without padding and end-of-sequence; texts: the same decoded,
    None where no tokenizer is known; labels, chosen, agreement, suspicion, suspected: see
    `lmms_smoothguard.aggregation.verdict.Verdict`; num_samples_used: copies that were answered.
    """

    candidates: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] | None
    labels: tuple[int, ...]
    chosen: int
    agreement: float
    suspicion: float | None
    suspected: bool
    num_samples_used: int
    warnings: tuple[str, ...] = ()


class Defended(NamedTuple):
    """`output`: what the caller of `generate` gets; `verdicts`: one a user row, or none for a defence without a vote."""

    output: Any
    verdicts: list[SmoothGuardOutput]


class Defense(NamedTuple):
    """What the hook `smoothguard_defenses` names.

    config: a frozen dataclass, the defence's settings with defaults; defend: (request, config) -> Defended, or None for a
    request with nothing to defend. It may raise UndefendableError, and must rather than answer undefended.
    randomness: how an adaptive attacker draws what the defence does to pixels; None where it changes none.
    check: (model, config, image processor or None) -> raises what `defend` would raise for every request, before hours of crafting.
    """

    config: type[Any]
    defend: Callable[[Request, Any], Defended | None]
    randomness: Randomness | None = None
    check: Callable[[Any, Any, Any], None] | None = None


@dataclass(frozen=True)
class Request:
    """One call of `generate`.

    model: the model; generate: its own, undefended generate; arguments: all keyword arguments of the call;
    tokenizer, image_processor: the model's, where they are known.
    """

    model: Any
    generate: Callable[..., Any]
    arguments: Mapping[str, Any]
    tokenizer: Any = None
    image_processor: Any = None

    def images(self) -> Images | None:
        """The request's images and where they lie; None for text alone. Raises UndefendableError for other media."""
        return find_images(self.arguments, self.model.config)

    def media(self) -> Media | None:
        """The request's images and sounds; None for text alone. Raises UndefendableError for other media, and for sounds without
        the clips that they were made of."""
        return find_media(self.arguments, self.model.config)

    def misfits(self) -> tuple[str, ...]:
        """What speaks against tokenizer and image processor being the model's own: warnings of every verdict."""
        return misfits(self.model, self.tokenizer, self.image_processor)

    def setting(self, name: str, default: Any = None) -> Any:
        """What a generation setting will be: the call's, which may be None, else its generation config's, else the model's."""
        if name in self.arguments:
            value = self.arguments[name]
            return default if value is None else value
        for source in (self.arguments.get("generation_config"), self.model.generation_config):
            value = getattr(source, name, None)
            if value is not None:
                return value
        return default

    def user_rows(self) -> int:
        """B, the rows the caller sent."""
        for key in ("input_ids", "attention_mask", self.model.main_input_name, *AUDIO_KEYS):
            value = self.arguments.get(key)
            if isinstance(value, torch.Tensor) and value.ndim:
                return value.shape[0]
        raise UndefendableError("the request has neither input_ids nor media; expected a prompt, an image or a sound")

    def check_supported(self) -> None:
        """Refuses what would answer without the defence, or give it no single answer to choose."""
        returned = self.setting("num_return_sequences", 1)
        if returned > 1:
            raise UndefendableError(
                f"num_return_sequences is {returned}; SmoothGuard gives one answer a row, expected 1. "
                "The candidates are in the output's .smoothguard with return_dict_in_generate=True."
            )
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if self.setting(name):
                raise UndefendableError(
                    f"assisted decoding ({name}) works on one row, SmoothGuard on N; drop {name} or pass smoothguard=False"
                )
        cache = self.setting("cache_implementation")
        if isinstance(cache, str) and "paged" in cache:
            raise UndefendableError(
                f"cache_implementation is {cache!r}; paged and continuous-batching caches bypass generate(). "
                "Expected a dynamic or static cache."
            )

    def end_tokens(self) -> tuple[int, ...]:
        """The end-of-sequence ids in force, in their own order."""
        ends = self.setting("eos_token_id", [])
        if isinstance(ends, torch.Tensor):
            ends = ends.tolist()
        return (ends,) if isinstance(ends, int) else tuple(ends)

    def pad_token(self) -> int:
        """What generate pads shorter answers with: the padding id, else the first end-of-sequence id."""
        return int(self.setting("pad_token_id", next(iter(self.end_tokens()), 0)))
