"""Certificates against functions whose Gaussian smoothing is known: tight on half-spaces, never above the truth elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import norm

from lmms_smoothguard import certify
from lmms_smoothguard.errors import ConfigError

SIGMA = 0.25
DIM = 12


def _ball(generator: np.random.Generator, count: int, radius: float) -> np.ndarray:
    """Points on the sphere and inside the ball."""
    directions = generator.normal(size=(count, DIM))
    lengths = radius * np.where(generator.random(count) < 0.5, 1, generator.random(count) ** (1 / DIM))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True) * lengths[:, None]


# -- half-spaces: the bound is attained --------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [0.02, 0.1, 0.4, 0.9])
@pytest.mark.parametrize("sigma", [0.15, 0.25, 1.0])
def test_a_half_space_attains_the_bound(sigma: float, distance: float) -> None:
    """f(x) = sign(w.x + b) u with ||w|| = 1: E <u, f(x + e)> = 2 Phi(distance / sigma) - 1, and the worst d is -r w."""
    score = 2 * norm.cdf(distance / sigma) - 1
    for radius in np.linspace(0, 0.99 * distance, 7):
        truth = 2 * norm.cdf((distance - radius) / sigma) - 1
        assert certify.fcsb(score, radius, sigma) == pytest.approx(truth, abs=1e-7)
    assert certify.radius(score, 0, sigma) == pytest.approx(distance, rel=1e-6)
    assert np.isnan(certify.fcsb(score, 1.01 * distance, sigma))


def test_the_published_form() -> None:
    for score in (-0.5, 0.0, 0.3, 0.9, 0.9999):
        for radius in (0.0, 0.05, 0.3):
            long = 2 * norm.cdf(norm.ppf((1 + score) / 2) - radius / SIGMA) - 1
            assert certify.fcsb(score, radius, SIGMA) == pytest.approx(
                long if long >= 0 else np.nan, nan_ok=True, abs=1e-12
            )
    assert certify.radius(0.9, 0.4, SIGMA) == pytest.approx(SIGMA * (norm.ppf(0.95) - norm.ppf(0.7)))


# -- many tokens, each a half-space or a wave --------------------------------------------------------------------------


class _Signs:
    """T tokens f_t(x) = sign(w_t.x + b_t) u_t; their mean inner product, smoothed: mean of 2 Phi((w_t.x + b_t) / (s |w_t|)) - 1."""

    def __init__(self, seed: int, tokens: int = 9) -> None:
        generator = np.random.default_rng(seed)
        self.w = generator.normal(size=(tokens, DIM))
        self.w /= np.linalg.norm(self.w, axis=1, keepdims=True)
        self.b = generator.uniform(0.1, 0.8, tokens)

    def smoothed(self, x: np.ndarray) -> np.ndarray:
        return (2 * norm.cdf((x @ self.w.T + self.b) / SIGMA) - 1).mean(-1)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return 2 * norm.pdf((x @ self.w.T + self.b) / SIGMA) @ self.w / SIGMA / len(self.b)


class _Waves:
    """T tokens f_t(x) = (cos(w_t.x), sin(w_t.x)): smoothed exp(-s^2 |w_t|^2 / 2) f_t(x)."""

    def __init__(self, seed: int, tokens: int = 5) -> None:
        self.w = np.random.default_rng(seed).normal(size=(tokens, DIM)) * 0.4 / SIGMA / DIM**0.5
        self.shrink = np.exp(-(SIGMA**2) * (self.w**2).sum(1) / 2)

    def smoothed(self, x: np.ndarray) -> np.ndarray:
        return (self.shrink * np.cos(x @ self.w.T)).mean(-1)  # u_t = f_t(0)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return -(self.shrink * np.sin(x @ self.w.T)) @ self.w / len(self.w)


class _Ramp:
    """f(x) = (p, sqrt(1 - p^2)), p = 2 Phi(w.x + b) - 1, u = (1, 0): smoothed p = 2 Phi((w.x + b) / sqrt(1 + s^2 |w|^2)) - 1."""

    def __init__(self, seed: int) -> None:
        self.w, self.b = np.random.default_rng(seed).normal(size=DIM) * 2, 2.0
        self.scale = (1 + SIGMA**2 * (self.w**2).sum()) ** 0.5

    def smoothed(self, x: np.ndarray) -> np.ndarray:
        return 2 * norm.cdf((x @ self.w + self.b) / self.scale) - 1

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return 2 * norm.pdf((x @ self.w + self.b) / self.scale)[..., None] * self.w / self.scale


def _descend(function: _Signs | _Waves | _Ramp, starts: np.ndarray, radius: float) -> np.ndarray:
    """Projected gradient descent in the ball: the worst it finds from every start."""
    points = starts.copy()
    for _ in range(60):
        slope = function.gradient(points)
        points = points - 0.1 * radius * slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-300)
        points *= np.minimum(1, radius / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-300))
    return points


@pytest.mark.parametrize("make", [_Signs, _Waves, _Ramp])
@pytest.mark.parametrize("seed", range(4))
def test_no_perturbation_falls_below_the_bound(make: Callable[[int], _Signs | _Waves | _Ramp], seed: int) -> None:
    function, generator = make(seed), np.random.default_rng(100 + seed)
    score = float(function.smoothed(np.zeros(DIM)))
    for radius in np.linspace(0.02, 0.98, 5) * certify.radius(score, 0, SIGMA):
        bound = certify.fcsb(score, radius, SIGMA)
        points = _ball(generator, 2000, radius)
        worst = _descend(function, points[:200], radius)
        found = np.r_[function.smoothed(points), function.smoothed(worst)]
        assert found.min() >= bound - 1e-9
        assert function.smoothed(worst).min() < function.smoothed(points).min()  # the search does search
        if make is _Waves:  # the cosine itself, of the tokens one behind the other
            lengths = ((function.shrink**2).mean()) ** 0.5
            assert (found / lengths).min() >= bound


def test_a_bound_that_promises_more_is_caught() -> None:
    function = _Signs(0, tokens=1)
    score = float(function.smoothed(np.zeros(DIM)))
    radius = 0.5 * certify.radius(score, 0, SIGMA)
    worst = _descend(function, _ball(np.random.default_rng(0), 50, radius), radius)
    assert function.smoothed(worst).min() < certify.fcsb(score, 0.99 * radius, SIGMA)


def test_tokens_of_lengths_of_their_own() -> None:
    """Served tokens are brought to one length each: their mean cosine may fall below FCSB, never below 2 FCSB - 1."""
    angles = np.deg2rad([0.0, 0.0, 0.0, 180.0])
    lengths = np.array([1.0, 1.0, 1.0, 1e-6])
    smoothed = lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)  # references are (1, 0)
    inner = smoothed[:, 0].mean()
    cosines = (smoothed[:, 0] / np.linalg.norm(smoothed, axis=1)).mean()
    assert cosines < inner - 0.2
    certificate = certify.FeatureCertificate(
        score=inner, lower=inner, bound=certify.lower_mean([0.5, 0.5], 0.5), sigma=SIGMA, n=2, alpha=0.5, tokens=4
    )
    assert certificate.token_mean(0) == pytest.approx(2 * inner - 1) and cosines >= certificate.token_mean(0) - 1e-9


# -- from samples ------------------------------------------------------------------------------------------------------


def _sign_draws(function: _Signs, generator: np.random.Generator, x: np.ndarray, n: int) -> np.ndarray:
    return np.sign((x + SIGMA * generator.normal(size=(n, DIM))) @ function.w.T + function.b)


def test_sampled_certificates_miss_no_oftener_than_alpha() -> None:
    function, generator, alpha, trials = _Signs(1, tokens=3), np.random.default_rng(5), 0.1, 600
    truth = float(function.smoothed(np.zeros(DIM)))
    each = 2 * norm.cdf(function.b / SIGMA) - 1
    missed, missed_tokens = 0, 0
    for _ in range(trials):
        inner = _sign_draws(function, generator, np.zeros(DIM), 40)
        missed += certify.certify_feature(inner, sigma=SIGMA, alpha=alpha).lower > truth
        missed_tokens += (np.array(certify.certify_tokens(inner, sigma=SIGMA, alpha=alpha).lowers) > each).any()
    assert certify.clopper_pearson_lower(missed, trials, 1e-6) <= alpha
    assert certify.clopper_pearson_lower(int(missed_tokens), trials, 1e-6) <= alpha


def test_a_sampled_certificate_holds_under_attack_and_comes_near_the_truth() -> None:
    function = _Signs(2)
    inner = _sign_draws(function, np.random.default_rng(0), np.zeros(DIM), 20000)
    certificate = certify.certify_feature(inner, sigma=SIGMA, alpha=0.001)
    assert 0 < function.smoothed(np.zeros(DIM)) - certificate.lower < 0.02
    radius = 0.5 * certificate.radius(0)
    worst = _descend(function, _ball(np.random.default_rng(1), 200, radius), radius)
    assert function.smoothed(worst).min() >= certificate.at(radius)
    assert certificate.served(radius, 10**5, 1e-6).value < certificate.at(radius)
    assert certificate.tokens == 9 and certificate.to_dict()["bound"]["split"] == {"betting": 0.0005, "kl": 0.0005}
    tokens = certify.certify_tokens(inner, sigma=SIGMA, alpha=0.009)
    assert tokens.token_alpha == pytest.approx(0.001) and len(tokens.lowers) == 9
    assert (np.array(tokens.lowers) <= 2 * norm.cdf(function.b / SIGMA) - 1).all()
    assert tokens.worst(0.0) == pytest.approx(min(tokens.lowers)) and tokens.worst(5.0) is None
    assert tokens.radius(0.0) <= min(function.b)


# -- inverse and monotone ----------------------------------------------------------------------------------------------


def test_r_of_t_is_the_inverse() -> None:
    for score in (0.05, 0.5, 0.9, 0.999):
        for sigma in (0.1, 0.5):
            for radius in np.linspace(0.01, 0.99, 9) * certify.radius(score, 0, sigma):
                assert certify.radius(score, certify.fcsb(score, radius, sigma), sigma) == pytest.approx(radius)


def test_monotone() -> None:
    radii, sigmas, scores = np.linspace(0, 0.4, 30), np.linspace(0.3, 2, 30), np.linspace(0.95, 0.9999, 30)
    assert (np.diff([certify.fcsb(0.95, r, 0.3) for r in radii]) < 0).all()
    assert (np.diff([certify.fcsb(0.95, 0.1, s) for s in sigmas]) > 0).all()
    assert (np.diff([certify.fcsb(s, 0.1, 0.3) for s in scores]) > 0).all()
    assert (np.diff([certify.radius(0.95, t, 0.3) for t in np.linspace(0, 0.9, 30)]) < 0).all()
    assert (np.diff([certify.radius(0.95, 0.5, s) for s in sigmas]) > 0).all()


def test_what_cannot_be_certified_abstains() -> None:
    assert np.isnan(certify.fcsb(-0.1, 0, SIGMA)) and np.isnan(certify.radius(0.4, 0.4, SIGMA))
    assert certify.fcsb(1, 3, SIGMA) == 1 and certify.radius(1, 0.5, SIGMA) == np.inf  # a constant feature
    noise = certify.certify_feature(np.random.default_rng(0).choice([-1.0, 1.0], 100), sigma=SIGMA)
    assert noise.status == certify.ABSTAIN and noise.at(0) is None and noise.radius(0) is None
    assert noise.served(0, 32, 0.001).status == certify.ABSTAIN and noise.token_mean(0) is None
    perfect = certify.certify_feature(np.ones(100), sigma=SIGMA, alpha=0.001)
    largest = certify.largest_feature_radius(100, 0.001, SIGMA, 0.5)
    assert perfect.radius(0.5) == pytest.approx(largest) and perfect.at(1.01 * perfect.radius(0)) is None
    assert certify.largest_feature_radius(4, 0.001, SIGMA, 0.9) is None


# -- classes -----------------------------------------------------------------------------------------------------------


def _class_draws(generator: np.random.Generator, n: int, at: float, rate: float) -> np.ndarray:
    """f(x) = (cos(rate x_1), sin(rate x_1)); smoothed, it points to the angle rate x_1."""
    angle = rate * (at + SIGMA * generator.normal(size=n))
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def test_the_radius_of_a_class_is_below_the_distance_of_the_boundary() -> None:
    """Prototypes at 0 and +-gap: the prediction changes where rate x_1 = gap / 2, for the smoothed one too."""
    generator = np.random.default_rng(0)
    tests = set()
    for gap in (0.4, 1.2, 2.0, np.pi):
        angles = np.array([gap, 0.0, -gap])
        prototypes = np.stack([np.cos(angles), np.sin(angles)], 1)[: 2 if gap == np.pi else 3]
        for rate in (0.5, 1.0, 3.0):
            found = certify.certify_class(
                _class_draws(generator, 50, 0.0, rate),
                _class_draws(generator, 4000, 0.0, rate),
                prototypes,
                sigma=SIGMA,
            )
            assert found.selected == 1
            best = max(found.radius_scores, found.radius_difference)
            assert (found.radius or best) == pytest.approx(best, abs=1e-2) and (found.radius or best) >= best - 1e-12
            if found.radius is not None:
                assert found.radius <= gap / 2 / rate and found.at(0.9 * found.radius) == certify.CERTIFIED
                assert found.at(found.radius) == certify.ABSTAIN
            tests.add((found.status, found.test))
    assert {test for _, test in tests} == {"scores", "difference"} and {status for status, _ in tests} >= {
        certify.CERTIFIED
    }


def test_the_nearest_rival_limits_the_radius_and_selection_alone_chooses() -> None:
    generator = np.random.default_rng(3)
    angles = np.array([-2.0, 0.0, 0.4])
    prototypes = np.stack([np.cos(angles), np.sin(angles)], 1)
    right, fresh = _class_draws(generator, 50, 0.0, 0.5), _class_draws(generator, 4000, 0.0, 0.5)
    found = certify.certify_class(right, fresh, prototypes, sigma=SIGMA)
    assert found.rival == 2 and 0 < found.radius < 0.4 / 2 / 0.5
    elsewhere = _class_draws(generator, 50, -2.0 / 0.5, 0.5)
    found = certify.certify_class(elsewhere, fresh, prototypes, sigma=SIGMA)
    assert found.selected == 0 and found.status == certify.ABSTAIN and found.n_selection == 50


def test_a_class_of_a_half_space_is_certified_up_to_its_boundary() -> None:
    """Opposite prototypes and a sign: both tests are exact, and n brings them to the distance of the boundary."""
    generator, distance = np.random.default_rng(0), 0.3
    prototypes = np.array([[1.0, 0.0], [-1.0, 0.0]])

    def draws(n: int) -> np.ndarray:
        return np.sign(distance + SIGMA * generator.normal(size=n))[:, None] * prototypes[0]

    found = certify.certify_class(draws(100), draws(200_000), prototypes, sigma=SIGMA, alpha=0.001)
    assert found.label == 0 and found.radius == pytest.approx(distance, abs=0.01) and found.radius < distance
    assert found.split == {"scores": 0.001 / 4, "difference": 0.001 / 2}
    misses = 0
    for _ in range(500):
        few = certify.certify_class(draws(20), draws(50), prototypes, sigma=SIGMA, alpha=0.2)
        misses += few.radius is not None and few.selected == 0 and few.radius > distance
    assert certify.clopper_pearson_lower(misses, 500, 1e-6) <= 0.2


def test_classes_that_cannot_be_told_apart_abstain() -> None:
    same = np.array([[1.0, 0.0], [1.0, 0.0]])
    draws = np.tile([1.0, 0.0], (2000, 1))
    found = certify.certify_class(draws, draws, same, sigma=SIGMA)
    assert found.status == certify.ABSTAIN and found.label is None and found.radius is None
    largest = certify.largest_class_radius(2000, 0.001, SIGMA, 2)
    apart = certify.certify_class(draws, draws, [[1.0, 0.0], [-1.0, 0.0]], sigma=SIGMA)
    assert apart.radius == pytest.approx(largest)


@pytest.mark.parametrize(
    "refused, told",
    [
        (lambda: certify.fcsb(0.5, -0.1, SIGMA), r"radius is -0\.1; expected an L2 norm"),
        (lambda: certify.fcsb(0.5, 0.1, 0), r"sigma is 0; expected a number above 0"),
        (lambda: certify.fcsb(0.5, 0.1, float("nan")), r"sigma is nan"),
        (lambda: certify.fcsb(1.1, 0.1, SIGMA), r"score is 1\.1"),
        (lambda: certify.radius(0.5, -0.5, SIGMA), r"similarity is -0\.5; expected 0 or more"),
        (lambda: certify.certify_feature([1.0], sigma=SIGMA), r"number of values is 1"),
        (lambda: certify.certify_feature([1.2, 0.5], sigma=SIGMA), r"inner product is 1\.2"),
        (lambda: certify.certify_feature([0.5, 0.5], sigma=-1), r"sigma is -1"),
        (lambda: certify.certify_feature([0.5, 0.5], sigma=SIGMA, alpha=1.5), r"alpha is 1\.5"),
        (lambda: certify.certify_tokens([0.5, 0.5], sigma=SIGMA), r"expected \(draws, tokens\)"),
        (lambda: certify.certify_class([[1, 0]], [[1, 0]] * 5, [[1, 0]], sigma=1), r"two classes at least"),
        (lambda: certify.certify_class([[1, 0]], [[1, 0]], [[1, 0], [0, 1]], sigma=1), r"estimation draws is 1"),
        (lambda: certify.certify_class([[1, 0]], [[0, 0]] * 5, [[1, 0], [0, 1]], sigma=1), r"5 zero rows of 5"),
        (lambda: certify.certify_class([[1, 0, 0]], [[1, 0]] * 5, [[1, 0], [0, 1]], sigma=1), r"as wide as the prototypes"),
        (lambda: certify.unit_rows([[1.0, np.inf]]), r"not finite"),
        (lambda: certify.unit_rows([]), r"shape \(0,\)"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(refused: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        refused()


def test_rows_of_any_size_have_a_direction() -> None:
    for size in (1e-300, 1.0, 1e300):
        assert certify.unit_rows([[3 * size, 4 * size]]) == pytest.approx(np.array([[0.6, 0.8]]))
