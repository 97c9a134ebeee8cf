"""What `generate` gave for batches of copies, cut into answers; and the rows of them that the caller gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lmms_smoothguard.defenses.request import Request, SmoothGuardOutput
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.fitting import all_known, is_encoder_decoder

_PER_STEP = ("scores", "logits")  # outputs that are a tuple of (rows, vocabulary), one a step
_DROPPED = ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions", "hidden_states",
            "decoder_hidden_states", "encoder_hidden_states", "past_key_values", "beam_indices")  # fmt: skip


class Replies:
    """The answers of `rows` user rows, copy by copy.

    `prompt`: tokens that generate repeats before an answer (a decoder's own, of an encoder-decoder); 0 where it returns the
    answer alone.
    """

    def __init__(self, request: Request, rows: int) -> None:
        self.rows, self.copies, self.prompt = rows, 0, 0
        self._request = request
        self._ends = request.end_tokens()
        self._decodes = [request.tokenizer is not None] * rows
        self._outputs: list[Any] = []
        self._home: list[tuple[int, int]] = []  # of each copy: its output, its first row there
        self._candidates: list[list[tuple[int, ...]]] = [[] for _ in range(rows)]
        self._texts: list[list[str]] = [[] for _ in range(rows)]

    def add(self, output: Any, copies: int) -> None:
        """The output of one copy-major batch."""
        sequences = _sequences(output)
        if sequences.shape[0] != self.rows * copies:
            raise UndefendableError(
                f"generate returned {sequences.shape[0]} rows for {copies} copies of {self.rows}; "
                "expected one answer a copy, so this model's generate cannot be defended"
            )
        self.prompt = self._prompt_length(sequences)
        for name in _DROPPED:  # a cache of every batch until the vote would be what batches are there to avoid
            if not isinstance(output, torch.Tensor) and output.get(name) is not None:
                output[name] = None
        answers = [self._trim(row) for row in sequences[:, self.prompt :].tolist()]
        texts: list[str] = []
        if self._request.tokenizer is not None:
            texts = self._request.tokenizer.batch_decode([list(a) for a in answers], skip_special_tokens=True)
        for row in range(self.rows):
            own = answers[row :: self.rows]
            self._candidates[row] += own
            self._texts[row] += texts[row :: self.rows]
            self._decodes[row] = self._decodes[row] and all_known(self._request.tokenizer, own)
        self._home += [(len(self._outputs), copy * self.rows) for copy in range(copies)]
        self._outputs.append(output)
        self.copies += copies

    def candidates(self, row: int) -> Sequence[tuple[int, ...]]:
        """The token ids of a row's answers, without padding and end-of-sequence."""
        return self._candidates[row]

    def texts(self, row: int) -> Sequence[str] | None:
        """The same decoded; None where no tokenizer is known, or one that does not know what was said."""
        return self._texts[row] if self._decodes[row] else None

    def comparable(self, row: int) -> Sequence[str]:
        """Texts, or token ids where there are none."""
        if self._decodes[row]:
            return self._texts[row]
        return [" ".join(map(str, candidate)) for candidate in self._candidates[row]]

    @property
    def start(self) -> int:
        """Tokens at the beginning of a sequence that are no answer: the prompt, or an encoder-decoder's start token."""
        return self.prompt or int(is_encoder_decoder(self._request.model.config))

    def lengths(self, sequences: torch.Tensor) -> list[int]:
        """Of each row of `output`, the tokens of the answer after `start`, up to and with its end."""
        return [self._length(row) - (self.start - self.prompt) for row in sequences[:, self.prompt :].tolist()]

    # -- what the caller gets ------------------------------------------------------------------------------------------

    def output(self, chosen: Sequence[int], verdicts: list[SmoothGuardOutput]) -> Any:
        """The answer of copy `chosen[row]` for every row, in the form `generate` gives: a tensor or a ModelOutput.

        Fields that cannot be cut to the chosen rows are None.
        """
        picked = [self._picked(copy, row) for row, copy in enumerate(chosen)]
        width = max(self._length(ids[self.prompt :].tolist()) for ids in (_sequences(o)[i] for o, i in picked))
        sequences = torch.stack([self._cut(_sequences(out)[index], self.prompt + width) for out, index in picked])
        if isinstance(self._outputs[0], torch.Tensor):
            return sequences
        result = type(self._outputs[0])(**dict(self._outputs[0]))
        result.sequences = sequences
        if result.get("sequences_scores") is not None:
            result.sequences_scores = torch.stack([out.sequences_scores[index] for out, index in picked])
        for name in _PER_STEP:
            if result.get(name) is not None:
                result[name] = self._steps(name, picked, width)
        result.smoothguard = verdicts
        return result

    def _steps(self, name: str, picked: Sequence[tuple[Any, int]], width: int) -> Any:
        if self._request.setting("num_beams", 1) != 1:
            return None
        first = picked[0][0]  # an encoder-decoder's start token, or given tokens, were not decided on
        given = _sequences(first).shape[1] - self.prompt - len(first[name])
        return tuple(
            torch.stack([out[name][min(step, len(out[name]) - 1)][index] for out, index in picked])
            for step in range(width - given)
        )

    def _picked(self, copy: int, row: int) -> tuple[Any, int]:
        part, start = self._home[copy]
        return self._outputs[part], start + row

    def _cut(self, sequence: torch.Tensor, width: int) -> torch.Tensor:
        missing = max(0, width - len(sequence))
        return torch.nn.functional.pad(sequence[:width], (0, missing), value=self._request.pad_token())

    # -- one answer ----------------------------------------------------------------------------------------------------

    def _prompt_length(self, sequences: torch.Tensor) -> int:
        decoder = is_encoder_decoder(self._request.model.config)
        ids = self._request.arguments.get("decoder_input_ids" if decoder else "input_ids")
        if not isinstance(ids, torch.Tensor):
            return 0
        for before in (0, 1) if decoder else (0,):  # a decoder's start token comes before ids that do not open with it
            end = before + ids.shape[1]
            if sequences.shape[1] >= end and torch.equal(sequences[: self.rows, before:end], ids.to(sequences.device)):
                return end
        return 0

    def _length(self, answer: Sequence[int]) -> int:
        """Tokens up to and with the first end-of-sequence; trailing padding does not count."""
        # An encoder-decoder's answer opens with a start token that may equal the end token.
        for index in range(self.start - self.prompt, len(answer)):
            if answer[index] in self._ends:
                return index + 1
        pad, length = self._request.setting("pad_token_id"), len(answer)
        while length and answer[length - 1] == pad:
            length -= 1
        return length

    def _trim(self, answer: Sequence[int]) -> tuple[int, ...]:
        length = self._length(answer)
        return tuple(answer[: length - 1] if length and answer[length - 1] in self._ends else answer[:length])


def _sequences(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sequences
