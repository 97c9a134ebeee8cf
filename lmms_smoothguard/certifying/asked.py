"""What a user asks of `smoothguard certify`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from lmms_smoothguard.certify.checks import (
    checked_alpha,
    checked_count,
    checked_radius,
    checked_sigma,
)
from lmms_smoothguard.certify.features import CLEAN, SERVED
from lmms_smoothguard.certify.gaussian import checked_similarity
from lmms_smoothguard.errors import ConfigError, did_you_mean

FEATURES, CLASSES, ANSWERS = "features", "classes", "answers"
WHAT = (FEATURES, CLASSES, ANSWERS)
PICTURES_SIGMA = 0.25
PICTURES_RADII: tuple[float, ...] = (0.1, 0.25, 0.5)
_SOUNDS_RADII = (0.5, 1.0, 2.0)
"""In sigmas."""
_LARGEST_SIGMA, _LARGEST_SIGMA_OF_SOUNDS = 5.0, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifyRun:
    """What a user asks for. Everything is checked here. Raises ConfigError.

    model: a hub id, a directory or an embedded model; data: whatever `find_questions` takes, with split, limit, question and
    columns; what: features (each picture once), classes (of a dual encoder, each picture once) or answers (each question).
    sigma: in [0, 1] pixel units at the model's resolution (None = 0.25), of answers about sounds in amplitude (full scale 1), where it has to
    be given; n: draws that certify; n_select: separate draws that choose the answer,
    the class, or what `reference` "served" compares with; alpha: of each certificate; n0, beta: the draws of a served mean, and its
    own probability of error (None = alpha). radii, similarity: what the table asks about (None = 0.1, 0.25 and 0.5 of pictures; half of sigma, sigma
    and twice sigma of sounds); booster, mapper: as in feature smoothing;
    classes, prompts: names (none = the labels of the data) and sentences with {} for them; match: when an answer is right;
    batch_size: noisy copies of the model at once; vision_tower, vision_tower_resolution: as in `Subject`.
    """

    model: str
    data: str
    out: Path
    what: str = FEATURES
    sigma: float | None = None
    n0: int = 32
    n: int = 1000
    n_select: int = 100
    alpha: float = 0.001
    beta: float | None = None
    radii: tuple[float, ...] | None = None
    similarity: float = 0.5
    reference: str = CLEAN
    booster: str | None = None
    mapper: bool = True
    seed: int = 0
    split: str | None = None
    limit: int | None = None
    question: str | None = None
    columns: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    max_new_tokens: int | None = None
    match: str = "exact"
    classes: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ("a photo of {}",)
    batch_size: int = 32
    device: str | None = None
    dtype: str = "auto"
    vision_tower: str | None = None
    vision_tower_resolution: str = "model"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise ConfigError(f"what is {self.what!r}; {did_you_mean(str(self.what), WHAT)}")
        if self.sigma is not None and checked_sigma(self.sigma) > _LARGEST_SIGMA:
            raise ConfigError(
                f"sigma is {self.sigma!r}; expected at most {_LARGEST_SIGMA:g} of pictures ([0, 1] pixel units), at most "
                f"{_LARGEST_SIGMA_OF_SOUNDS:g} of sounds (amplitude, full scale 1): nothing of either is left beyond"
            )
        for name, least in (
            ("n0", 2),
            ("n", 2),
            ("n_select", 1),
            ("batch_size", 1),
            ("limit", 1),
            ("max_new_tokens", 1),
        ):
            if (value := getattr(self, name)) is not None:
                checked_count(value, name, least)
        checked_count(self.seed, "seed", 0)
        checked_alpha(self.alpha)
        if self.beta is not None:
            checked_alpha(self.beta, "beta")
        checked_similarity(self.similarity)
        if self.radii is not None and not self.radii:
            raise ConfigError("radii are empty; expected one L2 norm at least, such as 0.1,0.25,0.5")
        for radius in self.radii or ():
            checked_radius(radius)
        self._check_what()

    def _check_what(self) -> None:
        if self.vision_tower is not None and self.what == CLASSES:
            raise ConfigError(
                f"vision_tower is {self.vision_tower!r}, and --what is classes, of a dual encoder as it is; expected the directory of one "
                "that has this tower"
            )
        if self.reference not in (CLEAN, SERVED):
            raise ConfigError(f"reference is {self.reference!r}; {did_you_mean(str(self.reference), (CLEAN, SERVED))}")
        if self.reference == SERVED and self.what != FEATURES:
            raise ConfigError(f"reference is 'served', which features are compared with, and --what is {self.what}")
        if self.booster is not None and self.what == ANSWERS:
            raise ConfigError(
                f"booster is {self.booster!r}, and --what is answers, which are those of the model to noisy pictures; expected "
                "--what features or classes beside a booster"
            )
        if self.what == CLASSES:
            for prompt in self.prompts:
                if "{}" not in prompt:
                    raise ConfigError(
                        f"prompt is {prompt!r}; expected a sentence with {{}} for the class, such as 'a photo of {{}}'"
                    )
            if not self.prompts:
                raise ConfigError("prompts are empty; expected one at least, such as 'a photo of {}'")
            if len(set(self.classes)) < len(self.classes) or len(self.classes) == 1:
                raise ConfigError(
                    f"classes are {self.classes}; expected two or more different names, or none for the data's labels"
                )
        elif self.classes:
            raise ConfigError(f"classes are given, and --what is {self.what}; expected --what classes beside them")

    @property
    def served_beta(self) -> float:
        """Of the served mean."""
        return self.alpha if self.beta is None else self.beta

    def about(self, *, sounds: bool) -> Certification:
        """This with the noise and the radii of pictures, or of sounds. Raises ConfigError for a sigma that is none of sounds."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(CertifyRun)}
        if not sounds:
            sigma = PICTURES_SIGMA if self.sigma is None else self.sigma
            radii = PICTURES_RADII if self.radii is None else self.radii
            return Certification(**fields | {"sigma": sigma, "radii": radii})
        if self.sigma is None:
            raise ConfigError(
                "sigma is not given, and for sounds it has no default; expected the noise that is served, in amplitude (full scale 1), "
                "such as --sigma 0.02, SmoothGuard's audio_sigma"
            )
        if self.sigma > _LARGEST_SIGMA_OF_SOUNDS:
            raise ConfigError(
                f"sigma is {self.sigma!r}; expected at most {_LARGEST_SIGMA_OF_SOUNDS:g} of sounds, in amplitude (full scale 1): no sound "
                "is left beyond"
            )
        radii = tuple(part * self.sigma for part in _SOUNDS_RADII) if self.radii is None else self.radii
        return Certification(**fields | {"radii": radii})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certification(CertifyRun):
    """A run of which it is known what its questions are about, so that noise and radii are known, too."""

    sigma: float = PICTURES_SIGMA
    radii: tuple[float, ...] = PICTURES_RADII
