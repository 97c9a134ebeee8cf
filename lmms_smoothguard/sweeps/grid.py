"""What a sweep varies: noise, copies, attacks, aggregation, seeds; read from what users write."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.config import SmoothGuardConfig, parse_scalar
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.titles import budget_of
from lmms_smoothguard.sweeps.noises import config_of, titled

T = TypeVar("T")
EOT_DRAWS = 8
"""Draws a step of `+eot` without a number."""
CLEAN = "clean"
"""The task without an attack."""
_CLEAN_COPY = {"with": (True,), "without": (False,), "both": (True, False)}
_ALWAYS = "/always"


@dataclass(frozen=True)
class Condition:
    """What a model is asked: clean pictures (`attack` None) or attacked ones. `name`: "clean", "pgd 4/255",
    "pgd+eot8 4/255"."""

    name: str
    attack: AttackSettings | None

    def at(self, sigma: float) -> AttackSettings | None:
        """The attack on a defence of that noise: without noise there is nothing to average over, so no EOT."""
        if self.attack is None or sigma > 0 or not self.attack.eot:
            return self.attack
        return dataclasses.replace(self.attack, eot=0)


@dataclass(frozen=True)
class Point:
    """One way to answer. config: None = undefended; noise: its size, and in which units (see `noises`); seeds: pooled, the config's own is the first of them; majority_first:
    see `aggregate`; main: of the points with one noise the one whose samples are kept."""

    config: SmoothGuardConfig | None
    seeds: tuple[int, ...]
    noise: tuple[str, float] = ("pixel", 0.0)
    majority_first: bool = True
    main: bool = True

    @property
    def name(self) -> str:
        """Unique within a grid: `sigma 0.2 pixel, N 10, kmeans (lexical)`."""
        if self.config is None:
            return "undefended"
        c = self.config
        clean = "" if c.include_clean else " noisy"
        always = "" if self.majority_first else _ALWAYS
        over = "" if c.aggregator == "vote" else f" ({shown(c.embedder)})"
        return f"{titled(*self.noise)}, N {c.num_samples}{clean}, {c.aggregator}{always}{over}"

    @property
    def defense(self) -> dict[str, Any] | None:
        """As result files have it, without a machine's paths."""
        if self.config is None:
            return None
        return Choice("smoothguard", self.config).to_dict() | {"embedder": shown(self.config.embedder)}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination is a point, but for those that could not differ: without noise there is one undefended point, a
    vote needs no embedder, and of one answer alone, a noisy copy's, there is nothing to aggregate. An aggregator
    `kmeans/always` is asked even where more than half of the copies agree."""

    sigmas: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
    noise_spaces: tuple[str, ...] = ("pixel",)
    num_samples: tuple[int, ...] = (10,)
    clean_copy: tuple[bool, ...] = (True,)
    aggregators: tuple[str, ...] = ("kmeans",)
    embedders: tuple[str, ...] = ("lexical",)
    seeds: tuple[int, ...] = (0,)
    conditions: tuple[Condition, ...] = field(default_factory=lambda: conditions(("none", "pgd"), (4 / 255,)))

    def __post_init__(self) -> None:
        for name in (
            "sigmas",
            "noise_spaces",
            "num_samples",
            "clean_copy",
            "aggregators",
            "embedders",
            "seeds",
            "conditions",
        ):
            values = getattr(self, name)
            if not values:
                raise ConfigError(f"{name} is empty; expected at least one value")
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} has a value twice: {', '.join(map(str, values))}; expected each once")
        for seed in self.seeds:
            SmoothGuardConfig(seed=seed)
        self.points()  # an impossible value is refused here, before any model is loaded

    def noises(self) -> list[tuple[str, float]]:
        """(space, sigma) of every noise, without that of no size."""
        return [(space, sigma) for space in self.noise_spaces for sigma in self.sigmas if sigma > 0]

    def copies(self) -> int:
        """The noisy copies of a request that its points need."""
        needed = [p.config.num_samples - p.config.include_clean for p in self.points() if p.config is not None]
        return max(needed, default=0)

    def points(self) -> list[Point]:
        """All points, the undefended one first where sigma 0 was asked for."""
        made = [Point(None, self.seeds)] if 0.0 in self.sigmas else []
        for space in self.noise_spaces:
            for sigma in self.sigmas:
                if sigma != 0:
                    made += self._voted(space, sigma)
        return made

    def _voted(self, space: str, sigma: float) -> Iterator[Point]:
        base = config_of(space, sigma, self.seeds[0])
        largest = max(self.num_samples)
        for count in self.num_samples:
            for clean in self.clean_copy if count > 1 else (False,):
                for number, (aggregator, embedder) in enumerate(self._aggregations(count)):
                    config = dataclasses.replace(
                        base,
                        num_samples=count,
                        include_clean=clean,
                        aggregator=aggregator.removesuffix(_ALWAYS),
                        embedder=embedder,
                    )
                    main = count == largest and clean == (self.clean_copy[0] and count > 1) and number == 0
                    yield Point(config, self.seeds, (space, sigma), not aggregator.endswith(_ALWAYS), main)

    def reference(self, point: Point) -> Point | None:
        """The vote on all copies under the same noise, where the grid has it; None for that vote itself and undefended."""
        if point.config is None:
            return None
        largest = max(self.num_samples)
        wanted = dataclasses.replace(
            point.config,
            num_samples=largest,
            include_clean=self.clean_copy[0] and largest > 1,
            aggregator="vote",
            embedder="lexical",
        )
        return next((p for p in self.points() if p.config == wanted and p != point), None)

    def _aggregations(self, count: int) -> list[tuple[str, str]]:
        pairs = [(a, "lexical" if a == "vote" else e) for a in self.aggregators for e in self.embedders]
        return list(dict.fromkeys(pairs))[: 1 if count == 1 else None]


def conditions(
    attacks: Sequence[str], eps: Sequence[Any], settings: Mapping[str, Any] | None = None
) -> tuple[Condition, ...]:
    """The conditions of `none`, `pgd`, `pgd+eot`, `square+eot4`, ... with every budget.

    eps: budgets, numbers or texts such as 4/255, or 40dB below each sound; settings: further settings of every attack. Raises ConfigError.
    """
    made: dict[str, Condition] = {}
    for asked in attacks:
        if asked == "none":
            made[CLEAN] = Condition(CLEAN, None)
            continue
        found = re.fullmatch(r"(?P<name>[^+]+)(\+eot(?P<draws>\d*))?", asked)
        if found is None:
            raise ConfigError(f"attack is {asked!r}; expected none, an attack such as pgd, or one with +eot or +eot8")
        if found["name"] == "universal":
            raise ConfigError(
                f"attack is {asked!r}, one change for all images, which a sweep cannot craft image by image; expected an attack on "
                "each image, such as pgd"
            )
        draws = 0 if "+" not in asked else int(found["draws"] or EOT_DRAWS)
        if "+" in asked and draws < 1:
            raise ConfigError(f"attack is {asked!r}; expected at least one draw, such as {found['name']}+eot8")
        for size in eps:
            attack = AttackSettings.parse({"name": found["name"], **(settings or {}), "eps": size, "eot": draws})
            name = f"{attack.name}{f'+eot{draws}' if draws else ''} {budget(attack)}"
            made[name] = Condition(name, attack)
    return tuple(made.values())


def budget(attack: AttackSettings) -> str:
    """`4/255`, `0.0005`, `1 L2` or `40 dB`."""
    flat = attack.to_dict()
    return f"{attack.eps:g} L2" if attack.norm == "l2" and flat.get("snr") is None else budget_of(flat)


def shown(embedder: str) -> str:
    """An embedder as result files name it: of a directory the last two parts."""
    path = Path(embedder)
    return "/".join(path.resolve().parts[-2:]) if "/" in embedder and path.is_dir() else embedder


# -- what users write --------------------------------------------------------------------------------------------------


def listed(name: str, text: str, of: Callable[[str], T]) -> tuple[T, ...]:
    """Comma-separated values. Raises ConfigError, with the option's name, for one that `of` refuses with ValueError."""
    parts = [part.strip() for part in text.split(",")]
    try:
        return tuple(of(part) for part in parts)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}: {error}") from error


def number(text: str) -> float:
    """A number or a fraction; raises ValueError."""
    value = parse_scalar(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{text!r} is no number; expected numbers between commas, such as 0,0.1,0.2")
    return float(value)


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """`1..10`, `1,2,5` or both. Raises ConfigError."""
    made: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", part)
        if found is None:
            raise ConfigError(f"{name} is {text!r}: {part!r} is no whole number; expected such as 1,5,10 or 1..10")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ConfigError(f"{name} is {text!r}: {part!r} goes backwards; expected such as 1..10")
        made += range(first, last + 1)
    return tuple(made)


def clean_copy(text: str) -> tuple[bool, ...]:
    """`with`, `without` or `both`. Raises ConfigError."""
    if text not in _CLEAN_COPY:
        raise ConfigError(f"clean-copy is {text!r}; expected with, without or both")
    return _CLEAN_COPY[text]


def pairs(name: str, given: Sequence[str]) -> dict[str, str]:
    """Texts such as `steps=40`. Raises ConfigError."""
    made = {}
    for text in given:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"{name} is {text!r}; expected key=value")
        made[key.strip().replace("-", "_")] = value.strip()
    return made
