"""Aggregators: distinct answers with weights in, groups and a winner out (SmoothGuard, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_SEED, _RESTARTS = 0, 10  # fixed: unseeded k-means gave four different answers in thirty runs on the same embeddings


class Points(NamedTuple):
    """Distinct normalised answers. All but `vectors` cost nothing to make, so those are computed on first use.

    weights: (n,) copies that gave the answer; noisy: (n,) those of them that are noisy; first: (n,) their lowest copy
    index; lengths: (n,) characters; vectors: -> (n, width).
    """

    weights: np.ndarray
    noisy: np.ndarray
    first: np.ndarray
    lengths: np.ndarray
    vectors: Callable[[], np.ndarray]


class Clusters(NamedTuple):
    """`labels` (n,) of the points, and the index of the winning point."""

    labels: np.ndarray
    winner: int


def heaviest_group(points: Points, labels: np.ndarray) -> int:
    """The label with most copies; a tie goes to the one with more NOISY copies (under attack the clean copy is the
    poisoned one), then to the one with the most frequent single answer, then to the lowest copy index."""

    def rank(label: int) -> tuple[int, int, int, int]:
        inside = labels == label
        return (
            int(points.weights[inside].sum()),
            int(points.noisy[inside].sum()),
            int(points.weights[inside].max()),
            -int(points.first[inside].min()),
        )

    return max((int(label) for label in np.unique(labels)), key=rank)


def best_member(points: Points, members: np.ndarray, score: np.ndarray) -> int:
    """The member of the highest `score`; ties: more frequent, shorter, lowest copy index."""
    return max(
        (int(i) for i in members),
        key=lambda i: (
            round(float(score[i]), 9),
            int(points.weights[i]),
            -int(points.lengths[i]),
            -int(points.first[i]),
        ),
    )


def vote(points: Points) -> Clusters:
    """The most frequent answer; each distinct answer is a group of its own."""
    labels = np.arange(len(points.weights))
    most = points.weights == points.weights.max()
    noisiest = np.flatnonzero(most & (points.noisy == points.noisy[most].max()))
    return Clusters(labels, best_member(points, noisiest, np.zeros(len(labels))))


def medoid(points: Points) -> Clusters:
    """The answer most alike all copies by mean cosine; each distinct answer is a group of its own."""
    unit = _unit(points.vectors())
    return Clusters(
        np.arange(len(unit)), best_member(points, np.arange(len(unit)), unit @ unit.T @ points.weights.astype(float))
    )


def kmeans(points: Points) -> Clusters:
    """k-means, k = 2 (the paper's): the majority cluster's member nearest its centroid by cosine."""
    return _with_clusters(points, 2)


def silhouette(points: Points) -> Clusters:
    """k-means with k from 2 to n - 1 by the best weighted silhouette."""
    from sklearn.metrics import silhouette_score

    vectors = points.vectors()
    if len(np.unique(_kmeans_labels(points, 2))) == 1:
        return _with_clusters(points, 2)
    copies = np.repeat(np.arange(len(vectors)), points.weights)
    best = max(
        range(2, max(3, len(vectors))),
        key=lambda k: silhouette_score(vectors[copies], _kmeans_labels(points, k)[copies]),
    )
    return _with_clusters(points, best)


def _kmeans_labels(points: Points, k: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    vectors = points.vectors()
    distinct = len(np.unique(vectors.round(12), axis=0))
    if distinct <= 1:  # different answers of equal embedding: one cluster, and k-means would only warn
        return np.zeros(len(vectors), int)
    model = KMeans(min(k, distinct), n_init=_RESTARTS, random_state=_SEED)
    return model.fit(vectors, sample_weight=points.weights).labels_


def _with_clusters(points: Points, k: int) -> Clusters:
    labels, vectors = _kmeans_labels(points, k), points.vectors()
    members = np.flatnonzero(labels == heaviest_group(points, labels))
    centroid = np.average(vectors[members], axis=0, weights=points.weights[members])
    return Clusters(labels, best_member(points, members, _unit(vectors) @ _unit(centroid[None])[0]))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
