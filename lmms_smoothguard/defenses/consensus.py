"""SmoothGuard at token level: the N copies decode in lock-step and agree on every next token.

Rows are copy-major: row (n * B + b) * k + j is copy n of user row b, beam j. All copies of a group hold the same sequence
at every step, for all get the same scores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers.generation.logits_process import LogitsProcessor

from lmms_smoothguard.errors import UndefendableError

MERGE_DISTANCE = 0.3
"""Hellinger distance, in [0, 1]: where no copy is farther from copy 0 than this, all copies are averaged."""
_TOP = 64  # tokens of each copy that count when copies are compared
_ROUNDS = 10  # of 2-means; N points are settled long before


class Agreement(NamedTuple):
    """`probabilities` (groups, vocabulary): the majority's mean; `majority` (groups, N) bool: its members."""

    probabilities: torch.Tensor
    majority: torch.Tensor


def agree(
    probabilities: torch.Tensor, *, clean_first: bool = True, merge_distance: float = MERGE_DISTANCE
) -> Agreement:
    """What the majority of N next-token distributions says.

    probabilities: (groups, N, vocabulary), rows summing to 1. 2-means on sqrt(p), where Euclidean distance is Hellinger's
    times sqrt 2, over the union of each copy's top 64 tokens, started from copy 0 and the copy farthest from it. The
    larger cluster wins; a tie goes to the one with more noisy copies, then to the one with the lowest copy.
    """
    with torch.autocast(probabilities.device.type, enabled=False):  # half precision would make ties of near ties
        roots = _compared_tokens(probabilities)
        gram = (roots @ roots.transpose(1, 2)).cpu().double()  # Apple's GPUs have no float64
        majority = _majority(gram, clean_first, merge_distance).to(probabilities.device)
        weights = majority / majority.sum(1, keepdim=True)
        mean = (weights[:, None].to(probabilities.dtype) @ probabilities)[:, 0]
    return Agreement(mean, majority)


def _compared_tokens(probabilities: torch.Tensor) -> torch.Tensor:
    """(groups, N, at most N * 64): sqrt(p) over the union of the copies' top tokens, each token once."""
    groups, copies, vocabulary = probabilities.shape
    top = probabilities.topk(min(_TOP, vocabulary), dim=-1).indices.reshape(groups, -1).sort(dim=-1).values
    new = torch.ones_like(top, dtype=torch.bool)
    new[:, 1:] = top[:, 1:] != top[:, :-1]
    picked = probabilities.gather(2, top[:, None].expand(-1, copies, -1))
    return (picked * new[:, None]).sqrt().float()


def _majority(gram: torch.Tensor, clean_first: bool, merge_distance: float) -> torch.Tensor:
    """(groups, N) bool from inner products (groups, N, N) of sqrt(p)."""
    groups, copies, _ = gram.shape
    norms = gram.diagonal(dim1=1, dim2=2)
    from_first = (norms + norms[:, :1] - 2 * gram[:, 0]).clamp(min=0)
    farthest = from_first.argmax(1)
    first = torch.zeros(groups, copies, dtype=gram.dtype)
    first[:, 0] = 1
    centres = torch.stack([first, torch.nn.functional.one_hot(farthest, copies).to(gram)], dim=1)  # (groups, 2, N)
    second = torch.zeros(groups, copies, dtype=torch.bool)
    for _ in range(_ROUNDS):
        cross = centres @ gram
        squared = (cross * centres).sum(-1, keepdim=True) - 2 * cross  # (groups, 2, N), less the copies' own norms
        second = squared[:, 1] < squared[:, 0]
        members = torch.stack([~second, second], dim=1).to(gram)
        centres = members / members.sum(-1, keepdim=True).clamp(min=1)
    noisy = torch.ones(copies, dtype=torch.long)
    noisy[0] = 0 if clean_first else 1
    # Copies first, then noisy copies, then the lower first copy, which is the cluster of copy 0 when all else is equal.
    score = torch.stack([side.sum(1) * 4 * copies + (side * noisy).sum(1) * 2 for side in (~second, second)])
    score += torch.stack([~second[:, 0], second[:, 0]])
    winner = torch.where((score[1] > score[0])[:, None], second, ~second)
    apart = (from_first.max(1).values / 2).sqrt() > merge_distance
    return torch.where(apart[:, None], winner, torch.ones_like(winner))


