"""SmoothGuard at answer level (arXiv 2510.26830): N noisy copies, N answers, cluster, take the majority."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from lmms_smoothguard.aggregation.embedders import EmbedderContext, load_embedder
from lmms_smoothguard.aggregation.verdict import aggregate
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.defenses.request import Defended, Request, SmoothGuardOutput
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.media import Images, find_images
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.inputs.tiling import tile
from lmms_smoothguard.noise import NoiseSource

log = logging.getLogger(__name__)

_PER_STEP = ("scores", "logits")  # outputs that are a tuple of (rows, vocabulary), one a step
_DROPPED = ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions", "hidden_states",
            "decoder_hidden_states", "encoder_hidden_states", "past_key_values", "beam_indices")  # fmt: skip


def defend(request: Request, config: SmoothGuardConfig) -> Defended | None:
    """Answers a request through N noisy copies; None when there is nothing to perturb (text only).

    Raises UndefendableError for what cannot be defended, and whatever the model's own generate raises.
    """
    images = find_images(request.arguments, request.model.config)
    if images is None:
        return None
    request.check_supported()
    rows = request.user_rows()
    if request.arguments.get("streamer") is not None and rows != 1:
        raise UndefendableError(f"a streamer takes one row, the request has {rows}; expected a batch of one")
    if not images.slices or rows == 0:
        raise UndefendableError("the batch is empty; expected at least one row and one image")
    outputs = _answer(request, config, images)
    sequences = _joined(
        [output if isinstance(output, torch.Tensor) else output.sequences for output in outputs], request
    )
    if sequences.shape[0] != rows * config.num_samples:
        raise UndefendableError(
            f"generate returned {sequences.shape[0]} rows for {config.num_samples} copies of {rows}; "
            "expected one answer a copy, so this model's generate cannot be defended"
        )
    prompt = _prompt_length(sequences, request, rows)
    answers = [_trim(row, request) for row in sequences[:, prompt:].tolist()]
    verdicts = [_verdict(request, config, answers[row::rows]) for row in range(rows)]
    picked = [verdict.chosen * rows + row for row, verdict in enumerate(verdicts)]
    width = max(_length(sequences[index, prompt:].tolist(), request) for index in picked)
    chosen = sequences[picked, : prompt + width]
    if request.arguments.get("streamer") is not None:
        _stream(request.arguments["streamer"], chosen[0], prompt)
    if isinstance(outputs[0], torch.Tensor):
        return Defended(chosen, verdicts)
    return Defended(_dictionary(outputs, chosen, picked, width, request, verdicts), verdicts)


def _answer(request: Request, config: SmoothGuardConfig, images: Images) -> list[Any]:
    """Runs all copies in as few batches as memory allows, in order."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    statistics = None
    if config.noise_space == "pixel":
        statistics = pixel_statistics(request.model, request.image_processor)
    noise = NoiseSource(images, sigma=config.sigma, statistics=statistics, seed=config.seed)
    arguments = {key: value for key, value in request.arguments.items() if key != "streamer"}
    outputs: list[Any] = []
    done, size = 0, min(config.max_copies_per_batch or config.num_samples, config.num_samples)
    while done < config.num_samples:
        numbers = range(done, min(done + size, config.num_samples))
        try:
            copies = [_copy(noise, images, number, config) for number in numbers]
            outputs.append(request.generate(**tile(arguments, copies, images.key)))
        except RuntimeError as error:
            if size == 1 or not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            size = max(1, size // 2)
            log.warning("out of memory with %d copies in a batch; going on with %d", len(numbers), size)
            clear_device_cache(garbage_collection=True)
            continue
        done += len(numbers)
    return outputs


def _copy(noise: NoiseSource, images: Images, number: int, config: SmoothGuardConfig) -> torch.Tensor:
    """Copy `number`; noisy copies count from 1 whether or not there is a clean one."""
    if config.include_clean:
        return images.values if number == 0 else noise.copy(number)
    return noise.copy(number + 1)


def _joined(parts: Sequence[torch.Tensor], request: Request) -> torch.Tensor:
    width = max(part.shape[1] for part in parts)
    ends = request.end_tokens()
    pad = request.setting("pad_token_id", min(ends) if ends else 0)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=pad) for part in parts])


