"""Crafts adversarial images for a list of jobs: cache first, the rest in batches of like shapes.

An image is a function of its job alone, however jobs are batched, ordered, limited or sharded: no row of a batch is
padded, and EOT noise is keyed by the job. What is left to chance is a kernel whose rounding depends on the batch size;
on CPUs none was found (`docs/decisions.md`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.base import Attack
from lmms_smoothguard.attacks.cache import FORMAT, AttackCache, Entry, content_key
from lmms_smoothguard.attacks.model_state import deterministic, frozen
from lmms_smoothguard.attacks.objective import PIXELS, InnerDraws, Perturb, Threat, attackers_generator
from lmms_smoothguard.attacks.pictures import Pictures, distances
from lmms_smoothguard.attacks.precision import exact_logits
from lmms_smoothguard.attacks.rendering import Renderer, warn_of
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.fingerprint import model_fingerprint
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.inputs.statistics import PixelStatistics, pixel_statistics
from lmms_smoothguard.noise import Draw, Inside, Randomness

_ALONE = frozenset({"cross_attention_mask", "position_ids"})


@dataclass(frozen=True)
class Job:
    """One request to attack.

    images: the clean pictures; inputs: what the ordinary path gave to `generate` for them, batch size 1; answer: the
    token ids whose loss is raised (untargeted) or lowered (targeted).
    """

    settings: AttackSettings
    images: tuple[Image.Image, ...]
    inputs: Mapping[str, Any]
    answer: tuple[int, ...]


class Crafter:
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
        self._model, self._processor, self._cache, self._defense = model, processor, cache, defense
        self._batch_size, self._quiet = batch_size, quiet
        self.fingerprint = model_fingerprint(model)

    def craft(self, jobs: Sequence[Job]) -> list[Entry]:
        """The entries of all jobs, in order. What is crafted is cached batch by batch, so a killed run goes on."""
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
        return content_key(
            format=FORMAT,
            **settings_parts(job.settings),
            code=plugins.provenance("attacks", job.settings.name),
            model=self.fingerprint,
            randomness=self._known_randomness(job.settings.eot),
            answer=list(job.answer),
            prompt=job.inputs["input_ids"].cpu().numpy(),
            pixels=job.inputs[PIXELS].float().cpu().numpy(),
            images=tuple(np.asarray(image.convert("RGB")) for image in job.images),
        )

    def _known_randomness(self, eot: int) -> dict[str, Any] | None:
        """The defence that EOT averages over, as far as its randomness hangs on it; None without EOT."""
        if not eot:
            return None
        if self._defense is None or (randomness := _randomness_of(self._defense)) is None:
            name = "none" if self._defense is None else self._defense.name
            raise AttackError(
                f"attack_eot is {eot}, an average over the defence's randomness, and defense={name} shows none; expected a "
                "defence with `randomness`, such as defense=smoothguard"
            )
        if "seed" in randomness.fields:
            raise AttackError(
                f"the randomness of defence {self._defense.name!r} hangs on its seed; expected a distribution, for no attacker "
                "knows the seed that an answer is given with"
            )
        fields = {field: getattr(self._defense.config, field) for field in randomness.fields}
        if randomness.content is not None:
            fields["content"] = randomness.content(self._model, self._defense.config)
        return {"defense": self._defense.name, **fields, "code": plugins.provenance("defenses", self._defense.name)}

    def _batches(self, missing: Mapping[str, Job]) -> Iterator[list[str]]:
        """Keys of jobs that can share a batch: the same settings, image sizes, input shapes and answer length.

        A row padded to its longest neighbour would see other positions, so other last bits, and other gradient signs.
        """
        groups: dict[Any, list[str]] = defaultdict(list)
        for key, job in missing.items():
            shapes = sorted((k, tuple(v.shape)) for k, v in job.inputs.items() if isinstance(v, torch.Tensor))
            sizes = tuple(image.size for image in job.images)
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
        first = next(iter(jobs.values()))
        settings, device = first.settings, self._model.device
        clean = slots_of([job.images for job in jobs.values()], device)
        renderer = Renderer(self._processor, device, first.inputs[PIXELS].dtype)
        captured = {**first.inputs, PIXELS: torch.cat([job.inputs[PIXELS] for job in jobs.values()])}
        with torch.no_grad():
            gaps = renderer.check(clean, captured, PIXELS)
        warn_of(gaps)
        rendered = set(renderer(tuple(slot[:1] for slot in clean)))
        prompts = [
            {k: v for k, v in job.inputs.items() if isinstance(v, torch.Tensor) and k not in rendered}
            for job in jobs.values()
        ]
        started, losses = time.perf_counter(), []

        def progress(number: int, value: torch.Tensor) -> None:
            losses.append(value.float().cpu())
            bar.update(len(jobs))

        answers = [job.answer for job in jobs.values()]
        with plugins.blame("attacks", settings.name), exact_logits(self._model), self._attacked(settings) as inner:
            chance = self._chance(settings, list(jobs), inner)
            threat = Threat(self._model, self._processor, renderer, clean, prompts, answers, **chance)
            attack: Attack = plugins.load("attacks", settings.name)(settings)
            adversarial = attack.run(attack.objective(threat), clean, progress)
        apart = distances_within(settings, adversarial, clean)
        seconds = (time.perf_counter() - started) / len(jobs)
        if not settings.eps:
            bar.update(len(jobs))
        entries = {}
        for row, (key, distance) in enumerate(zip(jobs, apart, strict=True)):
            images = [(slot[row] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy() for slot in adversarial]
            record = {
                "attack": settings.to_dict(),
                "model": self.fingerprint,
                "randomness": self._known_randomness(settings.eot),
                **distance,
                "rendering_gap": gaps[row],
                "seconds": seconds,
                "objective": [round(float(step[row]), 5) for step in losses],
            }
            entries[key] = self._cache.put(key, images, record)
        return entries

    def _chance(self, settings: AttackSettings, keys: Sequence[str], inner: InnerDraws | None) -> dict[str, Any]:
        """The attacker's draws of the defence's randomness, before the model and inside it, as a threat has them."""
        if not settings.eot:
            return {}
        assert self._defense is not None
        randomness = _randomness_of(self._defense)
        assert randomness is not None
        found: dict[str, Any] = {}
        if randomness.draw is not None:
            found |= {"perturb": self._perturbation(settings, keys, randomness.draw), "draws": settings.eot}
        if inner is not None:
            found["expect"] = functools.partial(inner.expect, keys)
        return found

    def _perturbation(
        self, settings: AttackSettings, keys: Sequence[str], drawn: Callable[[Draw, Any], torch.Tensor]
    ) -> Perturb:
        """One draw of the defence's randomness a call, keyed by the attacker's seed and each row's own key.

        So a row's draws depend on no neighbour, restarts of a row share them, and evaluation seeds stay unseen.
        """
        assert self._defense is not None
        config, draws = _without_seed(self._defense.config), itertools.count()

        def perturb(rendered: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
            images = find_images(rendered, self._model.config)
            if images is None:
                raise AttackError("the image processor rendered no pixels; expected pixel_values")
            draw, slots = next(draws), range(len(images.slices) // rows)
            places = itertools.product(list(keys) * (rows // len(keys)), slots)
            generators = [attackers_generator(settings.seed, key, slot, draw) for key, slot in places]
            return drawn(Draw(images, generators, self._statistics), config)

        return perturb

    @contextlib.contextmanager
    def _attacked(self, settings: AttackSettings) -> Iterator[InnerDraws | None]:
        """The model as it is attacked: with what the defence does inside it under EOT, whose chance is handed out; else bare."""
        randomness = _randomness_of(self._defense) if settings.eot and self._defense is not None else None
        if self._defense is None or randomness is None or randomness.inside is None:
            yield None
            return
        processor, inner = getattr(self._processor, "image_processor", self._processor), InnerDraws(settings.seed)
        config = _without_seed(self._defense.config)
        with randomness.inside(Inside(self._model, processor, settings.eot, inner), config):
            yield inner

    def _statistics(self) -> PixelStatistics:
        return pixel_statistics(self._model, getattr(self._processor, "image_processor", self._processor))


def distances_within(settings: AttackSettings, adversarial: Pictures, clean: Pictures) -> list[dict[str, float]]:
    """`distances`. Raises AttackError where one is beyond the budget, which no attack may leave."""
    apart = distances(adversarial, clean)
    if (largest := max(distance[settings.norm] for distance in apart)) > settings.eps + 1e-6:
        raise AttackError(
            f"attack {settings.name!r} left its budget: {settings.norm} {largest:.4g}, expected at most {settings.eps:.4g}"
        )
    return apart


def _without_seed(config: Any) -> Any:
    """A defence's settings as an attacker knows them."""
    if not any(field.name == "seed" for field in dataclasses.fields(config)):
        return config
    return dataclasses.replace(config, seed=None)


def _randomness_of(defense: Choice) -> Randomness | None:
    return getattr(plugins.load("defenses", defense.name), "randomness", None)


def settings_parts(settings: AttackSettings) -> dict[str, Any]:
    """What a key says of an attack's settings: whatever options only point at stands there by its content."""
    attack: type[Attack] = plugins.load("attacks", settings.name)
    with plugins.blame("attacks", settings.name):
        content = attack.content(settings)
    fields = {name: value for name, value in settings.to_dict().items() if name not in content}
    return {"settings": fields, **{f"content of {name}": value for name, value in content.items()}}


def slots_of(rows: Sequence[Sequence[Image.Image]], device: torch.device) -> Pictures:
    """Clean pictures as float slots (batch, 3, height, width)."""
    arrays = [[np.asarray(image.convert("RGB"), np.float32) / 255 for image in row] for row in rows]
    return tuple(
        torch.from_numpy(np.stack([row[slot] for row in arrays])).permute(0, 3, 1, 2).contiguous().to(device)
        for slot in range(len(arrays[0]))
    )
