"""Confidence bounds hold at their alpha, whatever the distribution; a bound that does not is caught by the same test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from lmms_smoothguard import certify
from lmms_smoothguard.errors import ConfigError

ALPHA, N, TRIALS = 0.05, 80, 1200
SURPRISE = 1e-6
"""A miss rate is refused where alpha lies below its own Clopper-Pearson bound at this level."""


def _two_points(low: float, high: float, share: float) -> tuple[float, object]:
    return low * share + high * (1 - share), lambda g, size: np.where(g.random(size) < share, low, high)


DISTRIBUTIONS = {
    "coin .02": _two_points(0, 1, 0.98),
    "coin .5": _two_points(0, 1, 0.5),
    "coin .97": _two_points(0, 1, 0.03),
    "rare disasters": _two_points(0.1, 0.99, 0.02),
    "rare luck": _two_points(0.4, 1, 0.97),
    "beta, features": (0.9, lambda g, size: g.beta(8.1, 0.9, size)),
    "beta, narrow": (0.99, lambda g, size: g.beta(99, 1, size)),
    "uniform": (0.5, lambda g, size: g.random(size)),
}
LOWER = {
    **certify.METHODS,
    "tightest": lambda values, alpha: certify.lower_means(values, alpha),
    "tightest of four": lambda values, alpha: certify.lower_means(values, alpha, tuple(certify.METHODS)),
}


def _held(misses: int, trials: int, alpha: float) -> bool:
    return certify.clopper_pearson_lower(misses, trials, SURPRISE) <= alpha


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("method", LOWER)
def test_coverage(method: str, distribution: str) -> None:
    mean, draw = DISTRIBUTIONS[distribution]
    values = draw(np.random.default_rng(7), (N, TRIALS))
    lower = LOWER[method](values, ALPHA)
    upper = 1 - LOWER[method](1 - values, ALPHA)
    assert _held(int((lower > mean).sum()), TRIALS, ALPHA)
    assert _held(int((upper < mean).sum()), TRIALS, ALPHA)
    assert (lower <= values.mean(0)).all()


def test_the_test_of_coverage_can_fail() -> None:
    mean, draw = DISTRIBUTIONS["rare disasters"]
    values = draw(np.random.default_rng(7), (N, TRIALS))
    normal = values.mean(0) - 1.645 * values.std(0, ddof=1) / N**0.5
    assert not _held(int((normal > mean).sum()), TRIALS, ALPHA)
    # Sorted, best values first, the gambler grows rich on luck: why the order must be the one drawn.
    mean, draw = DISTRIBUTIONS["uniform"]
    ordered = np.sort(draw(np.random.default_rng(7), (N, TRIALS)), axis=0)[::-1]
    assert not _held(int((certify.betting_lower(ordered, ALPHA) > mean).sum()), TRIALS, ALPHA)


@pytest.mark.parametrize("n", [2, 10, 57])
def test_bounds_of_coins_miss_no_oftener_than_alpha_exactly(n: int) -> None:
    """Every p, every count of heads: no simulation."""
    heads = np.arange(n + 1)
    exact = {
        "clopper_pearson": [certify.clopper_pearson_lower(int(k), n, ALPHA) for k in heads],
        "kl": [float(certify.kl_lower(np.arange(n) < k, ALPHA)) for k in heads],
        "hoeffding": [float(certify.hoeffding_lower(np.arange(n) < k, ALPHA)) for k in heads],
    }
    highest = {}
    for name, bounds in exact.items():
        misses = [
            binom.pmf(heads, n, p)[np.asarray(bounds) > p].sum()
            for p in np.r_[np.linspace(0.001, 0.999, 999), bounds] - 1e-9
        ]
        highest[name] = max(misses)
        assert highest[name] <= ALPHA + 1e-6, name
    assert highest["clopper_pearson"] > 0.9 * ALPHA  # the worst p, just below one of the bounds: exact means no slack
    upper = [certify.clopper_pearson_upper(int(k), n, ALPHA) for k in heads]
    assert upper[::-1] == pytest.approx([1 - bound for bound in exact["clopper_pearson"]])


def test_which_bound_is_tight_where() -> None:
    generator = np.random.default_rng(0)
    features, coins = generator.beta(8.1, 0.9, 1000), (generator.random(1000) < 0.9).astype(float)
    alpha = 0.001
    told = {
        name: (float(bound(features, alpha)), float(bound(coins, alpha))) for name, bound in certify.METHODS.items()
    }
    assert told["betting"][0] > told["bernstein"][0] > told["kl"][0] > told["hoeffding"][0]
    assert told["kl"][1] > told["bernstein"][1] > told["hoeffding"][1]
    assert features.mean() - told["betting"][0] < 0.4 * (features.mean() - told["kl"][0])


def test_alpha_is_split_and_the_split_is_told() -> None:
    values = np.random.default_rng(1).beta(8, 1, 200)
    bound = certify.lower_mean(values, 0.01, ("kl", "bernstein", "hoeffding"))
    assert sum(bound.split.values()) == pytest.approx(0.01) and set(bound.split) == {"kl", "bernstein", "hoeffding"}
    assert bound.each["kl"] == pytest.approx(float(certify.kl_lower(values, 0.01 / 3)))
    assert bound.value == max(bound.each.values()) == bound.each[bound.method]
    above = certify.upper_mean(values, 0.01)
    assert above.side == "upper" and above.value == min(above.each.values()) > values.mean() > bound.value
    assert above.to_dict()["split"] == {"betting": 0.005, "kl": 0.005}
    many = certify.lower_means(np.stack([values, values[::-1]], 1), 0.01, ("kl", "bernstein", "hoeffding"))
    assert many[0] == pytest.approx(bound.value)


def test_numbers_worked_out_by_hand() -> None:
    ones = np.ones(100)
    assert float(certify.kl_lower(ones, 0.05)) == pytest.approx(0.05 ** (1 / 100))  # KL(1 || p) = -ln p
    assert float(certify.hoeffding_lower(ones, 0.05)) == pytest.approx(1 - (np.log(20) / 200) ** 0.5)
    assert float(certify.bernstein_lower(ones, 0.05)) == pytest.approx(1 - 7 * np.log(40) / (3 * 99))
    assert float(certify.kl_lower(np.zeros(100), 0.05)) == float(certify.betting_lower(np.zeros(100), 0.05)) == 0
    # Two rounds of betting: both values 1, stakes from variance 1/4, then (1/4 + 1/16) / 2 of the first value alone.
    goal = np.log(1 / 0.9)
    first, second = (2 * goal / (2 * 0.25)) ** 0.5, (2 * goal / (2 * (0.25 + 0.0625) / 2)) ** 0.5

    def capital(m: float) -> float:
        return (1 + first * (1 - m)) * (1 + second * (1 - m))

    bound = float(certify.betting_lower(np.ones(2), 0.9))
    assert second < 0.9 / bound and capital(bound) == pytest.approx(1 / 0.9)


@pytest.mark.parametrize("hits, n", [(0, 5), (3, 5), (5, 5), (990, 1000), (1000, 1000)])
def test_clopper_pearson_is_scipys(hits: int, n: int) -> None:
    for alpha in (0.001, 0.05):
        exact = binomtest(hits, n).proportion_ci(1 - 2 * alpha, method="exact")
        assert certify.clopper_pearson_lower(hits, n, alpha) == pytest.approx(exact.low, abs=1e-12)
        assert certify.clopper_pearson_upper(hits, n, alpha) == pytest.approx(exact.high, abs=1e-12)


@pytest.mark.parametrize("mean, n0, beta", [(0.95, 32, 0.001), (0.8, 8, 0.05), (0.99, 100, 0.01), (0.6, 10, 1e-6)])
def test_the_served_mean_stays_above_its_bound(mean: float, n0: int, beta: float) -> None:
    """Coins are the worst case of the inequality, and exact."""
    kept = certify.kl_deviation(mean, n0, beta)
    counts = np.arange(n0 + 1)
    for true in (mean, (1 + mean) / 2):  # the expectation is `mean` or MORE
        assert binom.pmf(counts, n0, true)[counts / n0 <= kept].sum() <= beta or kept == 0
    assert mean - (np.log(1 / beta) / (2 * n0)) ** 0.5 <= kept < mean
    draws = np.random.default_rng(3).beta(9 * mean, 9 * (1 - mean), (2000, n0)).mean(1)
    assert _held(int((draws <= kept).sum()), 2000, beta) or kept == 0


def test_the_served_bound_at_32_draws() -> None:
    served = certify.served_bound(0.9, 32, 0.001)
    assert served.status == certify.CERTIFIED
    assert 0.9 - served.value == pytest.approx(0.39, abs=0.005) and 0.9 - served.hoeffding == pytest.approx(
        0.657, abs=0.005
    )
    assert certify.served_bound(0.3, 32, 0.001).status == certify.ABSTAIN
    assert certify.served_bound(0.3, 32, 0.001).value is None
    assert certify.served_bound(float("nan"), 32, 0.001).to_dict()["fcsb"] is None
    assert certify.served_bound(0.9, 10**6, 0.001).value == pytest.approx(0.9, abs=0.003)
    assert certify.served_bound(0.9, 1, 1e-9).value is None  # even n0 zeros are too likely


@pytest.mark.parametrize(
    "refused, told",
    [
        (lambda: certify.lower_mean([0.5, 1.5], 0.05), r"a value is 1\.5.*\(1 \+ z\) / 2"),
        (lambda: certify.lower_mean([0.5, float("nan")], 0.05), r"a value is nan"),
        (lambda: certify.lower_mean([0.5], 0.05), r"number of values is 1; expected .*2 at least"),
        (lambda: certify.lower_mean(0.5, 0.05), r"expected a list"),
        (lambda: certify.lower_mean([[0.5, 0.5], [0.4, 0.4]], 0.05), r"shape \(2, 2\)"),
        (lambda: certify.lower_mean([0.5, 0.6], 0), r"alpha is 0; expected a probability"),
        (lambda: certify.lower_mean([0.5, 0.6], 1.0), r"alpha is 1\.0"),
        (lambda: certify.lower_mean([0.5, 0.6], True), r"alpha is True"),
        (lambda: certify.lower_mean([0.5, 0.6], 0.05, ("klx",)), r"'klx'; did you mean 'kl'"),
        (lambda: certify.lower_mean([0.5, 0.6], 0.05, ()), r"methods are \(\)"),
        (lambda: certify.lower_mean([0.5, 0.6], 0.05, ("kl", "kl")), r"each once"),
        (lambda: certify.clopper_pearson_lower(6, 5, 0.05), r"hits is 6 of n = 5"),
        (lambda: certify.clopper_pearson_lower(-1, 5, 0.05), r"hits is -1"),
        (lambda: certify.served_bound(0.5, 0, 0.05), r"n0 is 0"),
        (lambda: certify.served_bound(0.5, 8, 2), r"beta is 2"),
        (lambda: certify.served_bound(1.5, 8, 0.1), r"fcsb is 1\.5"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(refused: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        refused()
