"""Votes on answers that were given once: any N, aggregator and embedder, as the defence itself would have voted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lmms_smoothguard.aggregation.embedders import Embed, EmbedderContext, load_embedder
from lmms_smoothguard.aggregation.verdict import Verdict, aggregate
from lmms_smoothguard.evaluation.questions import Words
from lmms_smoothguard.evaluation.samples import SampleRecord
from lmms_smoothguard.sweeps.answers import Ids
from lmms_smoothguard.sweeps.collect import QUIET, Answers, Cell, is_right
from lmms_smoothguard.sweeps.grid import CLEAN, Point
from lmms_smoothguard.sweeps.noises import Noise


class Replay:
    """Votes on a model's answers; embedders are loaded once, and each set of texts is embedded once."""

    def __init__(self, model: Any, tokenizer: Any, texts: Callable[[Sequence[Ids]], list[str]]) -> None:
        self._model, self._tokenizer, self._texts = model, tokenizer, texts
        self._embedders: dict[str, Embed] = {}

    def samples(self, answers: Answers, condition: str, point: Point, seed: int, run: str) -> list[SampleRecord]:
        """One condition's questions as that point answers them, with every copy's answer."""
        config = point.config
        noise = QUIET if config is None else Noise(point.noise[1], point.noise[0], seed)
        task = f"{condition} | {point.name}" + (f", seed {seed}" if config is not None and len(point.seeds) > 1 else "")
        cells = answers.cells[condition, noise]
        before = [None] * len(cells) if condition == CLEAN else answers.clean
        return [
            self._sample(words, clean, cell, point, run, task)
            for words, clean, cell in zip(answers.words, before, cells, strict=True)
        ]

    def _sample(self, words: Words, clean: Ids | None, cell: Cell, point: Point, run: str, task: str) -> SampleRecord:
        """`clean`: the undefended answer to the clean picture, None where nothing else is asked about."""
        before = None if clean is None else self._texts([clean])[0].strip()
        texts, verdict = self.vote(cell, point)
        answer = texts[verdict.chosen].strip()
        record = {} if cell.attack is None else cell.attack.record
        defended = point.config is not None
        assert words.label is not None
        return SampleRecord(
            id=words.id,
            task=task,
            run=run,
            question=words.text,
            answer=answer,
            group=words.group,
            target=words.label,
            clean_answer=before,
            right=is_right(answer, words.label),
            clean_right=None if before is None else is_right(before, words.label),
            candidates=tuple(text.strip() for text in texts) if defended else None,
            labels=verdict.labels if defended else None,
            agreement=verdict.agreement if defended else None,
            suspicion=verdict.suspicion if defended else None,
            suspected=verdict.suspected if defended and verdict.suspicion is not None else None,
            copies=len(texts),
            attack_linf=record.get("linf"),
            attack_l2=record.get("l2"),
            attack_key=None if cell.attack is None else cell.attack.key,
            attack_seconds=record.get("seconds"),
            left_out=cell.left_out,
        )

    def vote(self, cell: Cell, point: Point) -> tuple[list[str], Verdict]:
        """The copies' texts, the clean one first where there is one, and the verdict on them."""
        if point.config is None:
            texts = self._texts([cell.plain])
            return texts, aggregate(texts, _no_embedder)
        config = point.config
        candidates = [cell.plain, *cell.noisy] if config.include_clean else list(cell.noisy)
        texts = self._texts(candidates[: config.num_samples])
        verdict = aggregate(
            texts,
            lambda: self.embedder(config.embedder),
            config.aggregator,
            clean_first=config.include_clean,
            majority_first=point.majority_first,
        )
        return texts, verdict

    def embedder(self, name: str) -> Embed:
        """An embedder that remembers."""
        if name not in self._embedders:
            embed = load_embedder(EmbedderContext(name, self._model, self._tokenizer))
            known = functools.cache(lambda texts: np.asarray(embed(texts), dtype=float))
            self._embedders[name] = lambda texts: known(tuple(texts))
        return self._embedders[name]


def _no_embedder() -> Embed:
    raise AssertionError("one answer needs no embedder")
