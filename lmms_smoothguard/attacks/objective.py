"""What an attacker wants: the loss of an answer, as a function of the pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lmms_smoothguard.attacks.base import Pictures
from lmms_smoothguard.attacks.rendering import Renderer
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.inputs.fitting import is_encoder_decoder
from lmms_smoothguard.inputs.tiling import tile

Perturb = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""Rendered inputs -> the pixel tensor with one draw of the defence's noise (EOT)."""


def answer_ids(tokenizer: Any, prompt_ids: Sequence[int], text: str) -> list[int]:
    """The tokens of `text` as the model would go on with them after its prompt.

    Tokenizers glue a leading space to a word, and some add one at the start of a text: so the text is tokenised after
    an anchor, and the anchor's tokens are taken off again.
    """
    tail = tokenizer.decode(list(prompt_ids)[-8:], skip_special_tokens=True)
    joiner = "" if not tail or tail[-1].isspace() else " "
    anchor = tokenizer(":", add_special_tokens=False).input_ids
    ids = tokenizer(f":{joiner}{text.strip()}", add_special_tokens=False).input_ids
    if ids[: len(anchor)] != anchor:
        ids, anchor = tokenizer(joiner + text.strip(), add_special_tokens=False).input_ids, []
    ids = ids[len(anchor) :]
    if not ids:
        raise AttackError(f"the text {text!r} has no tokens; expected words the model can say")
    return list(ids)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def _margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    right = logits.gather(-1, labels[..., None])[..., 0]
    return logits.scatter(-1, labels[..., None], float("-inf")).amax(-1) - right


_TOKEN_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "target": lambda logits, labels: -_cross_entropy(logits, labels),
    "ce": _cross_entropy,
    "margin": _margin,
}
"""(batch, tokens, vocabulary) logits and (batch, tokens) labels -> (batch, tokens), larger is better for the attacker."""


class AnswerLoss:
    """How far the model is from saying one answer a row, meaned over the answer's tokens.

    kind "target": minus the cross-entropy of a target; "ce": the cross-entropy of a reference to be led away from;
    "margin": by how much the best other token beats the reference's (Carlini & Wagner 2017).

    prompts: captured inputs of each row, batch size 1, without pixels; answers: token ids of each row's answer. All prompts
    are of one length and all answers too: padding would move positions, and with them last bits and gradient signs.
    perturb: adds one draw of a defence's noise, `draws` of which are averaged a step (EOT); None attacks the model bare.
    """

    def __init__(
        self,
        model: Any,
        renderer: Renderer,
        prompts: Sequence[Mapping[str, Any]],
        answers: Sequence[Sequence[int]],
        *,
        kind: str,
        perturb: Perturb | None = None,
        draws: int = 1,
        pixel_key: str = "pixel_values",
    ) -> None:
        if is_encoder_decoder(model.config):
            raise AttackError(
                f"{type(model).__name__} is an encoder-decoder; expected a model whose answer follows its prompt. Attacks on "
                "encoder-decoders are not supported."
            )
        self._model, self._renderer, self._key = model, renderer, pixel_key
        self._token_loss = _TOKEN_LOSSES[kind]
        self._perturb, self._draws = perturb, draws if perturb is not None else 1
        self._text = _pack(model, prompts, answers)
        self._labels = torch.tensor([list(answer) for answer in answers])
        self._cuts_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, pictures: Pictures) -> torch.Tensor:
        """(batch,): larger is better for the attacker."""
        rendered = self._renderer(pictures)
        if self._perturb is None:
            copies = [rendered[self._key]]
        else:
            copies = [self._perturb(rendered) for _ in range(self._draws)]
        inputs = tile({**self._text, **rendered}, copies, self._key)
        keep = self._labels.shape[1] + 1
        extra = {"logits_to_keep": keep} if self._cuts_logits else {}
        logits = self._model(**inputs, use_cache=False, **extra).logits[:, -keep:-1].float()
        labels = self._labels.to(logits.device).repeat(len(copies), 1)
        return self._token_loss(logits, labels).mean(1).view(len(copies), -1).mean(0)


_ANSWER_TYPES = {"paligemma": 1}
"""Token types of answers that differ from their prompts'. transformers 5.17 goes on with the prompt's, which only its cache
makes up for: without one, answers would be seen before they are said."""


def lengthened(model: Any, prompt: Mapping[str, Any], answer: Sequence[int]) -> dict[str, torch.Tensor]:
    """A prompt's tensors (batch size 1) after an answer, as the model's own `generate` lengthens them.

    Token types, attention and cross-attention masks grow in ways of each model: PaliGemma's answers are of another type
    than its prompts, and would be seen before they are said if they were not.
    """
    from transformers.utils import ModelOutput

    ids = prompt["input_ids"]
    grown = {k: v for k, v in prompt.items() if isinstance(v, torch.Tensor) and k not in ("input_ids", "labels")}
    grown.setdefault("attention_mask", torch.ones_like(ids))
    grown["cache_position"] = torch.arange(ids.shape[1], device=ids.device)  # older transformers move it along
    for _ in answer:
        grown = model._update_model_kwargs_for_generation(ModelOutput(), grown, is_encoder_decoder=False)
    grown.pop("cache_position", None)
    if model.config.model_type in _ANSWER_TYPES and "token_type_ids" in grown:
        grown["token_type_ids"][:, ids.shape[1] :] = _ANSWER_TYPES[model.config.model_type]
    tail = torch.tensor([list(answer)], dtype=ids.dtype, device=ids.device)
    return {"input_ids": torch.cat([ids, tail], dim=1), **grown}


def _pack(
    model: Any, prompts: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Prompts and their answers as one batch. Raises AttackError where lengths differ."""
    rows = [lengthened(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    if len({(row["input_ids"].shape, len(answer)) for row, answer in zip(rows, answers, strict=True)}) > 1:
        raise AttackError("prompts or answers of several lengths in one batch; expected one length of each")
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
