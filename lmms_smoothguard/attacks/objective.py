"""What an attacker wants: the loss of an answer, as a function of the pixels or samples."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmms_smoothguard.attacks.media import Slots
from lmms_smoothguard.attacks.rendering import PIXELS, Rendering
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.inputs.fitting import is_encoder_decoder
from lmms_smoothguard.inputs.tiling import tile, tile_media

Perturb = Callable[[Mapping[str, torch.Tensor], int], torch.Tensor]
"""Rendered inputs of that many requests -> the pixel tensor after one draw of the defence's randomness (EOT)."""
Jitter = Callable[[Slots], Slots]
"""Sounds -> the same after one draw of the defence's randomness, which is on the waveform, before they are rendered (EOT)."""


class InnerDraws:
    """The attacker's chance for a defence inside the model: one generator a picture of a call of its vision tower.

    So a row's draws depend on no neighbour, restarts of a row share them, and evaluation seeds stay unseen.
    """

    def __init__(self, seed: int) -> None:
        """`seed`: the attacker's."""
        self._seed, self._calls = seed, 0
        self._keys: Sequence[str] = ()
        self._rows, self._draws = 0, 0

    def expect(self, keys: Sequence[str], rows: int, draws: int) -> None:
        """The next call has that many rows of pictures, `keys` over and over, each in that many draws, one draw of all rows after
        the other."""
        if keys is not self._keys:
            self._keys, self._calls = keys, 0
        self._rows, self._draws = rows, draws

    def __call__(self, pictures: int) -> list[torch.Generator]:
        """Raises AttackError for a call that does not have equally many pictures a row."""
        total = self._rows * self._draws
        if not total or pictures % total:
            raise AttackError(
                f"the vision tower was called with {pictures} pictures for {total} rows; expected equally many a row, in one call. "
                "attack_eot through this defence is not supported for this model"
            )
        self._calls += 1
        each, made = pictures // total, []
        for number in range(pictures):
            place, part = divmod(number, each)
            draw, row = divmod(place, self._rows)
            key = self._keys[row % len(self._keys)]
            made.append(attackers_generator(self._seed, key, draw * each + part, self._calls))
        return made


def attackers_generator(seed: int, key: str, slot: int, draw: int) -> torch.Generator:
    """`draw` counts all draws of a crafting: number step * attack_eot + n is the n-th of a step."""
    place = b"attacker|%d|%b|%d|%d" % (seed, key.encode(), slot, draw)
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big") >> 1)


@dataclass(frozen=True)
class Threat:
    """What an attacker of one batch has before them: the model, and what it is asked.

    processor: the model's whole processor, or its image processor; renderer: from pictures or sounds to the model's inputs;
    clean: the clean ones; prompts: captured inputs of each row, batch size 1, without what is rendered; answers: token ids of
    each row's answer; perturb: one draw of a defence's randomness on pixels, `draws` of which are averaged (EOT), None for bare
    ones; jitter: the same on sounds; expect: what is told how many rows, and draws of each, the model's next call has.
    """

    model: Any
    processor: Any
    renderer: Rendering
    clean: Slots
    prompts: Sequence[Mapping[str, Any]]
    answers: Sequence[Sequence[int]]
    perturb: Perturb | None = None
    draws: int = 1
    expect: Callable[[int, int], None] | None = None
    jitter: Jitter | None = None

    def rendered(
        self, slots: Slots, *, noisy: bool = True
    ) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        """The inputs that slots of any number of rows become, differentiably, and those of them that a draw changes, draw by draw.

        noisy: False for one draw of them as they are, whatever a defence does to them.
        """
        if self.jitter is not None and noisy:
            made = [self.renderer(self.jitter(slots)) for _ in range(self.draws)]
            return made[0], made
        inputs, perturb = self.renderer(slots), self.perturb if noisy else None
        draws = self.draws if perturb is not None else 1
        if self.expect is not None:
            self.expect(len(slots[0]), draws)
        if perturb is None:
            return inputs, [inputs]
        return inputs, [{PIXELS: perturb(inputs, len(slots[0]))} for _ in range(draws)]


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


