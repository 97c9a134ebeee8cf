"""The detector's AUROC: against a known case, against the definition, and by how often its interval holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from scipy.stats import norm

from lmms_smoothguard.evaluation.detection import detection, detection_auroc, roc_points

# Hanley & McNeil (1982), table 2: 58 normal and 51 abnormal CT images in five rating categories.
NORMAL, ABNORMAL = (33, 6, 6, 11, 2), (3, 2, 2, 11, 33)


def spread(counts):
    return [float(category) for category, count in enumerate(counts) for _ in range(count)]


def test_against_the_published_example():
    """AUROC .893 in the paper; DeLong's standard error computed pair by pair from the definition."""
    clean, attacked = spread(NORMAL), spread(ABNORMAL)
    wins = np.array([[1.0 if a > c else 0.5 if a == c else 0.0 for a in attacked] for c in clean])
    error = math.sqrt(wins.mean(1).var(ddof=1) / len(clean) + wins.mean(0).var(ddof=1) / len(attacked))
    found = detection(clean, attacked)
    assert found.auroc == pytest.approx(0.893, abs=5e-4)
    assert found.auroc == pytest.approx(wins.mean())
    # Undo the logit: half the interval there, over t of 108 degrees of freedom, is the standard error.
    half = (math.log(found.high / (1 - found.high)) - math.log(found.low / (1 - found.low))) / 2
    assert half / 1.98217 * found.auroc * (1 - found.auroc) == pytest.approx(error, rel=0.02)
    assert (found.clean, found.attacked, found.groups) == (58, 51, 109)


def test_everything_twice_tells_nothing_new():
    """Copies of a sample that share its group leave the interval where it was; taken as independent they narrow it."""
    clean, attacked = spread(NORMAL), spread(ABNORMAL)
    groups = list(range(58)), list(range(58, 109))
    once, twice = detection(clean, attacked), detection(clean * 2, attacked * 2, groups[0] * 2, groups[1] * 2)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))
    careless = detection(clean * 2, attacked * 2)
    assert careless.high - careless.low < 0.8 * (once.high - once.low)


def simulated(generator, groups, size, shift, levels=9):
    """Scores in `levels` + 1 steps, as suspicion has them; clean and attacked samples of a group share a deviation."""
    shared = np.repeat(generator.normal(size=groups), size) * math.sqrt(0.6)
    rest = generator.normal(size=(2, groups * size)) * math.sqrt(0.4)
    scores = np.floor(norm.cdf(shared + rest + [[0.0], [shift]]) * (levels + 1)) / levels
    return scores[0].tolist(), scores[1].tolist(), np.repeat(np.arange(groups), size).tolist()


def truth(shift, levels=9):
    """The AUROC of two samples of different groups, from the probabilities of the steps."""
    edges = norm.ppf(np.linspace(0, 1, levels + 2))
    clean, attacked = np.diff(norm.cdf(edges)), np.diff(norm.cdf(edges - shift))
    return float(sum(attacked[k] * (clean[:k].sum() + clean[k] / 2) for k in range(levels + 1)))


@pytest.mark.parametrize(("groups", "shift"), [(20, 1.0), (140, 1.0), (140, 2.6), (40, 2.6)])
def test_coverage_with_dependent_samples(groups, shift):
    """Three questions a scene, each clean and attacked: 95 % intervals hold the truth in 95 % of 400 draws (3.7 s.e. either way)."""
    generator, expected = np.random.default_rng(0), truth(shift)
    held = 0
    for _ in range(400):
        clean, attacked, scenes = simulated(generator, groups, 3, shift)
        found = detection(clean, attacked, scenes, scenes)
        held += found.low <= expected <= found.high
    assert 0.91 <= held / 400 <= 0.99


def test_without_groups_dependent_samples_are_taken_for_more_than_they_are():
    """The reason for groups: several attacked samples of one scene, their clean ones from elsewhere."""
    generator, expected = np.random.default_rng(0), truth(1.0)
    held = {"grouped": 0, "not grouped": 0}
    for _ in range(300):
        clean, _, there = simulated(generator, 40, 3, 1.0)
        _, attacked, here = simulated(generator, 40, 3, 1.0)
        elsewhere = [scene + 40 for scene in there]
        for name, found in (
            ("grouped", detection(clean, attacked, elsewhere, here)),
            ("not grouped", detection(clean, attacked)),
        ):
            held[name] += found.low <= expected <= found.high
    assert held["grouped"] / 300 >= 0.91
    assert held["not grouped"] / 300 <= 0.90


def test_perfect_separation_is_no_certainty():
    found = detection([0.0] * 20, [1.0] * 20)
    assert found.auroc == 1
    assert (found.low, found.high) == pytest.approx((0.8389, 1.0), abs=1e-4)  # Wilson, 20 of 20
    paired = detection([0.0] * 20, [1.0] * 20, range(20), range(20))
    assert paired.low == pytest.approx(0.7225, abs=1e-4)  # 10 pairs without a scene in common
    same = detection([0.0] * 20, [0.0] * 20)
    assert same.auroc == 0.5
    assert same.low < 0.4 < 0.6 < same.high


def test_what_cannot_be_computed():
    assert math.isnan(detection([], [1.0]).auroc)
    assert math.isnan(detection_auroc([], [1.0]))
    with pytest.raises(ValueError, match="expected one for each"):
        detection([0.0], [1.0], [0, 1], [2])
    with pytest.raises(ValueError, match="expected both"):
        detection([0.0], [1.0], [0])
    with pytest.raises(ValueError, match="at least one of each"):
        roc_points([], [1.0])


def test_the_curve_encloses_the_auroc():
    clean, attacked = spread(NORMAL), spread(ABNORMAL)
    points = roc_points(clean, attacked)
    assert points[0][1:] == (0, 0)
    assert points[-1][1:] == (1, 1)
    assert len(points) == 6
    area = np.trapezoid([true for _, _, true in points], [false for _, false, _ in points])
    assert area == pytest.approx(detection_auroc(clean, attacked))


def test_a_side_with_few_samples_counts_as_few():
    """DeLong's variance with each side's own factor, and the degrees of freedom of the smaller side."""
    generator = np.random.default_rng(0)
    clean, attacked = generator.normal(size=4), generator.normal(1, size=60)
    above = (attacked[None] > clean[:, None]).astype(float)
    variance = above.mean(1).var(ddof=1) / 4 + above.mean(0).var(ddof=1) / 60
    found = detection(clean.tolist(), attacked.tolist())
    value = above.mean()
    half = scipy.stats.t.ppf(0.975, 3) * variance**0.5 / (value * (1 - value))
    assert found.auroc == pytest.approx(value)
    assert scipy.special.logit(found.high) - scipy.special.logit(found.low) == pytest.approx(2 * half)
