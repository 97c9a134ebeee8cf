"""Answer certificates against the procedure that Cohen et al. (2019) published, section 3.2.2."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from lmms_smoothguard import certify
from lmms_smoothguard.errors import ConfigError


def _published(k: int, n: int, alpha: float, sigma: float) -> float | None:
    """CERTIFY after selection: LowerConfBound is statsmodels' proportion_confint(k, n, 2 alpha, "beta")[0], which is the exact
    two-sided interval of binomtest at 1 - 2 alpha."""
    p = binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact").low
    return None if p < 0.5 else float(sigma * norm.ppf(p))


@pytest.mark.parametrize("sigma", [0.12, 0.25, 1.0])
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_the_published_procedure_over_a_grid(alpha: float, sigma: float) -> None:
    statuses = set()
    for n in (2, 10, 100, 1000, 100_000):
        for k in sorted({0, 1, n // 2, n // 2 + 1, int(0.6 * n), int(0.9 * n), int(0.99 * n), n - 1, n}):
            ours, theirs = certify.certify_votes("yes", k, n, sigma=sigma, alpha=alpha), _published(k, n, alpha, sigma)
            assert (ours.radius is None) == (theirs is None), (k, n)
            assert ours.radius == (None if theirs is None else pytest.approx(theirs, rel=1e-9))
            assert ours.answer == (None if theirs is None else "yes")
            statuses.add(ours.status)
    assert statuses == {certify.CERTIFIED, certify.ABSTAIN}


def test_the_figures_of_the_paper() -> None:
    """With n = 100,000 and alpha = .001 the largest radius is 3.8 sigma (section 4, "How large?")."""
    assert certify.largest_answer_radius(100_000, 0.001, 1.0) == pytest.approx(3.81, abs=0.005)
    assert certify.largest_answer_radius(100, 0.001, 0.5) == pytest.approx(0.5 * norm.ppf(0.001 ** (1 / 100)))
    assert certify.largest_answer_radius(9, 0.001, 1.0) is None  # .001^(1/9) = .46: nine draws that agree prove nothing
    assert certify.largest_answer_radius(10, 0.001, 1.0) > 0


def test_selection_chooses_and_fresh_draws_certify() -> None:
    selection = ["no"] * 6 + ["yes"] * 4
    found = certify.certify_answer(selection, ["yes"] * 990 + ["no"] * 10, sigma=0.25)
    assert found.selected == "no" and found.votes == 10 and found.answer is None and found.status == certify.ABSTAIN
    found = certify.certify_answer(selection[::-1] + ["yes"] * 5, ["yes"] * 990 + ["no"] * 10, sigma=0.25)
    assert found.answer == "yes" and found.p_lower == pytest.approx(certify.clopper_pearson_lower(990, 1000, 0.001))
    assert (found.n, found.n_selection, found.alpha, found.bound) == (1000, 15, 0.001, "Clopper-Pearson")
    assert found.at(found.radius) == certify.ABSTAIN and found.at(0.99 * found.radius) == certify.CERTIFIED
    assert found.to_dict()["radius"] == found.radius


def test_half_spaces_are_certified_up_to_their_boundary_and_no_oftener_beyond_it_than_alpha() -> None:
    generator, sigma, distance, alpha = np.random.default_rng(0), 0.5, 0.4, 0.05

    def draws(n: int) -> list[bool]:
        return (distance + sigma * generator.normal(size=n) > 0).tolist()

    found = [certify.certify_answer(draws(20), draws(200), sigma=sigma, alpha=alpha) for _ in range(1500)]
    beyond = sum(one.radius is not None and one.answer is True and one.radius > distance for one in found)
    assert beyond > 0 and certify.clopper_pearson_lower(beyond, len(found), 1e-6) <= alpha
    assert certify.certify_answer(draws(20), draws(100_000), sigma=sigma).radius == pytest.approx(distance, abs=0.01)


def test_certified_accuracy_abstains_beyond_what_n_can_prove() -> None:
    radii, right = [0.5, 0.3, None, 0.5], [True, True, True, False]
    largest = certify.largest_answer_radius(100, 0.001, 0.5)
    assert largest == pytest.approx(0.7499, abs=1e-3)
    near = certify.certified_accuracy(radii, right, 0.25, largest)
    assert (near.status, near.hits, near.value) == (certify.CERTIFIED, 2, 0.5)
    assert certify.certified_accuracy(radii, right, 0.3, largest).hits == 1  # the ball is open
    assert certify.certified_accuracy(radii, right, 0.6, largest).value == 0  # could have been, and was not
    far = certify.certified_accuracy(radii, right, 0.8, largest)
    assert (far.status, far.hits, far.value, far.count) == (certify.ABSTAIN, None, None, 4)
    assert certify.certified_accuracy(radii, right, 0.0, None).status == certify.ABSTAIN


@pytest.mark.parametrize(
    "refused, told",
    [
        (lambda: certify.certify_votes("yes", 3, 1, sigma=1), r"n is 1; expected .*2 at least"),
        (lambda: certify.certify_votes("yes", 3, 2.5, sigma=1), r"n is 2\.5"),
        (lambda: certify.certify_votes("yes", 11, 10, sigma=1), r"hits is 11 of n = 10"),
        (lambda: certify.certify_votes("yes", 5, 10, sigma=0), r"sigma is 0"),
        (lambda: certify.certify_votes("yes", 5, 10, sigma=1, alpha=0), r"alpha is 0"),
        (lambda: certify.certify_answer([], ["yes"] * 5, sigma=1), r"selection draws is 0"),
        (lambda: certify.certify_votes("yes", 10, 10, sigma=1, alpha=0.5).at(-1), r"radius is -1"),
        (lambda: certify.certified_accuracy([], [], 0.1, 1.0), r"0 certificates"),
        (lambda: certify.certified_accuracy([None], [True, True], 0.1, 1.0), r"1 certificates and 2 truths"),
    ],
)
def test_bad_values_are_refused_by_name(refused: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        refused()
