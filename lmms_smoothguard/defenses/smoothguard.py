"""SmoothGuard (arXiv 2510.26830): N noisy copies, N answers, cluster, take the majority; or a majority at every token."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lmms_smoothguard.aggregation.embedders import EmbedderContext, load_embedder
from lmms_smoothguard.aggregation.verdict import aggregate, normalize_answer
from lmms_smoothguard.config import SmoothGuardConfig, defends_nothing
from lmms_smoothguard.defenses.copies import Copies, Inputs, answer_batch
from lmms_smoothguard.defenses.replies import Replies
from lmms_smoothguard.defenses.request import Defended, Defense, Request, SmoothGuardOutput
from lmms_smoothguard.defenses.stopping import Decides, fewest_more, stop_rule, stopping_point
from lmms_smoothguard.defenses.streams import FirstRows, RowStreams, row_streams
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.media import Media
from lmms_smoothguard.inputs.tiling import tile_media
from lmms_smoothguard.noise import NOISE

log = logging.getLogger(__name__)


def defend(request: Request, config: SmoothGuardConfig) -> Defended | None:
    """Answers a request through N noisy copies; None when there is nothing to perturb (text only).

    Raises UndefendableError for what cannot be defended, and whatever the model's own generate raises.
    """
    media = request.media()
    if media is None:
        if isinstance(request.arguments.get("streamer"), list | tuple):
            raise UndefendableError(
                "a list of streamers is for requests with media; expected one streamer for text alone"
            )
        return None
    request.check_supported()
    rows = request.user_rows()
    if rows == 0 or not (media.images.slices if media.images is not None else True):
        raise UndefendableError("the batch is empty; expected at least one row and one image or sound")
    pad = request.setting("pad_token_id")
    streams = row_streams(request.arguments.get("streamer"), rows, request.end_tokens(), pad)
    warnings = request.misfits() + _idle_settings(config, media)
    if config.level == "token":
        return _by_token(request, config, media, rows, streams, warnings)
    replies, verdicts = _by_answer(request, config, media, rows, warnings)
    output = replies.output([verdict.chosen for verdict in verdicts], verdicts)
    if streams is not None:  # streaming before the vote would show what the vote may reject
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        streams.replay(sequences, replies.start, replies.lengths(sequences))
    return Defended(output, verdicts)


DEFENSE = Defense(SmoothGuardConfig, defend, NOISE)


def _idle_settings(config: SmoothGuardConfig, media: Media) -> tuple[str, ...]:
    """What is said of settings that defend nothing of these media: in every verdict, and in the log once in a process."""
    idle = defends_nothing(config, pictures=media.images is not None, sounds=media.sounds is not None)
    warnings = tuple(
        f"{said}. Such a vote defends nothing and is only to compare with; set {name}={getattr(SmoothGuardConfig(), name)} or "
        "another, or ask for no defence"
        for name, said in idle.items()
    )
    for warning in warnings:
        _warn_once(warning)
    return warnings


@functools.cache
def _warn_once(warning: str) -> None:
    log.warning("%s", warning)


# -- answer level ------------------------------------------------------------------------------------------------------


def _by_answer(
    request: Request, config: SmoothGuardConfig, media: Media, rows: int, warnings: tuple[str, ...]
) -> tuple[Replies, list[SmoothGuardOutput]]:
    """Runs copies, in as few batches as memory and early stopping allow, until every row is settled."""
    copies = _numbered(Copies(request, config, media), config)
    replies, decides = Replies(request, rows), stop_rule(config.early_stop)
    largest = config.max_copies_per_batch or config.num_samples
    while wanted := _next_copies(replies, config.num_samples, decides):
        numbers = range(replies.copies, replies.copies + min(wanted, largest))
        if not answer_batch(request, replies, copies, numbers):
            largest = len(numbers) // 2
    verdicts = []
    for row in range(rows):
        settled = stopping_point(_keys(replies, row), config.num_samples, decides)
        verdicts.append(_verdict(request, config, replies.candidates(row)[:settled], replies.texts(row), warnings))
    return replies, verdicts


def _next_copies(replies: Replies, total: int, decides: Decides) -> int:
    """How many copies to answer next; 0 when every row is settled.

    As many as could settle the answer, but never fewer than were answered before: a second or third small batch costs
    more time than it saves copies.
    """
    keys = [_keys(replies, row) for row in range(replies.rows)] if replies.copies else [[]]
    open_rows = [listed for listed in keys if stopping_point(listed, total, decides) is None]
    if not open_rows:
        return 0
    needed = max(fewest_more(listed, total, decides) for listed in open_rows)
    return min(total - replies.copies, max(needed, replies.copies))


def _keys(replies: Replies, row: int) -> list[str]:
    """The answers of a row as aggregation compares them."""
    return [normalize_answer(text) for text in replies.comparable(row)]


def _numbered(copies: Copies, config: SmoothGuardConfig) -> Callable[[Sequence[int]], list[Inputs]]:
    """Copies as answers count them, from 0; noisy copies have their own numbers, from 1, whether or not there is a clean one."""
    return copies if config.include_clean else lambda numbers: copies([number + 1 for number in numbers])


def _verdict(
    request: Request,
    config: SmoothGuardConfig,
    candidates: Sequence[tuple[int, ...]],
    texts: Sequence[str] | None,
    warnings: tuple[str, ...],
) -> SmoothGuardOutput:
    texts = None if texts is None else tuple(texts[: len(candidates)])
    verdict = aggregate(
        texts if texts is not None else [" ".join(map(str, c)) for c in candidates],
        lambda: load_embedder(EmbedderContext(config.embedder, request.model, request.tokenizer)),
        config.aggregator,
        clean_first=config.include_clean,
    )
    warnings += verdict.warnings
    if texts is None and len(set(candidates)) > 2:
        warnings += (
            "no tokenizer is known that has all tokens of the answers, so they were compared as token ids; "
            "hf_integration.attach() mends that",
        )
    return SmoothGuardOutput(
        tuple(candidates), texts, verdict.labels, verdict.chosen, verdict.agreement, verdict.suspicion,
        verdict.suspected, len(candidates), warnings,
    )  # fmt: skip


# -- token level -------------------------------------------------------------------------------------------------------


def _by_token(
    request: Request,
    config: SmoothGuardConfig,
    media: Media,
    rows: int,
    streams: RowStreams | None,
    warnings: tuple[str, ...],
) -> Defended:
    """All copies in lock-step, one sequence a row; `streams` get its tokens as they arise."""
    from lmms_smoothguard.defenses.consensus import SmoothGuardLogitsProcessor

    agreeing = SmoothGuardLogitsProcessor(config.num_samples, include_clean=config.include_clean)
    arguments = dict(request.arguments)
    arguments["logits_processor"] = [*(arguments.get("logits_processor") or []), agreeing]
    if streams is not None:
        arguments["streamer"] = FirstRows(streams, rows)
    drawing = _draw_together(request, config, arguments) if request.setting("do_sample", False) else None
    copies = _numbered(Copies(request, config, media), config)(range(config.num_samples))
    replies = Replies(request, rows)
    output = request.generate(**tile_media(arguments, copies))
    if drawing is not None and drawing.scores is not None and not isinstance(output, torch.Tensor):
        output.scores = tuple(drawing.scores)  # what was drawn from, where generate has what was drawn
    replies.add(output, config.num_samples)
    if not agreeing.majorities or any(len(set(replies.candidates(row))) > 1 for row in range(rows)):
        raise UndefendableError(
            f"generate() of {type(request.model).__name__} does not follow its logits_processor, so the copies did not agree "
            "on every token; expected level='answer' for this model"
        )
    votes = torch.stack(agreeing.majorities)  # (steps, rows * beams, N); a row's first beam speaks for it
    votes = votes[:, :: votes.shape[1] // rows]
    verdicts = [_token_verdict(config, replies, row, votes[:, row], warnings) for row in range(rows)]
    return Defended(replies.output([0] * rows, verdicts), verdicts)


def _draw_together(request: Request, config: SmoothGuardConfig, arguments: dict[str, Any]) -> Any:
    """Sets up sampling of one token a row for all its copies; changes `arguments`."""
    from lmms_smoothguard.defenses.consensus import DrawTogether, synced_gpus

    if request.setting("num_beams", 1) > 1 or arguments.get("custom_generate") is not None:
        raise UndefendableError(
            "level is 'token' with sampling in beams or a custom_generate; expected plain sampling, greedy decoding or "
            "beams without sampling, or level='answer'"
        )
    if request.setting("stop_strings") or request.setting("token_healing"):
        _stop_by_criterion(request, arguments)
    drawing = DrawTogether(
        config.num_samples,
        arguments.get("streamer"),
        synced_gpus(request.model, arguments.get("synced_gpus")),
        keep_scores=bool(request.setting("output_scores", False)),
    )
    arguments["custom_generate"] = drawing
    return drawing


def _stop_by_criterion(request: Request, arguments: dict[str, Any]) -> None:
    """Stop strings as a criterion of ours: beside a `custom_generate`, generate loses the tokenizer they need."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    strings = request.setting("stop_strings")
    if request.tokenizer is None or request.setting("token_healing") or request.model.generation_config.stop_strings:
        raise UndefendableError(
            "level is 'token' with sampling and token_healing, stop_strings in the model's own generation config, or "
            "stop_strings without a tokenizer; expected stop_strings and tokenizer in the call, or level='answer'"
        )
    strings = [strings] if isinstance(strings, str) else list(strings)
    criteria = arguments.get("stopping_criteria") or []
    arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(request.tokenizer, strings)])
    arguments["stop_strings"] = None


def _token_verdict(
    config: SmoothGuardConfig, replies: Replies, row: int, votes: torch.Tensor, warnings: tuple[str, ...]
) -> SmoothGuardOutput:
    """votes: (steps, N), who was in the majority. Agreement and suspicion are means over the answer's steps."""
    answer, texts = replies.candidates(row)[0], replies.texts(row)
    votes = votes[: max(1, len(answer))]
    suspicion, suspected = None, False
    if config.include_clean:
        apart = votes[:, 1:] != votes[:, :1]
        suspicion = float(apart.float().mean()) if config.num_samples > 1 else 0.0
        suspected = bool((~votes[:, 0]).any())
    return SmoothGuardOutput(
        (answer,), None if texts is None else (texts[0],), (0,), 0, float(votes.float().mean()), suspicion, suspected,
        config.num_samples, warnings,
    )  # fmt: skip
