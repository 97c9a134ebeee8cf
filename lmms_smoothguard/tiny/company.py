"""How generated objects occur: some often, some seldom, and each in the company of others.

So POPE's three samplings of absent objects (random, popular, adversarial) mean on generated scenes and clips what they
mean on photographs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

NEGATIVES = ("random", "popular", "adversarial")
"""POPE's samplings of absent objects."""
_CIRCLE = 5  # objects that keep company


class Company:
    """`attributes`: for each object the two things that it is, such as a colour and a shape."""

    def __init__(self, attributes: Sequence[tuple[Any, Any]]) -> None:
        self._attributes, self._count = tuple(attributes), len(attributes)

    @functools.cached_property
    def popularity(self) -> np.ndarray:
        """Probability of each object when drawn by popularity: (objects,), Zipf-like over a fixed shuffle."""
        order = np.random.default_rng(1234).permutation(self._count)
        weight = np.empty(self._count)
        weight[order] = 1.0 / (np.arange(self._count) + 4)
        return weight / weight.sum()

    @functools.cached_property
    def _companions(self) -> tuple[tuple[int, ...], ...]:
        circles = np.random.default_rng(4321).permutation(self._count).reshape(-1, _CIRCLE).tolist()
        circle_of = {obj: circle for circle in circles for obj in circle}
        return tuple(tuple(o for o in circle_of[obj] if o != obj) for obj in range(self._count))

    def sample(self, rng: np.random.Generator) -> tuple[int, ...]:
        """One to four different objects: half by company of one already there, else by popularity or uniformly."""
        wanted = rng.choice([1, 2, 3, 4], p=[0.15, 0.3, 0.3, 0.25])
        chosen: list[int] = []
        while len(chosen) < wanted:
            if chosen and rng.random() < 0.5:
                obj = int(rng.choice(self._companions[chosen[rng.integers(len(chosen))]]))
            elif rng.random() < 0.5:
                obj = int(rng.choice(self._count, p=self.popularity))
            else:
                obj = int(rng.integers(self._count))
            if obj not in chosen:
                chosen.append(obj)
        return tuple(chosen)

    @functools.cached_property
    def cooccurrence(self) -> np.ndarray:
        """How often two objects occur together, (objects, objects), counted over 20,000 samples."""
        rng = np.random.default_rng(77)
        counts = np.zeros((self._count, self._count))
        for _ in range(20_000):
            for a, b in itertools.permutations(self.sample(rng), 2):
                counts[a, b] += 1
        return counts

    def absent(self, present: Sequence[int], sampling: str, rng: np.random.Generator) -> int:
        """An object that is not there.

        `random`: uniform; `popular`: among the eight most frequent; `adversarial`: among the five that most often keep
        company with what is there; `attribute` (training only): the first attribute of one object, the second of another.
        """
        absent = [obj for obj in range(self._count) if obj not in present]
        if sampling == "random":
            pool = absent
        elif sampling == "popular":
            pool = sorted(absent, key=lambda obj: -self.popularity[obj])[:8]
        elif sampling == "adversarial":
            pool = sorted(absent, key=lambda obj: -self.cooccurrence[list(present), obj].sum())[:5]
        elif sampling == "attribute":
            first, second = ({self._attributes[o][side] for o in present} for side in (0, 1))
            is_either = {o: (self._attributes[o][0] in first, self._attributes[o][1] in second) for o in absent}
            pool = [o for o in absent if all(is_either[o])] or [o for o in absent if any(is_either[o])]
        else:
            raise ValueError(f"unknown negative sampling {sampling!r}; known: {', '.join(NEGATIVES)}, attribute")
        return int(rng.choice(pool))
