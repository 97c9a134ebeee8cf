"""Crafts the one picture of a universal attack, or takes it from the cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.batches import slots_of
from lmms_smoothguard.attacks.cache import FORMAT, Entry, content_key
from lmms_smoothguard.attacks.craft import Crafter, settings_parts
from lmms_smoothguard.attacks.media import PICTURES, Slots
from lmms_smoothguard.attacks.model_state import deterministic, frozen, rows_apart
from lmms_smoothguard.attacks.objective import AnswerLoss, InnerDraws, Threat
from lmms_smoothguard.attacks.pictures import Objective
from lmms_smoothguard.attacks.precision import exact_logits
from lmms_smoothguard.attacks.rendering import PIXELS, Renderer, warn_of
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.universal import InParts, Minibatches, Universal
from lmms_smoothguard.errors import AttackError


@dataclass(frozen=True)
class Lesson:
    """One pair of a corpus as the model is asked it with the base picture. inputs: what the ordinary path gave to `generate`,
    batch size 1; answer: the token ids to be forced."""

    inputs: Mapping[str, Any]
    answer: tuple[int, ...]


class UniversalCrafter(Crafter):
    """A crafter of one picture for many requests."""

    def craft_universal(self, settings: AttackSettings, base: np.ndarray, lessons: Sequence[Lesson]) -> Entry:
        """The entry of the picture that makes the model give every lesson's answer; base: uint8 (height, width, 3)."""
        settings.check_medium(PICTURES)
        if not lessons:
            raise AttackError("a universal attack has nothing to learn from; expected at least one pair")
        key = self._universal_key(settings, base, lessons)
        entry = self._cache.get(key)
        if entry is not None:
            return entry
        captured = lessons[0].inputs
        clean = slots_of([[Image.fromarray(base)]], self._model.device)
        renderer = Renderer(self._processor, self._model.device, captured[PIXELS].dtype)
        with torch.no_grad():
            gaps = renderer.check(clean, captured, PIXELS)
        warn_of(gaps)

        def corpus(inner: InnerDraws | None) -> CorpusLoss:
            return self._corpus_loss(key, settings, renderer, clean, lessons, inner)

        found, record = self._searched(settings, corpus, clean)
        picture = (found[0][0] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        return self._cache.put(key, [picture], record | {"rendering_gap": gaps[0], "corpus_size": len(lessons)})

    def _universal_key(self, settings: AttackSettings, base: np.ndarray, lessons: Sequence[Lesson]) -> str:
        parts = settings_parts(settings)
        parts.pop("content of clips", None)  # a picture is learnt on none
        return content_key(
            format=FORMAT,
            kind="universal",
            **parts,
            code=plugins.provenance("attacks", settings.name),
            model=self.fingerprint,
            randomness=self._known_randomness(settings.eot),
            base=base,
            pixels=lessons[0].inputs[PIXELS].float().cpu().numpy(),
            prompts=tuple(lesson.inputs["input_ids"].cpu().numpy() for lesson in lessons),
            answers=[list(lesson.answer) for lesson in lessons],
        )

    def _searched(
        self,
        settings: AttackSettings,
        corpus: Callable[[InnerDraws | None], CorpusLoss],
        clean: Slots,
        *,
        sounds: bool = False,
    ) -> tuple[Slots, dict[str, Any]]:
        """What the attack finds, and what its record says of that."""
        from tqdm import tqdm

        started, losses = time.perf_counter(), []
        title = f"crafting a universal {'change of sounds' if sounds else 'picture'}"
        with (
            tqdm(total=settings.steps, desc=title, unit="step", disable=self._quiet) as bar,
            frozen(self._model),
            deterministic(),
            exact_logits(self._model),
            plugins.blame("attacks", settings.name),
            rows_apart(self._model) if sounds else contextlib.nullcontext(),
            self._attacked(settings, sounds=sounds) as inner,
        ):

            def progress(number: int, value: torch.Tensor) -> None:
                losses.append(-float(value))
                bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                bar.update()

            attack: Universal = plugins.load("attacks", settings.name)(settings)
            found = attack.run(InParts(corpus(inner).draw), clean, progress)
        pairs = json.dumps(settings_parts(settings)["content of corpus"])
        return found, {
            "attack": settings.to_dict(),
            "model": self.fingerprint,
            "randomness": self._known_randomness(settings.eot, sounds=sounds),
            **attack.distances_within(found, clean)[0],
            "seconds": time.perf_counter() - started,
            "corpus_digest": hashlib.sha256(pairs.encode()).hexdigest(),
            "loss": [round(loss, 5) for loss in losses],
        }

    def _corpus_loss(
        self,
        key: str,
        settings: AttackSettings,
        renderer: Renderer,
        clean: Slots,
        lessons: Sequence[Lesson],
        inner: InnerDraws | None,
    ) -> CorpusLoss:
        prompts = prompts_of(lessons, set(renderer(clean)))

        def threat(step: int, members: Sequence[int]) -> Threat:
            """A member is drawn once a step at most, so its draws depend neither on its neighbours nor on the memory at hand."""
            keys = [f"{key}|{step}|{member}" for member in members]
            return Threat(
                self._model,
                self._processor,
                renderer,
                tuple(slot.expand(len(members), -1, -1, -1) for slot in clean),
                [prompts[member] for member in members],
                [lessons[member].answer for member in members],
                **self._chance(settings, keys, inner),
            )

        def shown(pictures: Slots, members: Sequence[int]) -> Slots:
            return tuple(slot.expand(len(members), -1, -1, -1) for slot in pictures)

        groups = grouped(
            (shapes_of(prompt), len(lesson.answer)) for prompt, lesson in zip(prompts, lessons, strict=True)
        )
        minibatches = Minibatches(groups, min(settings.options.batch, len(lessons)), settings.seed)
        return CorpusLoss(threat, minibatches, self._rows(settings, prompts[0]), shown)


def prompts_of(lessons: Sequence[Lesson], rendered: Set[str]) -> list[dict[str, torch.Tensor]]:
    """The tensors of each lesson's inputs that do not come from what is attacked."""
    return [
        {k: v for k, v in lesson.inputs.items() if isinstance(v, torch.Tensor) and k not in rendered}
        for lesson in lessons
    ]


def shapes_of(prompt: Mapping[str, torch.Tensor]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Equal for what can share a batch."""
    return tuple(sorted((name, tuple(value.shape)) for name, value in prompt.items()))


def grouped(likenesses: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Numbers of those that are alike."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, likeness in enumerate(likenesses):
        groups[likeness].append(number)
    return groups


class CorpusLoss:
    """Minus the mean cross-entropy of minibatches of a corpus, all asked with one picture or one change of sounds.

    threat: (step from 1, members) -> what is asked of these members of the corpus; rows: how many of them fit into memory; shown:
    (what is searched, members) -> what each of them is asked with.
    """

    def __init__(
        self,
        threat: Callable[[int, Sequence[int]], Threat],
        minibatches: Minibatches,
        rows: int,
        shown: Callable[[Slots, Sequence[int]], Slots],
    ) -> None:
        self._threat, self._minibatches, self._rows, self._shown = threat, minibatches, rows, shown
        self._step = 0

    def draw(self) -> list[Objective]:
        """The next minibatch, in parts of equal lengths that fit into memory."""
        members = self._minibatches.draw()
        total = sum(map(len, members))
        self._step += 1
        return [
            self._part(group[start : start + self._rows], total)
            for group in members
            for start in range(0, len(group), self._rows)
        ]

    def _part(self, members: Sequence[int], total: int) -> Objective:
        loss = AnswerLoss(self._threat(self._step, members), "target")
        return lambda slots: loss(self._shown(slots, members)).sum()[None] / total
