"""From N answers to one verdict."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmms_smoothguard import plugins
from lmms_smoothguard.aggregation.clustering import Clusters, Points, heaviest_group
from lmms_smoothguard.aggregation.embedders import Embed


@dataclass(frozen=True)
class Verdict:
    """chosen: index of the winning copy; labels: group of every copy; agreement: share of the copies in the winning group.

    suspicion: share of the noisy copies outside the clean copy's group, None without a clean copy; suspected: whether
    the clean copy lies outside the winning group.
    """

    chosen: int
    labels: tuple[int, ...]
    agreement: float
    suspicion: float | None
    suspected: bool
    warnings: tuple[str, ...] = ()


def normalize_answer(text: str) -> str:
    """What makes two answers the same: case, white space and a closing full stop do not count."""
    return re.sub(r"\s+", " ", text).strip().casefold().rstrip(".").rstrip()


def aggregate(
    answers: Sequence[str],
    embed: Callable[[], Embed],
    aggregator: str = "kmeans",
    *,
    clean_first: bool = True,
    majority_first: bool = True,
) -> Verdict:
    """The verdict over the copies' answers, copy 0 the clean one if `clean_first`.

    Before any aggregator: an answer that more than half of the copies share wins outright, so that stopping there is
    exact (`majority_first` False asks the aggregator all the same, as published); of two distinct answers the more
    frequent wins. `embed` makes the embedder and is called only when needed.
    Raises ValueError without answers, ConfigError for an unknown aggregator.
    """
    if not answers:
        raise ValueError("aggregate() got no answers; expected at least one")
    pick: Callable[[Points], Clusters] = plugins.load("aggregators", aggregator)
    keys = [normalize_answer(answer) for answer in answers]
    distinct = list(dict.fromkeys(keys))
    point_of = np.array([distinct.index(key) for key in keys])
    is_noisy = np.arange(len(keys)) >= (1 if clean_first else 0)
    points = Points(
        weights=np.bincount(point_of, minlength=len(distinct)),
        noisy=np.bincount(point_of[is_noisy], minlength=len(distinct)),
        first=np.array([keys.index(key) for key in distinct]),
        lengths=np.array([len(key) for key in distinct]),
        vectors=functools.cache(lambda: np.asarray(embed()(distinct), dtype=float)),
    )
    separate = np.arange(len(distinct))
    if (majority_first and 2 * points.weights.max() > len(answers)) or len(distinct) <= 2:
        clusters = Clusters(separate, heaviest_group(points, separate))
    else:
        with plugins.blame("aggregators", aggregator):
            clusters = pick(points)
    return _verdict(clusters, points, point_of, is_noisy, clean_first)


def _verdict(
    clusters: Clusters, points: Points, point_of: np.ndarray, is_noisy: np.ndarray, clean_first: bool
) -> Verdict:
    labels = clusters.labels[point_of]
    winning = clusters.labels[clusters.winner]
    agreement = float((labels == winning).mean())
    suspicion = None
    if clean_first:
        suspicion = float((labels[is_noisy] != labels[0]).mean()) if is_noisy.any() else 0.0
    warnings = []
    sizes = np.sort(np.bincount(labels))[::-1]
    if len(labels) > 1 and len(sizes) > 1 and sizes[0] == sizes[1]:
        warnings.append(
            f"no majority: the largest groups have {sizes[0]} copies each, so the answer rests on a tie rule"
        )
    return Verdict(
        chosen=int(points.first[clusters.winner]),
        labels=tuple(int(label) for label in labels),
        agreement=agreement,
        suspicion=suspicion,
        suspected=clean_first and bool(labels[0] != winning),
        warnings=tuple(warnings),
    )