def _dlr(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    top = logits.topk(3, dim=-1).values
    return _margin(logits, labels) / (top[..., 0] - top[..., 2]).clamp(min=1e-12)


_TOKEN_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "target": lambda logits, labels: -_cross_entropy(logits, labels),
    "ce": _cross_entropy,
    "margin": _margin,
    "dlr": _dlr,
    "led away": lambda logits, labels: (logits.argmax(-1) != labels).any(1, keepdim=True).float(),
    "forced": lambda logits, labels: (logits.argmax(-1) == labels).all(1, keepdim=True).float(),
}
"""(batch, tokens, vocabulary) logits and (batch, tokens) labels -> (batch, tokens), larger is better for the attacker; or
(batch, 1) where it is the whole answer that counts."""


class AnswerLoss:
    """How far the model is from saying one answer a row, meaned over the answer's tokens.

    kind "target": minus the cross-entropy of a target; "ce": the cross-entropy of a reference to be led away from;
    "margin": by how much the best other token beats the reference's (Carlini & Wagner 2017); "dlr": that over the distance
    of the largest logit from the third largest (Croce & Hein 2020); "led away" / "forced": 1 where greedy decoding no longer
    begins with the reference / begins with the target, else 0, which has no gradient.

    All prompts are of one length and all answers too: padding would move positions, and with them last bits and gradient
    signs.
    """

    def __init__(self, threat: Threat, kind: str) -> None:
        if is_encoder_decoder(threat.model.config):
            raise AttackError(
                f"{type(threat.model).__name__} is an encoder-decoder; expected a model whose answer follows its prompt. "
                "Attacks on encoder-decoders are not supported."
            )
        self._threat, self._token_loss = threat, _TOKEN_LOSSES[kind]
        self._text = _pack(threat.model, threat.prompts, threat.answers)
        self._labels = torch.tensor([list(answer) for answer in threat.answers])
        self._cuts_logits = "logits_to_keep" in inspect.signature(threat.model.forward).parameters

    @classmethod
    def against(cls, threat: Threat, settings: AttackSettings) -> AnswerLoss:
        """The loss that these settings ask for."""
        return cls(threat, settings.loss if settings.target is None else "target")

    def __call__(self, slots: Slots) -> torch.Tensor:
        """(R * batch,): larger is better for the attacker."""
        rendered, copies = self._threat.rendered(slots)
        repeats = len(slots[0]) // len(self._labels) if slots else 1
        inputs = tile_media({**_repeated(self._text, repeats), **rendered}, copies)
        keep = self._labels.shape[1] + 1
        extra = {"logits_to_keep": keep} if self._cuts_logits else {}
        logits = self._threat.model(**inputs, use_cache=False, **extra).logits[:, -keep:-1].float()
        labels = self._labels.to(logits.device).repeat(len(copies) * repeats, 1)
        return self._token_loss(logits, labels).mean(1).view(len(copies), -1).mean(0)


def _repeated(text: Mapping[str, Any], times: int) -> dict[str, Any]:
    return tile(text, [torch.empty(0)] * times, "") if times > 1 else dict(text)


_ANSWER_TYPES = {"paligemma": 1}
"""Token types of answers that differ from their prompts'. transformers 5.17 goes on with the prompt's, which only its cache
makes up for: without one, answers would be seen before they are said."""


_LEFT_SHORT = {"moe_mm_token_type_ids", "image_embeds_position_mask"}
"""Where in the prompt there are pictures, which `generate` does not lengthen: Ernie's and Kosmos-2's."""


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
    for name in _LEFT_SHORT & set(grown):
        grown[name] = torch.nn.functional.pad(grown[name], (0, len(answer)))
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
