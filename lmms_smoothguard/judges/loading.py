"""Judges by name: `refusal`, `guard/DIR`, `llm/MODEL?timeout=20`, several joined by `+`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl

from lmms_smoothguard import plugins
from lmms_smoothguard.config import parse_scalar
from lmms_smoothguard.errors import ConfigError, did_you_mean
from lmms_smoothguard.judges import BatchJudge, Exchange, Judge, Judgement

MOST_JUDGES = 3
"""More would make a table of pairwise agreements that nobody reads."""


class LoadedJudge:
    """A judge under the name it was asked for; what it gives back is checked, and what it raises names its owner."""

    def __init__(self, name: str, judge: Judge) -> None:
        self.name, self._judge = name, judge
        self._registered = name.partition("/")[0]
        version = getattr(judge, "version", None)
        self.version = str(version) if version else plugins.provenance("judges", self._registered) or ""

    def judge(self, question: str, answer: str) -> Judgement:
        """One judgement."""
        return self.judge_all([Exchange(question, answer)])[0]

    def judge_all(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One judgement each, in order; in batches where the judge has them. Raises ConfigError for anything else."""
        with plugins.blame("judges", self._registered):
            if isinstance(self._judge, BatchJudge):
                found = list(self._judge.judge_batch(exchanges))
            else:
                found = [self._judge.judge(*exchange) for exchange in exchanges]
            if len(found) != len(exchanges) or not all(isinstance(item, Judgement) for item in found):
                kinds = ", ".join(sorted({type(item).__name__ for item in found})) or "nothing"
                raise ConfigError(
                    f"judge {self.name!r} gave {len(found)} of {kinds} for {len(exchanges)} exchanges; expected one "
                    "lmms_smoothguard.judges.Judgement each"
                )
        return found


def load_judge(name: str) -> LoadedJudge:
    """The judge of that name. Raises ConfigError for an unknown name or an argument its factory does not understand."""
    registered, _, argument = name.partition("/")
    known = plugins.offers("judges")
    if registered not in known:
        raise ConfigError(f"unknown judge {name!r}; {did_you_mean(registered, known)}; guard/<model>, llm/<model>")
    with plugins.blame("judges", registered):
        return LoadedJudge(name, plugins.load("judges", registered)(argument))


def judge_names(text: str) -> list[str]:
    """`refusal+guard/DIR` as a list. Only a `+` before a registered name joins, so a directory may have one in its name.

    Raises ConfigError for unknown, repeated, no or more than three names; nothing is loaded.
    """
    known = plugins.offers("judges")
    heads = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    names = re.split(rf"\+(?=(?:{heads})(?:/|\+|$))", text.strip()) if text.strip() else []
    if not names or len(names) > MOST_JUDGES:
        raise ConfigError(
            f"judge is {text!r}; expected one to {MOST_JUDGES} names joined by +, such as refusal+guard/DIR"
        )
    for name in names:
        head = name.partition("/")[0]
        if head not in known:
            raise ConfigError(f"unknown judge {name!r}; {did_you_mean(head, known)}; guard/<model>, llm/<model>")
    if len(set(names)) < len(names):
        raise ConfigError(f"judge is {text!r}, which names one judge twice; expected each once")
    return names


def load_judges(text: str) -> tuple[LoadedJudge, ...]:
    """Every judge of `refusal+guard/DIR`, in order; the first decides."""
    return tuple(load_judge(name) for name in judge_names(text))


def split_argument(argument: str, known: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """`MODEL?timeout=20&retries=1` as the model and all settings, those of `known` in place of what was not said.

    Raises ConfigError for a setting that is not known.
    """
    subject, _, query = argument.partition("?")
    settings = dict(known)
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            raise ConfigError(f"unknown judge setting {key!r} in {argument!r}; {did_you_mean(key, known)}")
        settings[key] = parse_scalar(value)
    return subject, settings


def positive(settings: Mapping[str, Any], name: str, at_least: float, *, whole: bool = False) -> Any:
    """A numeric setting. Raises ConfigError below `at_least`, or for what is no (whole) number."""
    value = settings[name]
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not at_least <= value < 1e9:
        kind = "whole number" if whole else "number"
        raise ConfigError(f"judge setting {name} is {value!r}; expected a {kind} of at least {at_least}")
    return value
