"""One frozen, validated description of a SmoothGuard defence; the same names in every tool."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmms_smoothguard import plugins
from lmms_smoothguard.errors import ConfigError, did_you_mean

NOISE_SPACES = ("normalized", "pixel")
_LARGEST_SIGMA = {"normalized": 20.0, "pixel": 5.0}  # beyond this no picture is left in any sense


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothGuardConfig:
    """SmoothGuard at answer level (arXiv 2510.26830, section 3).

    num_samples: N, the copies of a request that are answered.
    include_clean: whether copy 0 is the unperturbed input.
    sigma: standard deviation of the noise, in units of `noise_space`: "normalized" (the model's input tensor, as
        published) or "pixel" ([0, 1] intensities, clipped to that range).
    embedder, aggregator: registered names; an embedder may also be a sentence-transformers id or a directory.
    seed: base seed of the noise; None draws fresh entropy for every request. Serve strangers with None: public noise
        is a fixed function that an attacker can optimise against.
    max_copies_per_batch: None = all at once, fewer after an out-of-memory error.
    """

    num_samples: int = 10
    include_clean: bool = True
    sigma: float = 0.1
    noise_space: str = "normalized"
    embedder: str = "lexical"
    aggregator: str = "kmeans"
    seed: int | None = 0
    max_copies_per_batch: int | None = None

    def __post_init__(self) -> None:
        _integer("num_samples", self.num_samples, at_least=1)
        _boolean("include_clean", self.include_clean)
        if self.noise_space not in NOISE_SPACES:
            raise ConfigError(
                f"noise_space is {self.noise_space!r}; {did_you_mean(str(self.noise_space), NOISE_SPACES)}"
            )
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, int | float):
            raise ConfigError(f"sigma is {self.sigma!r}; expected a number such as 0.1")
        largest = _LARGEST_SIGMA[self.noise_space]
        if not math.isfinite(self.sigma) or not 0 <= self.sigma <= largest:
            raise ConfigError(
                f"sigma is {self.sigma!r}; expected 0 to {largest:g} in {self.noise_space} units (the paper uses 0.1 to 0.2)"
            )
        _registered("aggregators", self.aggregator)
        if not isinstance(self.embedder, str) or not _is_model_path(self.embedder):
            _registered("embedders", self.embedder, "sentence-transformers/<id>", "a directory")
        if self.seed is not None:
            _integer("seed", self.seed, at_least=0)
        if self.max_copies_per_batch is not None:
            _integer("max_copies_per_batch", self.max_copies_per_batch, at_least=1)

    @classmethod
    def paper(cls) -> SmoothGuardConfig:
        """The published setting: N = 10 with the clean copy, sigma 0.1 in normalised space, RoBERTa-base, k-means."""
        return cls(embedder="roberta-base")

    @classmethod
    def parse(cls, value: Any, base: SmoothGuardConfig | None = None) -> SmoothGuardConfig | None:
        """A config from what users write: None / False (off), True, a mapping of fields, or a config.

        A mapping may also hold `defense`, which must be "smoothguard" (or "none": off); its fields replace those of
        `base`. Raises ConfigError for an unknown field or an impossible value.
        """
        if value is None or value is False:
            return None
        if value is True:
            return base or cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"smoothguard is {value!r}; expected True, False, a dict such as {{'sigma': 0.1}} or a SmoothGuardConfig"
            )
        fields = dict(value)
        defense = fields.pop("defense", "smoothguard")
        if defense in (None, "none"):
            return None
        if defense != "smoothguard":
            raise ConfigError(f"unknown defence {defense!r}; {did_you_mean(str(defense), ('none', 'smoothguard'))}")
        known = {field.name for field in dataclasses.fields(cls)}
        for name in fields:
            if name not in known:
                raise ConfigError(f"unknown smoothguard field {name!r}; {did_you_mean(str(name), known)}")
        return dataclasses.replace(base or cls(), **fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the defence's name, ready for JSON."""
        return {"defense": "smoothguard", **dataclasses.asdict(self)}


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


def _registered(kind: plugins.Kind, name: Any, *others: str) -> None:
    known = plugins.offers(kind)
    if name not in known:
        also = "".join(f", {other}" for other in others)
        raise ConfigError(f"unknown {plugins.SINGULAR[kind]} {name!r}; {did_you_mean(str(name), known)}{also}")


def _is_model_path(embedder: str) -> bool:
    return embedder.startswith("sentence-transformers/") or (embedder != "" and Path(embedder).is_dir())


def _integer(name: str, value: Any, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {at_least}")


def _boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected true or false")
