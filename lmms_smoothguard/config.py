"""One frozen, validated description of a SmoothGuard defence; the same names in every tool."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from lmms_smoothguard import plugins
from lmms_smoothguard.errors import ConfigError, did_you_mean

LEVELS = ("answer", "token")
NOISE_SPACES = ("normalized", "pixel")
_LARGEST_SIGMA = {"normalized": 20.0, "pixel": 5.0}  # beyond this no picture is left in any sense
_LEAST_SNR, _MOST_SNR = -40.0, 120.0  # noise of a hundred times the amplitude, and less than 16-bit rounding makes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothGuardConfig:
    """SmoothGuard (arXiv 2510.26830, section 3), at answer level as published or at token level.

    level: "answer" (N whole answers, clustered) or "token" (the N copies decode in lock-step, each next token is agreed
        on: one sequence, which can be streamed as it arises).
    num_samples: N, the copies of a request that are answered.
    include_clean: whether copy 0 is the unperturbed input.
    sigma: standard deviation of the noise, in units of `noise_space`: "normalized" (the model's input tensor, as
        published) or "pixel" ([0, 1] intensities, clipped to that range).
    audio_sigma: standard deviation of the noise on sounds, in amplitude (full scale 1).
    audio_snr: the same as the distance of each clip's power from its noise's, in dB; None = audio_sigma.
    embedder, aggregator: registered names; an embedder may also be a sentence-transformers id or a directory.
    early_stop: "off", "exact" (no further copies once they cannot change the answer) or an error rate such as 0.01: the
        largest probability that the answer is not the one all N copies would have given, for inputs made without
        knowledge of the seed.
    seed: base seed of the noise; None draws fresh entropy for every request. Serve strangers with None: public noise
        is a fixed function that an attacker can optimise against.
    max_copies_per_batch: None = all at once, fewer after an out-of-memory error.
    """

    level: str = "answer"
    num_samples: int = 10
    include_clean: bool = True
    sigma: float = 0.1
    noise_space: str = "normalized"
    audio_sigma: float = 0.02
    audio_snr: float | None = None
    embedder: str = "lexical"
    aggregator: str = "kmeans"
    early_stop: str | float = "off"
    seed: int | None = 0
    max_copies_per_batch: int | None = None

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigError(f"level is {self.level!r}; {did_you_mean(str(self.level), LEVELS)}")
        _integer("num_samples", self.num_samples, at_least=1)
        _boolean("include_clean", self.include_clean)
        if self.noise_space not in NOISE_SPACES:
            raise ConfigError(
                f"noise_space is {self.noise_space!r}; {did_you_mean(str(self.noise_space), NOISE_SPACES)}"
            )
        largest = _LARGEST_SIGMA[self.noise_space]
        units = f"{self.noise_space} units (the paper uses 0.1 to 0.2)"
        _between("sigma", self.sigma, 0, largest, units, "0.1")
        _between("audio_sigma", self.audio_sigma, 0, 1, "amplitude (full scale 1)", "0.02")
        if self.audio_snr is not None:
            _between("audio_snr", self.audio_snr, _LEAST_SNR, _MOST_SNR, "dB", "20")
        _registered("aggregators", self.aggregator)
        if not isinstance(self.embedder, str) or not _is_model_path(self.embedder):
            _registered("embedders", self.embedder, "sentence-transformers/<id>", "a directory")
        _early_stop(self.early_stop)
        if self.seed is not None:
            _integer("seed", self.seed, at_least=0)
        if self.max_copies_per_batch is not None:
            _integer("max_copies_per_batch", self.max_copies_per_batch, at_least=1)
        if self.level == "token":
            self._check_token_level()

    def _check_token_level(self) -> None:
        if self.early_stop != "off":
            raise ConfigError(
                f"early_stop is {self.early_stop!r}; at level 'token' all copies are needed, expected 'off'"
            )
        if self.max_copies_per_batch is not None and self.max_copies_per_batch < self.num_samples:
            raise ConfigError(
                f"max_copies_per_batch is {self.max_copies_per_batch}; at level 'token' all {self.num_samples} copies decode "
                "together. Expected null, or fewer num_samples."
            )

    @classmethod
    def paper(cls) -> SmoothGuardConfig:
        """The published setting: N = 10 with the clean copy, sigma 0.1 in normalised space, RoBERTa-base, k-means."""
        return cls(embedder="roberta-base")


def defends_nothing(config: SmoothGuardConfig, *, pictures: bool = True, sounds: bool = True) -> dict[str, str]:
    """What is wrong with each setting, by its name, that leaves a vote about such media without effect: one answer, or equal copies.

    Measurements may ask for it, to compare with.
    """
    found = {}
    if config.num_samples < 2:
        found["num_samples"] = f"num_samples is {config.num_samples}; expected at least 2, for one answer is no vote"
    if pictures and config.sigma == 0:
        found["sigma"] = f"sigma is {config.sigma}; expected more, for equal copies defend nothing"
    if sounds and config.audio_sigma == 0 and config.audio_snr is None:
        found["audio_sigma"] = f"audio_sigma is {config.audio_sigma}; expected more, for equal copies defend nothing"
    return found


def check_vote(config: SmoothGuardConfig) -> None:
    """Raises ConfigError for settings that defend nothing, which no deployment can mean."""
    for said in defends_nothing(config).values():
        raise ConfigError(said)


def parse_scalar(text: Any) -> Any:
    """What a command line's `key=value` means: none, true / false, a number, a fraction such as 8/255, else the text."""
    if not isinstance(text, str):
        return text
    lowered = text.strip().lower()
    if lowered in ("none", "null"):
        return None
    if lowered in ("true", "false"):
        return lowered == "true"
    try:
        return int(lowered)
    except ValueError:
        pass
    try:
        numerator, slash, denominator = lowered.partition("/")
        return float(numerator) / float(denominator) if slash else float(lowered)
    except (ValueError, ZeroDivisionError):
        return text.strip()


def _early_stop(value: Any) -> None:
    if value in ("off", "exact") and isinstance(value, str):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 0.5:
        raise ConfigError(
            f"early_stop is {value!r}; expected 'off', 'exact' or an error rate between 0 and 0.5, such as 0.01"
        )


def _registered(kind: plugins.Kind, name: Any, *others: str) -> None:
    known = plugins.offers(kind)
    if name not in known:
        also = "".join(f", {other}" for other in others)
        raise ConfigError(f"unknown {plugins.SINGULAR[kind]} {name!r}; {did_you_mean(str(name), known)}{also}")


def _is_model_path(embedder: str) -> bool:
    return embedder.startswith("sentence-transformers/") or (embedder != "" and Path(embedder).is_dir())


def _between(name: str, value: Any, low: float, high: float, units: str, example: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}; expected a number such as {example}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; expected {low:g} to {high:g} in {units}")


def _integer(name: str, value: Any, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {at_least}")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected true or false")
