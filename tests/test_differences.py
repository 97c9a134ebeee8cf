"""Paired differences and pooled seeds: against brute force, and by how often their intervals hold the truth."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.clusters import clustered_rate, design_effect
from lmms_smoothguard.evaluation.differences import paired_difference
from lmms_smoothguard.evaluation.rates import rate, wilson
from lmms_smoothguard.evaluation.records import AttackRecord, DataRecord, ModelRecord, Record, Run, TaskRecord
from lmms_smoothguard.evaluation.samples import SampleRecord
from lmms_smoothguard.evaluation.seeds import check_poolable, difference_of_runs, pooled_over_runs, pooled_rate


def named(outcomes):
    return {str(number): bool(outcome) for number, outcome in enumerate(np.ravel(outcomes))}


def scenes_of(outcomes, size):
    return {name: int(name) // size for name in outcomes}


def test_a_difference_is_that_of_the_rates_and_its_interval_that_of_all_resamples():
    """Four pairs: all 6^6 draws of the four and the two added groups, against 20,000 of them."""
    first, second = named([1, 1, 1, 0]), named([0, 1, 0, 0])
    found = paired_difference(first, second, resamples=20_000)
    assert found.value == pytest.approx(0.75 - 0.25)
    assert (found.count, found.groups) == (4, 4)
    every = [sum(draw) / 6 for draw in itertools.product([1, 0, 1, 0, 1, -1], repeat=6)]
    low, high = np.quantile(every, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
    back = paired_difference(second, first, resamples=20_000)
    assert (back.value, back.low, back.high) == pytest.approx((-found.value, -found.high, -found.low), abs=0.01)
    assert paired_difference(first, second) == paired_difference(first, second)


def test_what_two_runs_have_in_common_cancels_out():
    """Pairs that agree say nothing of a difference: 20 of 400 differ, and 380 that are half right make it no wider."""
    same = [n % 2 for n in range(380)]
    paired = paired_difference(named([1] * 20 + same), named([0] * 20 + same))
    assert paired.low > 0.025
    apart = rate([True] * 210 + [False] * 190).interval
    assert paired.high - paired.low < 0.5 * (apart[1] - apart[0])


def test_pairs_of_one_scene_count_as_one():
    rng = np.random.default_rng(0)
    first, second = (np.repeat(rng.random(60) < share, 5) for share in (0.7, 0.4))
    groups = scenes_of(named(first), 5)
    by_scene, alone = (paired_difference(named(first), named(second), g) for g in (groups, None))
    assert by_scene.groups == 60
    assert (by_scene.high - by_scene.low) / (alone.high - alone.low) == pytest.approx(5**0.5, rel=0.1)


def test_runs_that_never_differ_are_not_known_to_be_equal():
    found = paired_difference(named([1, 0] * 10), named([1, 0] * 10), scenes_of(named([0] * 20), 2))
    assert (found.value, found.groups) == (0, 10)
    assert found.high == pytest.approx(wilson(0, 10)[1])
    assert found.low == -found.high


def test_samples_that_do_not_pair_up_are_refused():
    with pytest.raises(SmoothGuardError, match="1 samples are missing from the second run, the first: 2"):
        paired_difference(named([1, 0, 1]), named([1, 0]))
    with pytest.raises(SmoothGuardError, match="missing from the first run, the first: 2, 3"):
        paired_difference(named([1, 0]), named([1, 0, 1, 1]))
    with pytest.raises(SmoothGuardError, match="no samples"):
        paired_difference({}, {})


@pytest.mark.parametrize(
    ("groups", "size", "before", "after", "kept", "whole"),
    [(140, 3, 0.95, 0.6, 0.8, True), (140, 3, 0.05, 0.1, 0.9, False), (420, 1, 0.04, 0.05, 0.95, False)],
)
def test_coverage_of_differences(groups, size, before, after, kept, whole):
    """95 % intervals hold the truth in at least 92 % of 200 draws, whether scenes differ as a whole or by question. Where
    few differ, without the two added groups it is 75 %."""
    rng, held = np.random.default_rng(1), 0
    truth = before - (kept * before + (1 - kept) * after)
    shape = (groups, 1 if whole else size)
    for _ in range(200):
        first = rng.random(shape) < before
        second = np.where(rng.random(shape) < kept, first, rng.random(shape) < after)
        one, other = (named(np.broadcast_to(kind, (groups, size))) for kind in (first, second))
        found = paired_difference(one, other, scenes_of(one, size), resamples=400)
        held += found.low <= truth <= found.high
    assert held / 200 >= 0.92


# -- clusters and seeds ------------------------------------------------------------------------------------------------


def test_a_clustered_rate_counts_what_is_alike_once():
    """Outcomes of a scene all alike: Wilson's of scenes, but for Student's quantile and the two added scenes."""
    scenes = [True] * 60 + [False] * 140
    found = clustered_rate(np.repeat(scenes, 3).tolist(), np.repeat(np.arange(200), 3).tolist())
    assert found.design_effect == pytest.approx(3, rel=0.01)
    assert (found.low, found.high) == pytest.approx(rate(scenes).interval, abs=2e-3)
    assert (found.hits, found.count, found.groups) == (180, 600, 200)


def test_a_clustered_rate_is_never_narrower_than_independent_outcomes():
    opposed, groups = [True, False] * 50, [n // 2 for n in range(100)]
    assert design_effect(opposed, groups) == pytest.approx(0)
    found = clustered_rate(opposed, groups)
    low, high = rate(opposed).interval
    assert found.low <= low
    assert found.high >= high


def test_a_rate_of_none_in_few_scenes_is_no_certainty():
    """300 outcomes of 10 scenes without a hit say little more than 10 would."""
    found = clustered_rate([False] * 300, [n % 10 for n in range(300)])
    assert found.low == 0
    assert found.high > rate([False] * 10).interval[1]
    assert clustered_rate([True, False], [0, 0]).low is None
    assert clustered_rate([], []).value is None


@pytest.mark.parametrize("groups", [50, 140])
@pytest.mark.parametrize("share", [0.03, 0.15, 0.6])
@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
def test_coverage_of_pooled_seeds(groups, share, alike):
    """Five seeds, outcomes of a question correlated by `alike`: the truth is held in 93 % or more of 1,500 draws."""
    rng, held, names = np.random.default_rng(0), 0, list(range(groups)) * 5
    for _ in range(1500):
        common = rng.random(groups) < share
        drawn = np.where(rng.random((5, groups)) < alike**0.5, common, rng.random((5, groups)) < share)
        found = clustered_rate(drawn.ravel().tolist(), names)
        held += found.low <= share <= found.high
    assert 0.93 - 0.01 <= held / 1500 <= 0.995


def test_seeds_taken_as_independent_would_be_too_sure():
    """Why they are clustered: five answers that hardly differ, taken for 5 n samples."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        answers = np.repeat(rng.random(100) < 0.3, 5)
        low, high = rate(answers.tolist()).interval
        held += low <= 0.3 <= high
    assert held / 300 < 0.7