def _prompt_length(sequences: torch.Tensor, request: Request, rows: int) -> int:
    """Prompt tokens that generate repeats before the answer; 0 where it returns the answer alone."""
    ids = request.arguments.get("input_ids")
    if not isinstance(ids, torch.Tensor) or sequences.shape[1] < ids.shape[1]:
        return 0
    return ids.shape[1] if torch.equal(sequences[:rows, : ids.shape[1]], ids.to(sequences.device)) else 0


def _length(answer: Sequence[int], request: Request) -> int:
    """Tokens up to and with the first end-of-sequence; trailing padding does not count."""
    ends = request.end_tokens()
    # An encoder-decoder's answer opens with a start token that may equal the end token.
    start = 1 if getattr(request.model.config, "is_encoder_decoder", False) else 0
    for index in range(start, len(answer)):
        if answer[index] in ends:
            return index + 1
    pad, length = request.setting("pad_token_id"), len(answer)
    while length and answer[length - 1] == pad:
        length -= 1
    return length


def _trim(answer: Sequence[int], request: Request) -> tuple[int, ...]:
    length = _length(answer, request)
    kept = answer[: length - 1] if length and answer[length - 1] in request.end_tokens() else answer[:length]
    return tuple(kept)


def _verdict(request: Request, config: SmoothGuardConfig, candidates: Sequence[tuple[int, ...]]) -> SmoothGuardOutput:
    texts = None
    if request.tokenizer is not None:
        texts = tuple(request.tokenizer.batch_decode([list(c) for c in candidates], skip_special_tokens=True))
    verdict = aggregate(
        texts if texts is not None else [" ".join(map(str, c)) for c in candidates],
        lambda: load_embedder(EmbedderContext(config.embedder, request.model, request.tokenizer)),
        config.aggregator,
        clean_first=config.include_clean,
    )
    warnings = verdict.warnings
    if texts is None and len(set(candidates)) > 2:
        warnings += (
            "no tokenizer is known, so answers were compared as token ids; hf_integration.attach() mends that",
        )
    return SmoothGuardOutput(
        tuple(candidates), texts, verdict.labels, verdict.chosen, verdict.agreement, verdict.suspicion,
        verdict.suspected, len(candidates), warnings,
    )  # fmt: skip


def _stream(streamer: Any, sequence: torch.Tensor, prompt: int) -> None:
    """The chosen answer, once it is known: streaming before the vote would show what the vote may reject."""
    if prompt:
        streamer.put(sequence[None, :prompt].cpu())
    for token in sequence[prompt:].cpu():
        streamer.put(token[None])
    streamer.end()


def _dictionary(
    outputs: Sequence[Any],
    chosen: torch.Tensor,
    picked: Sequence[int],
    width: int,
    request: Request,
    verdicts: list[SmoothGuardOutput],
) -> Any:
    """The caller's ModelOutput with the chosen rows; fields that cannot be cut to them are None."""
    result = type(outputs[0])(**dict(outputs[0]))
    result.sequences = chosen
    starts, total = [], 0
    for output in outputs:
        starts.append(total)
        total += output.sequences.shape[0]

    def home(index: int) -> tuple[Any, int]:
        part = max(i for i, start in enumerate(starts) if start <= index)
        return outputs[part], index - starts[part]

    if result.get("sequences_scores") is not None:
        result.sequences_scores = torch.stack([out.sequences_scores[row] for out, row in map(home, picked)])
    single = request.setting("num_beams", 1) == 1
    for name in _PER_STEP:
        if result.get(name) is None:
            continue
        if not single:
            result[name] = None
            continue
        steps = []
        for step in range(width):
            rows = [out[name][min(step, len(out[name]) - 1)][row] for out, row in map(home, picked)]
            steps.append(torch.stack(rows))
        result[name] = tuple(steps)
    for name in _DROPPED:
        if result.get(name) is not None:
            result[name] = None
    result.smoothguard = verdicts
    return result
