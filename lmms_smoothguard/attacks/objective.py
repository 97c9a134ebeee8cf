"""What an attacker wants: the loss of an answer, as a function of the pixels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lmms_smoothguard.attacks.base import Pictures
from lmms_smoothguard.attacks.rendering import Renderer
from lmms_smoothguard.errors import AttackError
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

    prompts: captured inputs of each row, batch size 1, without pixels; answers: token ids of each row's answer;
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
        self._model, self._renderer, self._key = model, renderer, pixel_key
        self._token_loss = _TOKEN_LOSSES[kind]
        self._perturb, self._draws = perturb, draws if perturb is not None else 1
        self._text, self._labels = _pack(prompts, answers)
        self._keep = max(len(answer) for answer in answers) + 1
        self._cuts_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, pictures: Pictures) -> torch.Tensor:
        """(batch,): larger is better for the attacker."""
        rendered = self._renderer(pictures)
        if self._perturb is None:
            copies = [rendered[self._key]]
        else:
            copies = [self._perturb(rendered) for _ in range(self._draws)]
        inputs = tile({**self._text, **rendered}, copies, self._key)
        extra = {"logits_to_keep": self._keep} if self._cuts_logits else {}
        logits = self._model(**inputs, use_cache=False, **extra).logits[:, -self._keep : -1].float()
        labels = self._labels[:, -self._keep + 1 :].to(logits.device).repeat(len(copies), 1)
        answered = labels >= 0
        token_loss = self._token_loss(logits, labels.clamp(min=0)) * answered
        return (token_loss.sum(1) / answered.sum(1)).view(len(copies), -1).mean(0)


def _pack(
    prompts: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Prompts and answers as one left-padded batch, answers flush right; labels -100 everywhere else."""
    lengths = [prompt["input_ids"].shape[1] + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(lengths)
    packed: dict[str, Any] = {}
    for name, first in prompts[0].items():
        if not isinstance(first, torch.Tensor):
            continue
        rows = []
        for prompt, answer, length in zip(prompts, answers, lengths, strict=True):
            value, prompt_length = prompt[name], prompt["input_ids"].shape[1]
            if value.ndim >= 2 and value.shape[1] == prompt_length:  # one entry a token: grow with the answer
                if name == "input_ids":
                    tail = torch.tensor([list(answer)], dtype=value.dtype, device=value.device)
                elif name == "attention_mask":
                    tail = value.new_ones(1, len(answer))
                elif value.ndim == 2:  # token types: an answer is text
                    tail = value.new_zeros(1, len(answer))
                else:  # cross-attention masks: an answer sees what the prompt's end sees
                    tail = value[:, -1:].expand(-1, len(answer), *value.shape[2:])
                head = value.new_zeros(1, width - length, *value.shape[2:])
                value = torch.cat([head, value, tail], dim=1)
            rows.append(value)
        packed[name] = torch.cat(rows)
    if "attention_mask" not in packed:
        device = packed["input_ids"].device
        starts = torch.tensor([width - length for length in lengths], device=device)
        packed["attention_mask"] = (torch.arange(width, device=device)[None] >= starts[:, None]).long()
    labels = torch.full((len(prompts), width), -100)
    for row, answer in enumerate(answers):
        labels[row, width - len(answer) :] = torch.tensor(list(answer))
    return packed, labels
