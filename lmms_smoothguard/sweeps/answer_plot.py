"""The copies' answers in embedding space: what the vote sees of a clean and of an attacked picture."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lmms_smoothguard.aggregation.embedders import Embed, EmbedderContext, load_embedder
from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.evaluation.samples import SampleRecord
from lmms_smoothguard.sweeps.canvas import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, panels, style
from lmms_smoothguard.sweeps.grid import CLEAN

_CLUSTERS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
_SHOWN, _NAMED, _LONGEST = 3, 3, 70
"""Questions in a figure, answers spelt out in a panel, and characters of each."""


class Pair(NamedTuple):
    """One question, defended alike, clean and attacked."""

    clean: SampleRecord
    attacked: SampleRecord


def chosen_pairs(samples: Sequence[SampleRecord]) -> list[Pair]:
    """The first questions whose attacked copies gave at least three different answers; where there are none, two.

    A rule, no choice. Of several defences and attacks in `samples` the first attack and its first defence that has such.
    """
    by_place = {(*sample.task.split(" | ", 1), sample.id): sample for sample in samples if sample.candidates}
    for least in (3, 2):
        for attack in dict.fromkeys(task for task, *_ in by_place if task != CLEAN):
            for defense in dict.fromkeys(point for _, point, _ in by_place):
                pairs = [
                    Pair(by_place[CLEAN, defense, name], sample)
                    for (task, point, name), sample in by_place.items()
                    if (task, point) == (attack, defense) and (CLEAN, defense, name) in by_place
                    if len({normalize_answer(text) for text in sample.candidates or ()}) >= least
                ]
                if pairs:
                    return pairs[:_SHOWN]
    return []


def answers_figure(samples: Sequence[SampleRecord], embed: Embed | None = None, name: str = "lexical") -> Any:
    """A row a question, clean beside attacked: one dot a copy's answer, coloured by cluster, a ring round the majority.

    Axes: the first two principal components of the embedded answers of both pictures together. `embed`: None = lexical.
    None where no question's copies disagree.
    """
    pairs = chosen_pairs(samples)
    if not pairs:
        return None
    embed = embed or load_embedder(EmbedderContext("lexical"))
    with style():
        figure, axes = panels(len(pairs), 2, 8.2, 2.6 * len(pairs) + 0.5)
        for row, pair in zip(axes, pairs, strict=True):
            places = _places([*(pair.clean.candidates or ()), *(pair.attacked.candidates or ())], embed)
            reach = max((math.hypot(*place) for place in places.values()), default=1.0) or 1.0
            for axis, sample, kind in zip(row, pair, ("clean", sample_kind(pair.attacked)), strict=True):
                _panel(axis, sample, places, reach)
                axis.set_title(f"{kind}: answered {'right' if sample.right else 'WRONG'}", fontsize=9)
            row[0].set_ylabel("\n".join(textwrap.wrap(pair.clean.question, 28)), fontsize=8)
        _key(figure, name)
    return figure


def sample_kind(sample: SampleRecord) -> str:
    """The attack on a sample, as its task names it."""
    return sample.task.split(" | ", 1)[0]


def _places(texts: Sequence[str], embed: Embed) -> dict[str, tuple[float, float]]:
    """(x, y) of every distinct answer, as a vote tells answers apart."""
    from sklearn.decomposition import PCA

    distinct = list(dict.fromkeys(normalize_answer(text) for text in texts))
    vectors = np.asarray(embed(distinct), dtype=float)
    flat = np.zeros((len(distinct), 2))
    parts = min(2, len(distinct) - 1, vectors.shape[1])
    if parts:
        flat[:, :parts] = PCA(parts, svd_solver="full").fit_transform(vectors)
    return {text: (float(x), float(y)) for text, (x, y) in zip(distinct, flat, strict=True)}


def _panel(axis: Any, sample: SampleRecord, places: dict[str, tuple[float, float]], reach: float) -> None:
    texts, labels = sample.candidates or (), sample.labels or ()
    order = [label for label, _ in Counter(labels).most_common()]
    won = next(label for text, label in zip(texts, labels, strict=True) if text == sample.answer)
    order.sort(key=lambda label: label != won)
    seen: Counter[str] = Counter()
    totals = Counter(normalize_answer(text) for text in texts)
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        key = normalize_answer(text)
        x, y = _beside(places[key], seen[key], totals[key], 0.07 * reach)
        seen[key] += 1
        plain = number == 0 and sample.suspicion is not None
        axis.scatter(x, y, s=46 if plain else 30, marker="D" if plain else "o",
                     color=_CLUSTERS[order.index(label) % len(_CLUSTERS)],
                     edgecolors="black" if label == won else "white", linewidths=1.3 if label == won else 0.5, zorder=3)  # fmt: skip
    for key, count in totals.most_common(_NAMED):
        x, y = places[key]
        text = next(text for text in texts if normalize_answer(text) == key)
        told = textwrap.shorten(re.sub(r"\s+", " ", text), _LONGEST, placeholder=" ...")
        # Turned inwards at the sides, so that nothing leaves its panel.
        side = "left" if x < -0.6 * reach else "right" if x > 0.6 * reach else "center"
        axis.annotate(
            "\n".join(textwrap.wrap(f"{count} x {told}", 25)), (x, y), xytext=(0, -11), textcoords="offset points",
            ha=side, va="top", fontsize=6.5, color="#333333", linespacing=1.05,
        )  # fmt: skip
    axis.set_xlim(-1.4 * reach, 1.4 * reach)
    axis.set_ylim(-1.6 * reach, 1.2 * reach)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(True)
        spine.set_color("#d9d9d9")


def _beside(place: tuple[float, float], number: int, total: int, radius: float) -> tuple[float, float]:
    """Equal answers stand in a ring round their place."""
    if total == 1:
        return place
    angle = 2 * math.pi * number / total
    return place[0] + radius * math.cos(angle), place[1] + radius * math.sin(angle)


def _key(figure: Any, name: str) -> None:
    from matplotlib.lines import Line2D

    def mark(shape: str, colour: str, ring: str) -> Any:
        return Line2D([], [], linestyle="", marker=shape, color=colour, markeredgecolor=ring, markersize=6)

    handles = [mark("D", GREY, "white"), mark("o", GREY, "white"), mark("o", BLUE, "black")]
    names = ["the unperturbed copy", "a noisy copy", "the group whose answer is returned"]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8,
                  title=f"first two principal components of the answers ({name})", title_fontsize=8)  # fmt: skip
