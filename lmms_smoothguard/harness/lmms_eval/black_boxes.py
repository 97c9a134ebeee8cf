"""lmms-eval's wrappers of remote models and engines of their own, with SmoothGuard carried out from outside.

Such a wrapper has no `generate` to defend. Each request is expanded into N, whose pictures carry noise of their own, the wrapper answers
them as it answers any other (concurrently, where it can), and their texts are voted on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts, unwrap_generation_output
from PIL import Image

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.blackbox.ballot import Ballot
from lmms_smoothguard.blackbox.config import check_outside
from lmms_smoothguard.blackbox.pictures import NoisyPictures, Sight
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.defenses.stopping import fewest_more, stop_rule
from lmms_smoothguard.errors import ConfigError, UndefendableError
from lmms_smoothguard.harness.lmms_eval import judging
from lmms_smoothguard.harness.lmms_eval.instances import count_media, images_of, with_images
from lmms_smoothguard.harness.lmms_eval.wrappers import SampleCounts, SmoothGuardMixin, parameters_of
from lmms_smoothguard.harness.options import explain_leftover, take_options
from lmms_smoothguard.noise import fresh_seed

log = logging.getLogger(__name__)

_SEEN_AS = "seen_as"
_FAILURES = ("[LMMS_EVAL_REQUEST_FAILED", "[LMMS_EVAL_BUDGET_EXCEEDED]")


class BlackBoxMixin(SmoothGuardMixin):
    """Stands before a wrapper without a model inside. Of our arguments it reads `defense`, SmoothGuard's fields (`noise_space` is
    "pixel"), `judge` and `seen_as`: how the model sees pictures, see `Sight.parse`."""

    _sg_sight = Sight()

    def _sg_init(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        accepted = [*parameters_of(type(self)), "batch_size", "max_batch_size", "device"]
        seen_as = kwargs.pop(_SEEN_AS, None)
        if kwargs.get("defense", "smoothguard") == "smoothguard":
            kwargs.setdefault("noise_space", "pixel")
        self._sg_options = take_options(kwargs, accepted)
        defense = self._sg_options.defense
        if defense is not None:
            if not isinstance(defense.config, SmoothGuardConfig) or defense.name != "smoothguard":
                raise UndefendableError(
                    f"defence {defense.name!r} acts inside of a model, and {type(self).__name__} has none; expected defense=smoothguard"
                )
            check_outside(defense.config)
            self._sg_sight = Sight.parse(seen_as)
        if self._sg_options.attack or self._sg_options.vision_tower is not None:
            raise ConfigError(
                f"{type(self).__name__} has no model inside, so it cannot craft attacks or take another vision tower; expected neither. "
                "Craft on a model at hand (smoothguard attack) and ask about those pictures"
            )
        explain_leftover(kwargs, [*accepted, _SEEN_AS], defense)
        judging.use(self._sg_options.judge)
        super(SmoothGuardMixin, self).__init__(*args, **kwargs)

    def _sg_model(self) -> Any:
        raise UndefendableError(f"{type(self).__name__} has no model inside")

    # -- what lmms-eval calls ------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers every request through N noisy copies of it; those without pictures, and all without a defence, as upstream does."""
        for request in requests:
            if self._sg_options.attack_on(request.metadata) is not None:
                raise UndefendableError(
                    f"{request.task_name} attacks the model it asks, and {type(self).__name__} has none inside; expected a task without "
                    "an attack. Craft on a model at hand (smoothguard attack) and ask about those pictures"
                )
        asked = [_Asked(self, request, self._sg_options.defense, self._sg_sight) for request in requests]
        while waves := [(one, copy) for one in asked for copy in one.next_copies()]:
            found = super(SmoothGuardMixin, self).generate_until([one.copy(copy) for one, copy in waves])  # type: ignore[misc]
            for (one, copy), result in zip(waves, found, strict=True):
                one.add(copy, *unwrap_generation_output(result))
        answers = [one.result() for one in asked]
        if lost := [one.name for one in asked if one.lost]:
            log.warning(
                "%d of %d requests got too few answers for a vote, %s among them: they are scored by upstream's words for a failed "
                "request, and marked `no_quorum` in the samples log", len(lost), len(asked), lost[0],
            )  # fmt: skip
        judging.judge_ahead(self, self._sg_finish(list(requests), answers))
        return answers