class SmoothGuardLogitsProcessor(LogitsProcessor):
    """Replaces the scores of all N copies of a group by the logarithm of what their majority says.

    For greedy and beam search on a copy-major batch; sampling would draw for every copy apart, so it needs
    `DrawTogether` behind all other processors. Keeps, per step of the last request, who was in the majority.

    Raises UndefendableError when the batch is no multiple of N or the copies of a group have come apart.
    """

    def __init__(self, num_samples: int, *, include_clean: bool = True, merge_distance: float = MERGE_DISTANCE) -> None:
        self.num_samples, self.include_clean, self.merge_distance = num_samples, include_clean, merge_distance
        self.majorities: list[torch.Tensor] = []
        """One (groups, N) bool tensor a step."""
        self._prompt: torch.Tensor | None = None
        self._length = -1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(N * groups, length) ids and (N * groups, vocabulary) scores -> scores of the same shape."""
        rows, vocabulary = scores.shape
        if rows % self.num_samples:
            raise UndefendableError(
                f"the batch has {rows} rows, no multiple of num_samples = {self.num_samples}; expected N copies of every "
                "user row, copy after copy"
            )
        copies = input_ids.view(self.num_samples, -1, input_ids.shape[1])
        if not torch.equal(copies, copies[:1].expand_as(copies)):
            raise UndefendableError(
                "the copies' sequences differ, so they cannot agree on a next token: either their prompts differ, or each "
                "copy was sampled by itself. Expected equal prompts and greedy or beam search; for sampling use "
                "generate(..., smoothguard={'level': 'token'})"
            )
        if not self._goes_on(input_ids):
            self.majorities, self._prompt = [], input_ids.clone()
        self._length = input_ids.shape[1]
        grouped = scores.float().view(self.num_samples, -1, vocabulary).transpose(0, 1)
        found = agree(grouped.softmax(-1), clean_first=self.include_clean, merge_distance=self.merge_distance)
        self.majorities.append(found.majority.cpu())
        agreed = found.probabilities.log().to(scores.dtype)
        return agreed.repeat(self.num_samples, 1)  # type: ignore[return-value]

    def _goes_on(self, input_ids: torch.Tensor) -> bool:
        """Whether this is the next step of the last request: one token more behind the same prompts (beams change places)."""
        if self._prompt is None or input_ids.shape[1] != self._length + 1 or len(input_ids) != len(self._prompt):
            return False
        return torch.equal(input_ids[:, : self._prompt.shape[1]], self._prompt)


class _DrawOnce(LogitsProcessor):
    """Samples one token a group from warped scores and leaves every copy no other choice; keeps the scores if asked."""

    def __init__(self, num_samples: int, keep: list[torch.Tensor] | None) -> None:
        self._num_samples, self._keep = num_samples, keep

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        groups = scores[: scores.shape[0] // self._num_samples]
        if self._keep is not None:
            self._keep.append(groups.clone())
        drawn = torch.multinomial(groups.float().softmax(-1), 1)
        only = torch.full_like(groups, float("-inf")).scatter(1, drawn, 0.0)
        return only.repeat(self._num_samples, 1)  # type: ignore[return-value]


class DrawTogether:
    """A `custom_generate` for sampling: stock decoding with one draw a group, after every warper.

    transformers drops what it does not find in a callable's signature, so the streamer and `synced_gpus` come along here.
    `scores`: one (groups, vocabulary) tensor a step, what was drawn from, where `keep_scores`.
    """

    def __init__(self, num_samples: int, streamer: Any, synced_gpus: bool, *, keep_scores: bool) -> None:
        self._num_samples, self._streamer, self._synced_gpus = num_samples, streamer, synced_gpus
        self.scores: list[torch.Tensor] | None = [] if keep_scores else None

    def __call__(self, model: Any, input_ids: torch.LongTensor, logits_processor: Any, **kwargs: Any) -> Any:
        together = type(logits_processor)([*logits_processor, _DrawOnce(self._num_samples, self.scores)])
        kwargs = {"streamer": self._streamer, "synced_gpus": self._synced_gpus, **kwargs}
        return model._sample(input_ids, logits_processor=together, **kwargs)


def synced_gpus(model: Any, asked: bool | None) -> bool:
    """Whether all processes have to decode equally long, as transformers decides it."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    if asked is not None:
        return asked
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not several or torch.distributed.get_world_size() < 2:
        return False
    return bool(is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))
