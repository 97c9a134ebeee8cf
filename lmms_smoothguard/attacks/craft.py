"""Crafts adversarial images and sounds for a list of jobs: cache first, the rest in batches of like shapes.

An image or sound is a function of its job alone, however jobs are batched, ordered, limited or sharded: no row of a batch is
padded, and EOT noise is keyed by the job. What is left to chance is a kernel whose rounding depends on the batch size;
on CPUs none was found for pictures (`docs/decisions.md`), and for sounds none is left (`model_state.rows_apart`).
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.adaptive import Adaptive
from lmms_smoothguard.attacks.base import Attack
from lmms_smoothguard.attacks.batches import picture_batch, sound_batch
from lmms_smoothguard.attacks.cache import FORMAT, AttackCache, Entry, content_key
from lmms_smoothguard.attacks.media import PICTURES, SOUNDS
from lmms_smoothguard.attacks.model_state import deterministic, frozen, rows_apart
from lmms_smoothguard.attacks.objective import Threat
from lmms_smoothguard.attacks.precision import exact_logits
from lmms_smoothguard.attacks.rendering import PIXELS
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.sound_rendering import FEATURES
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.fingerprint import model_fingerprint
from lmms_smoothguard.inputs.media import IMAGE_KEYS
from lmms_smoothguard.sounds import Sound

_ALONE = frozenset({"cross_attention_mask", "position_ids"})


@dataclass(frozen=True)
class Job:
    """One request to attack.

    images: the clean pictures; inputs: what the ordinary path gave to `generate` for them, batch size 1; answer: the
    token ids whose loss is raised (untargeted) or lowered (targeted); sounds: the clean sounds as the processor got them, at the
    model's rate (then there are no images).
    """

    settings: AttackSettings
    images: tuple[Image.Image, ...]
    inputs: Mapping[str, Any]
    answer: tuple[int, ...]
    sounds: tuple[Sound, ...] = ()

    def check(self) -> None:
        """Raises AttackError for media that cannot be attacked, ConfigError for settings that say nothing about them."""
        if not self.sounds:
            self.settings.check_medium(PICTURES)
            return
        if self.images or any(self.inputs.get(key) is not None for key in IMAGE_KEYS):
            raise AttackError(
                "the request has pictures and sounds; expected one of them. Attacks on both are not supported."
            )
        if self.inputs.get(FEATURES) is None:
            raise AttackError(
                f"the request has no {FEATURES} (it has {', '.join(self.inputs)}), which is what is attacked; expected a model that "
                "takes its sounds so"
            )
        self.settings.check_medium(SOUNDS)


class Crafter(Adaptive):
    """Attacks one model; `defense` is what EOT averages over, with draws of the attacker's own.

    processor: the model's processor, or its image processor alone where the rest says nothing of images.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        cache: AttackCache,
        defense: Choice | None = None,
        batch_size: int = 32,
        quiet: bool = False,
    ) -> None:
        """`quiet`: no progress bar."""
        super().__init__(model, processor, defense)
        self._cache, self._batch_size, self._quiet = cache, batch_size, quiet
        self.fingerprint = model_fingerprint(model)

    def craft(self, jobs: Sequence[Job]) -> list[Entry]:
        """The entries of all jobs, in order. What is crafted is cached batch by batch, so a killed run goes on."""
        for job in jobs:
            job.check()
        keys = [self._key(job) for job in jobs]
        entries = {key: self._cache.get(key) for key in dict.fromkeys(keys)}
        missing = {key: job for key, job in zip(keys, jobs, strict=True) if entries[key] is None}
        if missing:
            from tqdm import tqdm

            total = sum(job.settings.steps if job.settings.eps else 1 for job in missing.values())
            title = f"crafting {len(missing)} attacks"
            with (
                tqdm(total=total, desc=title, unit="step", disable=self._quiet) as bar,
                frozen(self._model),
                deterministic(),
            ):
                for batch in self._batches(missing):
                    entries |= self._craft_batch({key: missing[key] for key in batch}, bar)
        return [entry for key in keys if (entry := entries[key]) is not None]

    def _key(self, job: Job) -> str:
        if job.sounds:
            media: dict[str, Any] = {
                "features": _array(job.inputs[FEATURES]),
                "sounds": tuple(np.asarray(sound.samples, np.float32) for sound in job.sounds),
                "rates": [sound.rate for sound in job.sounds],
            }
        else:
            images = tuple(np.asarray(image.convert("RGB")) for image in job.images)
            media = {"pixels": _array(job.inputs[PIXELS]), "images": images}
        return content_key(
            format=FORMAT,
            **settings_parts(job.settings),
            code=plugins.provenance("attacks", job.settings.name),
            model=self.fingerprint,
            randomness=self._known_randomness(job.settings.eot, sounds=bool(job.sounds)),
            answer=list(job.answer),
            prompt=job.inputs["input_ids"].cpu().numpy(),
            **media,
        )

    def _batches(self, missing: Mapping[str, Job]) -> Iterator[list[str]]:
        """Keys of jobs that can share a batch: the same settings, image sizes or lengths, input shapes and answer length.

        A row padded to its longest neighbour would see other positions, so other last bits, and other gradient signs.
        """
        groups: dict[Any, list[str]] = defaultdict(list)
        for key, job in missing.items():
            shapes = sorted((k, tuple(v.shape)) for k, v in job.inputs.items() if isinstance(v, torch.Tensor))
            sizes = (*(image.size for image in job.images), *(len(sound.samples) for sound in job.sounds))
            groups[(job.settings, sizes, len(job.answer), tuple(shapes))].append(key)
        for (settings, *_, shapes), keys in groups.items():
            size = self._rows(settings, [name for name, _ in shapes])
            for start in range(0, len(keys), size):
                yield keys[start : start + size]

    def _rows(self, settings: AttackSettings, names: Iterable[str]) -> int:
        """How many requests can share a batch, the model's rows for each counted; those with inputs called `names` not at all
        where these have no row a request."""
        if not _ALONE.isdisjoint(names):
            return 1
        attack: type[Attack] = plugins.load("attacks", settings.name)
        return max(1, self._batch_size // (max(1, settings.eot) * attack.rows(settings)))

    def _craft_batch(self, jobs: Mapping[str, Job], bar: Any) -> dict[str, Entry]:
        listed = list(jobs.values())
        settings, sounds = listed[0].settings, bool(listed[0].sounds)
        inputs, device = [job.inputs for job in listed], self._model.device
        if sounds:
            batch = sound_batch([job.sounds for job in listed], inputs, self._processor, device)
        else:
            batch = picture_batch([job.images for job in listed], inputs, self._processor, device)
        prompts = batch.prompts(inputs)
        started, losses = time.perf_counter(), []

        def progress(number: int, value: torch.Tensor) -> None:
            losses.append(value.float().cpu())
            bar.update(len(jobs))

        answers = [job.answer for job in listed]
        with (
            plugins.blame("attacks", settings.name),
            exact_logits(self._model),
            rows_apart(self._model) if sounds else contextlib.nullcontext(),
            self._attacked(settings, sounds=sounds) as inner,
        ):
            chance = self._chance(settings, list(jobs), inner, sounds=sounds)
            threat = Threat(self._model, self._processor, batch.renderer, batch.clean, prompts, answers, **chance)
            attack: Attack = plugins.load("attacks", settings.name)(settings)
            adversarial = attack.run(attack.objective(threat), batch.clean, progress)
        apart = attack.distances_within(adversarial, batch.clean)
        seconds = (time.perf_counter() - started) / len(jobs)
        if not losses:
            bar.update(len(jobs))
        entries = {}
        for row, (key, distance) in enumerate(zip(jobs, apart, strict=True)):
            found = batch.stored(adversarial, row)
            record = {
                "attack": settings.to_dict(),
                "model": self.fingerprint,
                "randomness": self._known_randomness(settings.eot, sounds=sounds),
                **distance,
                **found.record,
                "rendering_gap": batch.gaps[row],
                "seconds": seconds,
                "objective": [round(float(step[row]), 5) for step in losses],
            }
            entries[key] = self._cache.put(key, found.images, record, found.sounds)
        return entries


def _array(values: torch.Tensor) -> np.ndarray:
    return np.asarray(values.float().cpu().numpy())


def settings_parts(settings: AttackSettings) -> dict[str, Any]:
    """What a key says of an attack's settings: whatever options only point at stands there by its content."""
    attack: type[Attack] = plugins.load("attacks", settings.name)
    with plugins.blame("attacks", settings.name):
        content = attack.content(settings)
    fields = {name: value for name, value in settings.to_dict().items() if name not in content}
    return {"settings": fields, **{f"content of {name}": value for name, value in content.items()}}
