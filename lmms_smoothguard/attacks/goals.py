"""Which words an attack on one request is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_smoothguard.attacks.objective import answer_ids


def goal(
    tokenizer: Any,
    inputs: Mapping[str, Any],
    clean_ids: Sequence[int],
    *,
    target: str | None = None,
    label: str | None = None,
    clean_is_right: bool = True,
) -> tuple[int, ...] | None:
    """The tokens of a `Job`'s answer: the target's; else what to lead away from, which is the model's own words where they
    are right or nothing is known of that, and the label otherwise.

    inputs: what `generate` was given, batch size 1; clean_ids: its answer. None where the clean answer is empty: there is
    nothing to lead away from. Raises AttackError for a text without tokens.
    """
    if target is None and not clean_ids:
        return None
    text = target if target is not None else None if clean_is_right else label
    if text is None:
        return tuple(clean_ids)
    return tuple(answer_ids(tokenizer, inputs["input_ids"][0].tolist(), text))
