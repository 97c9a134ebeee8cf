"""Crafts the one change of a universal attack on sounds, or takes it from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.batches import sound_batch
from lmms_smoothguard.attacks.cache import FORMAT, Entry, content_key
from lmms_smoothguard.attacks.craft import Job, settings_parts
from lmms_smoothguard.attacks.media import Slots
from lmms_smoothguard.attacks.objective import InnerDraws, Threat
from lmms_smoothguard.attacks.pictures import distances
from lmms_smoothguard.attacks.rendering import Rendering
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.sound_clips import decibels_apart, in_16_bits, sound_of_row, sound_slots
from lmms_smoothguard.attacks.sound_rendering import FEATURES, SoundRenderer
from lmms_smoothguard.attacks.universal import Minibatches, added, with_change
from lmms_smoothguard.attacks.universal_clips import check_medium_of
from lmms_smoothguard.attacks.universal_crafter import (
    CorpusLoss,
    Lesson,
    UniversalCrafter,
    grouped,
    prompts_of,
    shapes_of,
)
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.sounds import Sound


@dataclass(frozen=True)
class SoundLesson(Lesson):
    """One pair of a corpus as the model is asked it with clips. sounds: these, as the processor got them, at the model's rate."""

    sounds: tuple[Sound, ...] = ()


class UniversalSoundCrafter(UniversalCrafter):
    """A crafter of one change for many clips: `universal.with_change` adds it to a clip."""

    def craft_change(self, settings: AttackSettings, lessons: Sequence[SoundLesson]) -> Entry:
        """The entry of the change, as long as what the model hears at once, that makes the model give every lesson's answer.

        Raises AttackError for lessons without sounds, or with pictures; ConfigError for settings of pictures.
        """
        if not lessons:
            raise AttackError("a universal attack has nothing to learn from; expected at least one pair")
        if not all(lesson.sounds for lesson in lessons):
            raise AttackError("a lesson has no sound; expected the clips that it is asked with")
        check_medium_of(settings)
        for lesson in lessons:
            Job(settings, (), lesson.inputs, lesson.answer, lesson.sounds).check()
        key = self._change_key(settings, lessons)
        entry = self._cache.get(key)
        if entry is not None:
            return entry
        groups = self._groups(lessons)
        renderers, gaps = self._renderers(lessons, groups)
        first = renderers[0]
        silence = (torch.zeros(1, first.window, device=self._model.device),)

        def corpus(inner: InnerDraws | None) -> CorpusLoss:
            return self._change_loss(key, settings, renderers, groups, lessons)

        found, record = self._searched(settings, corpus, silence, sounds=True)
        record |= {"rate": first.rate, "rendering_gap": max(gaps), "corpus_size": len(lessons)}
        return self._cache.put(key, (), record, [sound_of_row(found[0][0], first.rate)])

    def changed(self, change: Entry, clips: Sequence[Sound]) -> Entry:
        """The entry of one request's clips, in 16-bit steps, with the change of another entry on each; distances are its own."""
        key = content_key(
            format=FORMAT,
            kind="universal sound, added",
            change=change.key,
            clips=tuple(clip.pcm for clip in clips),
            rates=[clip.rate for clip in clips],
        )
        entry = self._cache.get(key)
        if entry is not None:
            return entry
        (what,) = change.sounds
        made = [with_change(clip, what) for clip in clips]
        cpu = torch.device("cpu")
        new, old = sound_slots([made], cpu), sound_slots([clips], cpu)
        told = ("attack", "model", "randomness", "rendering_gap", "seconds", "rate")
        record = {name: change.record[name] for name in told} | distances(new, old)[0]
        return self._cache.put(key, (), record | {"snr_db": decibels_apart(new, old)[0], "change": change.key}, made)

    def _change_key(self, settings: AttackSettings, lessons: Sequence[SoundLesson]) -> str:
        return content_key(
            format=FORMAT,
            kind="universal sound",
            **settings_parts(settings),
            code=plugins.provenance("attacks", settings.name),
            model=self.fingerprint,
            randomness=self._known_randomness(settings.eot, sounds=True),
            features=lessons[0].inputs[FEATURES].float().cpu().numpy(),
            sounds=tuple(np.asarray(sound.samples, np.float32) for lesson in lessons for sound in lesson.sounds),
            rates=[[sound.rate for sound in lesson.sounds] for lesson in lessons],
            prompts=tuple(lesson.inputs["input_ids"].cpu().numpy() for lesson in lessons),
            answers=[list(lesson.answer) for lesson in lessons],
        )

    def _groups(self, lessons: Sequence[SoundLesson]) -> dict[object, list[int]]:
        """Lessons whose prompts, answers and clips have equal lengths."""
        return grouped(
            (shapes_of(prompt), len(lesson.answer), tuple(len(sound.samples) for sound in lesson.sounds))
            for prompt, lesson in zip(prompts_of(lessons, set()), lessons, strict=True)
        )

    def _renderers(
        self, lessons: Sequence[SoundLesson], groups: dict[object, list[int]]
    ) -> tuple[dict[int, SoundRenderer], list[float]]:
        """Of each lesson, checked; a group has one in common."""
        found: dict[int, SoundRenderer] = {}
        gaps: list[float] = []
        for members in groups.values():
            batch = sound_batch(
                [lessons[member].sounds for member in members],
                [lessons[member].inputs for member in members],
                self._processor,
                self._model.device,
            )
            assert isinstance(batch.renderer, SoundRenderer)
            found |= dict.fromkeys(members, batch.renderer)
            gaps += batch.gaps
        return found, gaps

    def _change_loss(
        self,
        key: str,
        settings: AttackSettings,
        renderers: dict[int, SoundRenderer],
        groups: dict[object, list[int]],
        lessons: Sequence[SoundLesson],
    ) -> CorpusLoss:
        prompts = prompts_of(lessons, {FEATURES})

        def clips(members: Sequence[int]) -> Slots:
            return in_16_bits(sound_slots([lessons[member].sounds for member in members], self._model.device))

        def threat(step: int, members: Sequence[int]) -> Threat:
            renderer: Rendering = renderers[members[0]]
            return Threat(
                self._model,
                self._processor,
                renderer,
                clips(members),
                [prompts[member] for member in members],
                [lessons[member].answer for member in members],
                **self._chance(settings, [f"{key}|{step}|{member}" for member in members], None, sounds=True),
            )

        minibatches = Minibatches(groups, min(settings.options.batch, len(lessons)), settings.seed)
        rows = self._rows(settings, prompts[0])
        return CorpusLoss(threat, minibatches, rows, lambda change, members: added(clips(members), change))