def test_pooling_gives_the_spread_between_seeds():
    by_seed = {0: named([1, 1, 0, 0]), 1: named([1, 0, 0, 0]), 2: named([1, 1, 1, 0])}
    found = pooled_rate(by_seed)
    assert (found.value, found.count, found.hits, found.groups) == (0.5, 12, 6, 4)
    assert (found.seeds.count, found.seeds.min, found.seeds.max, found.seeds.sd) == (3, 0.25, 0.75, 0.25)
    assert pooled_rate(by_seed, dict(zip("0123", "aabb", strict=True))).groups == 2
    with pytest.raises(SmoothGuardError, match="at least two"):
        pooled_rate({0: named([1])})
    with pytest.raises(SmoothGuardError, match="missing"):
        pooled_rate({0: named([1, 0]), 1: named([1])})


# -- runs --------------------------------------------------------------------------------------------------------------


def a_run(name, right, *, clean_right=None, seed=0, eps=4 / 255, sigma=0.1, source="POPE"):
    samples = [
        SampleRecord(
            id=str(n),
            task="t",
            run=name,
            question="?",
            answer="yes",
            group=str(n // 2),
            right=bool(r),
            clean_right=bool(c),
        )
        for n, (r, c) in enumerate(zip(right, clean_right or [True] * len(right), strict=True))
    ]
    attack = AttackRecord(settings={"name": "pgd", "eps": eps, "seed": seed}, access="gradients", adaptive=False)
    task = TaskRecord(data=DataRecord(source=source, count=len(samples)), attack=attack)
    record = Record(
        name=name, about="", command="", model=ModelRecord(name="m"), tasks={"t": task},
        defense={"defense": "smoothguard", "sigma": sigma, "seed": seed}, seeds={"attack": seed, "defense": seed},
        versions={}, environment={},
    )  # fmt: skip
    return Run(record, samples)


def test_runs_of_one_setting_are_pooled():
    runs = [a_run("a", [1, 0, 1, 1]), a_run("b", [1, 0, 0, 1], seed=1)]
    found = pooled_over_runs(runs, "t", "accuracy")
    assert (found.value, found.groups, found.seeds.max) == (5 / 8, 2, 0.75)
    assert pooled_over_runs(runs, "t", "asr").value == 3 / 8


@pytest.mark.parametrize(
    ("other", "hint"),
    [
        ({"eps": 8 / 255}, "differ in attack: settings eps"),
        ({"sigma": 0.2}, "differ in defense: sigma 0.1 and 0.2"),
        ({"source": "else"}, "differ in data: source 'POPE' and 'else'"),
        ({"seed": 0}, "have the same seeds"),
    ],
)
def test_runs_of_different_settings_are_not_pooled(other, hint):
    runs = [a_run("a", [1, 0]), a_run("b", [1, 0], **{"seed": 1} | other)]
    with pytest.raises(SmoothGuardError, match=hint):
        pooled_over_runs(runs, "t", "accuracy")


def test_fresh_entropy_twice_is_not_the_same_seed_twice():
    first, second = (a_run(name, [1, 0]).record for name in "ab")
    fresh = [dataclasses.replace(record, seeds={"attack": None}) for record in (first, second)]
    check_poolable(fresh, "t")


def test_a_difference_of_asr_needs_one_denominator():
    first, second = a_run("a", [1, 0, 0, 1]), a_run("b", [0, 0, 0, 0])
    assert difference_of_runs(first, second, "t", "asr").value == -0.5
    assert difference_of_runs(first, second, "t", "asr").groups == 2
    other = a_run("c", [0, 0, 0, 0], clean_right=[1, 0, 1, 1])
    with pytest.raises(SmoothGuardError, match="missing from the second run, the first: 1"):
        difference_of_runs(first, other, "t", "asr")
    assert difference_of_runs(first, other, "t", "accuracy").value == 0.5
    with pytest.raises(SmoothGuardError, match="no task 'u'"):
        difference_of_runs(first, second, "u", "asr")