class _Asked:
    """One request and its copies."""

    def __init__(self, wrapper: Any, request: Instance, defense: Any, sight: Sight) -> None:
        """Raises UndefendableError for media that are not all pictures."""
        self._wrapper, self._request, self._sight = wrapper, request, sight
        self.name = f"{request.task_name}[{request.doc_id}]"
        pictures, media = len(images_of(wrapper, request)), count_media(wrapper, request)
        self._config: SmoothGuardConfig | None = defense.config if defense is not None and media else None
        self._off = defense is None
        if self._config is not None and pictures != media:
            raise UndefendableError(
                f"{self.name} has {media} media, {pictures} of them pictures; expected pictures alone, for only these can be noised from "
                "outside. Leave the task out, or use defense=none"
            )
        if self._config is not None:
            for picture in images_of(wrapper, request):
                sight.check(picture)  # now: upstream's wrappers swallow what is raised while they ask
            self._seed = fresh_seed() if self._config.seed is None else self._config.seed
            self._ballot = Ballot(self._config, self._config.num_samples // 2 + 1)
        self._texts: dict[int, str] = {}
        self._counts: list[TokenCounts] = []

    def next_copies(self) -> range:
        """The copies to ask next: as many as could settle it, but never fewer than were asked before."""
        done = len(self._texts)
        if self._config is None:
            return range(done, 1)
        total, rule = self._config.num_samples, stop_rule(self._config.early_stop)
        if done >= total or (done and self._ballot.settled):
            return range(0)
        said = [normalize_answer(self._texts[copy]) for copy in range(done)]
        failed = self._ballot.failed
        needed = total - done if failed else max(done, fewest_more(said, total, rule))
        return range(done, min(total, done + needed))

    def copy(self, number: int) -> Instance:
        """The request with the pictures of copy `number`, from 0; they are made when they are looked at."""
        if self._config is None:
            return self._request
        noisy = number if self._config.include_clean else number + 1
        pictures = _Pictures(self._wrapper, self._request, self._config.sigma, self._seed, self._sight, noisy)
        return dataclasses.replace(self._request, arguments=with_images(self._wrapper, self._request, pictures))

    def add(self, number: int, text: str | None, counts: TokenCounts | None) -> None:
        """What was said to copy `number`."""
        self._texts[number] = text or ""
        self._counts += [counts] if counts is not None else []
        if self._config is not None and is_failure(text):
            self._ballot.fail(number)
        elif self._config is not None:
            self._ballot.add(number, self._texts[number])

    @property
    def lost(self) -> bool:
        """Whether too few copies were answered for a vote."""
        return self._config is not None and self._ballot.hopeless

    def result(self) -> GenerationResult:
        """The answer, with what the samples log says of it; token counts are those of all copies."""
        counts = _sum(self._counts)
        if self._config is None:
            info: dict[str, Any] = {} if self._off else {"defended": False}
            return GenerationResult(text=self._texts[0], token_counts=SampleCounts(info, counts))
        if self.lost:
            info = {"defended": False, "no_quorum": True, "failed": self._ballot.failed}
            said = next(text for text in self._texts.values() if is_failure(text))
            return GenerationResult(text=said, token_counts=SampleCounts(info, counts))
        verdict, copies = self._ballot.verdict()
        info = {
            "defended": True,
            "agreement": verdict.agreement,
            "suspicion": verdict.suspicion,
            "suspected": verdict.suspected,
            "num_samples_used": len(copies),
            "candidates": [self._texts[copy] for copy in copies],
            "labels": list(verdict.labels),
            "failed": self._ballot.failed,
            "warnings": list(verdict.warnings),
        }
        return GenerationResult(text=self._texts[copies[verdict.chosen]], token_counts=SampleCounts(info, counts))


class _Pictures(Sequence[Image.Image]):
    """A copy's pictures, made anew whenever they are looked at: N copies of a whole data set would fill the memory."""

    def __init__(self, wrapper: Any, request: Instance, sigma: float, seed: int, sight: Sight, number: int) -> None:
        self._wrapper, self._request, self._number, self._sight = wrapper, request, number, sight
        self._noise = (sigma, seed)

    def _made(self) -> list[Image.Image]:
        own = [self._sight.of(picture) for picture in images_of(self._wrapper, self._request)]
        noisy = NoisyPictures(own, *self._noise)
        return noisy.copy(self._number) if self._number else noisy.clean

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(images_of(self._wrapper, self._request))

    def __getitem__(self, index: Any) -> Any:
        return self._made()[index]


def is_failure(text: str | None) -> bool:
    """Whether a text is how one of upstream's wrappers says that it got no answer: some have words for it, others say nothing. A
    vote must not count it."""
    return not text or text.startswith(_FAILURES)


def _sum(counts: Sequence[TokenCounts]) -> TokenCounts | None:
    if not counts:
        return None
    names = [field.name for field in dataclasses.fields(TokenCounts)]
    totals = {
        name: [getattr(one, name) for one in counts if isinstance(getattr(one, name), int | float)] for name in names
    }
    return TokenCounts(**{name: sum(values) if values else None for name, values in totals.items()})
