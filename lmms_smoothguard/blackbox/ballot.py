"""Answers as they arrive, in any order and not all of them: when they settle the matter, and what the verdict is."""

from __future__ import annotations

from lmms_smoothguard.aggregation.embedders import EmbedderContext, load_embedder
from lmms_smoothguard.aggregation.verdict import Verdict, aggregate, normalize_answer
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.defenses.stopping import exact, stop_rule, stopping_point


class Ballot:
    """The votes of one request: `num_samples` copies, of which at least `quorum` must answer."""

    def __init__(self, config: SmoothGuardConfig, quorum: int) -> None:
        self._config, self._quorum = config, quorum
        self._answers: dict[int, str] = {}
        self._failed: set[int] = set()

    @property
    def answered(self) -> int:
        return len(self._answers)

    @property
    def failed(self) -> int:
        return len(self._failed)

    def add(self, copy: int, answer: str) -> None:
        """Copy `copy`, from 0, has answered."""
        self._answers[copy] = answer

    def fail(self, copy: int) -> None:
        """Copy `copy` will never answer."""
        self._failed.add(copy)

    @property
    def hopeless(self) -> bool:
        """Too many copies failed for a quorum."""
        return self._config.num_samples - self.failed < self._quorum

    @property
    def settled(self) -> bool:
        """Whether no further answer is needed."""
        return self._counting() is not None

    def verdict(self) -> tuple[Verdict, list[int]]:
        """The verdict over the answers that count, and the copies that gave these. Raises ValueError where there is none."""
        copies = self._counting() or sorted(self._answers)
        found = aggregate(
            [self._answers[copy] for copy in copies],
            lambda: load_embedder(EmbedderContext(self._config.embedder)),
            self._config.aggregator,
            clean_first=self._config.include_clean and copies[:1] == [0],
        )
        return found, copies

    def _counting(self) -> list[int] | None:
        """The copies whose answers make the verdict, None while more are needed.

        Without early stopping all that answered, once every copy has answered or failed. Else an answer that more than half of ALL
        copies share may come in any order; a rule that bears errors sees answers in the order of the copies, up to the first that is
        missing: the order of arrival may hang on what is said, and in it the copies are not exchangeable.
        """
        total, arrived = self._config.num_samples, sorted(self._answers)
        if len(arrived) + self.failed >= total:
            return arrived
        if self._config.early_stop == "off" or not arrived:
            return None
        if exact([normalize_answer(self._answers[copy]) for copy in arrived], total):
            return arrived
        prefix: list[str] = []
        while len(prefix) in self._answers:
            prefix.append(normalize_answer(self._answers[len(prefix)]))
        settled = stopping_point(prefix, total, stop_rule(self._config.early_stop))
        return None if settled is None else list(range(settled))
