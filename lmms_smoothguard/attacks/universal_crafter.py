"""Crafts the one picture of a universal attack, or takes it from the cache."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.cache import FORMAT, Entry, content_key
from lmms_smoothguard.attacks.craft import Crafter, distances_within, settings_parts, slots_of
from lmms_smoothguard.attacks.model_state import deterministic, frozen
from lmms_smoothguard.attacks.objective import PIXELS, AnswerLoss, InnerDraws, Threat
from lmms_smoothguard.attacks.pictures import Objective, Pictures
from lmms_smoothguard.attacks.precision import exact_logits
from lmms_smoothguard.attacks.rendering import Renderer, warn_of
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
        if not lessons:
            raise AttackError("a universal attack has nothing to learn from; expected at least one pair")
        key = self._universal_key(settings, base, lessons)
        entry = self._cache.get(key)
        if entry is not None:
            return entry
        from tqdm import tqdm

        with (
            tqdm(total=settings.steps, desc="crafting a universal picture", unit="step", disable=self._quiet) as bar,
            frozen(self._model),
            deterministic(),
            exact_logits(self._model),
        ):
            return self._craft_universal(key, settings, base, lessons, bar)

    def _universal_key(self, settings: AttackSettings, base: np.ndarray, lessons: Sequence[Lesson]) -> str:
        return content_key(
            format=FORMAT,
            kind="universal",
            **settings_parts(settings),
            code=plugins.provenance("attacks", settings.name),
            model=self.fingerprint,
            randomness=self._known_randomness(settings.eot),
            base=base,
            pixels=lessons[0].inputs[PIXELS].float().cpu().numpy(),
            prompts=tuple(lesson.inputs["input_ids"].cpu().numpy() for lesson in lessons),
            answers=[list(lesson.answer) for lesson in lessons],
        )

    def _craft_universal(
        self, key: str, settings: AttackSettings, base: np.ndarray, lessons: Sequence[Lesson], bar: Any
    ) -> Entry:
        model, captured = self._model, lessons[0].inputs
        clean = slots_of([[Image.fromarray(base)]], model.device)
        renderer = Renderer(self._processor, model.device, captured[PIXELS].dtype)
        with torch.no_grad():
            gaps = renderer.check(clean, captured, PIXELS)
        warn_of(gaps)
        started, losses = time.perf_counter(), []

        def progress(number: int, value: torch.Tensor) -> None:
            losses.append(-float(value))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()

        with plugins.blame("attacks", settings.name), self._attacked(settings) as inner:
            corpus = self._corpus_loss(key, settings, renderer, clean, lessons, inner)
            attack: Universal = plugins.load("attacks", settings.name)(settings)
            found = attack.run(InParts(corpus.draw), clean, progress)
        picture = (found[0][0] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        pairs = json.dumps(settings_parts(settings)["content of corpus"])
        record = {
            "attack": settings.to_dict(),
            "model": self.fingerprint,
            "randomness": self._known_randomness(settings.eot),
            **distances_within(settings, found, clean)[0],
            "rendering_gap": gaps[0],
            "seconds": time.perf_counter() - started,
            "corpus_digest": hashlib.sha256(pairs.encode()).hexdigest(),
            "corpus_size": len(lessons),
            "loss": [round(loss, 5) for loss in losses],
        }
        return self._cache.put(key, [picture], record)

    def _corpus_loss(
        self,
        key: str,
        settings: AttackSettings,
        renderer: Renderer,
        clean: Pictures,
        lessons: Sequence[Lesson],
        inner: InnerDraws | None,
    ) -> CorpusLoss:
        rendered = set(renderer(clean))
        prompts = [
            {k: v for k, v in lesson.inputs.items() if isinstance(v, torch.Tensor) and k not in rendered}
            for lesson in lessons
        ]
        groups: dict[Any, list[int]] = defaultdict(list)
        for number, (prompt, lesson) in enumerate(zip(prompts, lessons, strict=True)):
            shapes = sorted((name, tuple(value.shape)) for name, value in prompt.items())
            groups[tuple(shapes), len(lesson.answer)].append(number)

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

        minibatches = Minibatches(groups, min(settings.options.batch, len(lessons)), settings.seed)
        return CorpusLoss(threat, minibatches, self._rows(settings, prompts[0]))


class CorpusLoss:
    """Minus the mean cross-entropy of minibatches of a corpus, all asked with one picture.

    threat: (step from 1, members) -> what is asked of these members of the corpus; rows: how many of them fit into memory.
    """

    def __init__(self, threat: Callable[[int, Sequence[int]], Threat], minibatches: Minibatches, rows: int) -> None:
        self._threat, self._minibatches, self._rows = threat, minibatches, rows
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
        return lambda pictures: loss(_alike(pictures, len(members))).sum()[None] / total


def _alike(pictures: Pictures, rows: int) -> Pictures:
    return tuple(slot.expand(rows, -1, -1, -1) for slot in pictures)
