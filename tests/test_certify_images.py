"""One image, an encoder, its certificates: which draws are used for what, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lmms_smoothguard import certify
from lmms_smoothguard.certify.gaussian import shifted
from lmms_smoothguard.errors import ConfigError

SIGMA, DIM, TOKENS = 0.5, 16, 3


class Signs:
    """Tokens sign(w_t.x + b_t) (3, 4): not of length 1, drawn in parts of 7."""

    def __init__(self, sigma: float = SIGMA, tokens: int = TOKENS) -> None:
        self.sigma, self.drawn = sigma, []
        made = torch.Generator().manual_seed(0)
        self.w = torch.nn.functional.normalize(torch.randn(tokens, DIM, generator=made), dim=1)
        self.b = torch.linspace(0.3, 0.9, tokens)

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.sign(pixels @ self.w.T + self.b)[..., None] * torch.tensor([3.0, 4.0])

    def clean(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._features(pixels)

    def noisy(self, pixels: torch.Tensor, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        self.drawn.append((generator.initial_seed(), count))
        for start in range(0, count, 7):
            size = min(7, count - start)
            yield self._features(pixels + self.sigma * torch.randn(size, DIM, generator=generator)).to(torch.bfloat16)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_feature_of_an_image() -> None:
    encoder, pixels = Signs(), torch.zeros(DIM)
    found = certify.certify_image(encoder, pixels, n=2000, estimation=_seeded(1), alpha=0.01)
    truth = 2 * norm.cdf(encoder.b.numpy() / SIGMA) - 1
    assert found.feature.score == pytest.approx(truth.mean(), abs=0.04) and found.feature.lower < truth.mean()
    assert (found.feature.n, found.feature.tokens, found.feature.sigma, found.feature.reference) == (
        2000,
        3,
        SIGMA,
        "clean",
    )
    assert found.tokens.scores == pytest.approx(truth, abs=0.06) and (np.array(found.tokens.lowers) < truth).all()
    assert encoder.drawn == [(1, 2000)]
    again = certify.certify_image(encoder, pixels, n=2000, estimation=_seeded(1), alpha=0.01)
    assert again == found
    assert certify.certify_image(encoder, pixels, n=2000, estimation=_seeded(2), alpha=0.01) != found


def test_served_against_served() -> None:
    """w is the direction of the selection draws' mean; here that is the clean one, or its opposite at a false token."""
    encoder = Signs()
    with pytest.raises(ConfigError, match="different seeds"):
        certify.certify_image(
            encoder, torch.zeros(DIM), n=10, estimation=_seeded(1), reference="served", selection=_seeded(1)
        )
    found = certify.certify_image(
        encoder,
        torch.zeros(DIM),
        n=500,
        estimation=_seeded(1),
        selection=_seeded(2),
        n_selection=90,
        reference="served",
    )
    assert encoder.drawn == [(2, 90), (1, 500)]
    clean = certify.certify_image(encoder, torch.zeros(DIM), n=500, estimation=_seeded(1))
    assert found.feature.reference == "served" and found.feature.n_selection == 90 and clean.feature.n_selection == 0
    assert found.feature.score == pytest.approx(clean.feature.score)


def test_an_attack_on_a_sampled_certificate() -> None:
    """At the worst d the true similarity lies above the certificate made of draws at the centre."""
    encoder = Signs(tokens=1)
    certificate = certify.certify_image(encoder, torch.zeros(DIM), n=20000, estimation=_seeded(0)).feature
    radius = 0.8 * certificate.radius(0.0)
    attacked = torch.cat(list(encoder.noisy(-radius * encoder.w[0], 20000, _seeded(9)))).float()
    inner = (attacked[:, 0] @ torch.tensor([0.6, 0.8])) / 5
    truth = 2 * norm.cdf((0.3 - radius) / SIGMA) - 1
    assert float(inner.mean()) == pytest.approx(truth, abs=0.03)
    assert certificate.at(radius) <= truth and truth - certificate.at(radius) < 0.06
    assert shifted(certificate.lower, 2 * certificate.radius(0.0), SIGMA) < 0


def test_the_class_of_an_image() -> None:
    encoder = Signs(tokens=1)
    prototypes = [[-3.0, -4.0], [3.0, 4.0], [4.0, -3.0]]
    found = certify.certify_image_class(
        encoder, torch.zeros(DIM), prototypes, n=3000, n_selection=50, selection=_seeded(1), estimation=_seeded(2)
    )
    assert found.label == 1 and 0.15 < found.radius < 0.3  # the boundary of the smoothed classifier
    assert encoder.drawn == [(1, 50), (2, 3000)] and found.n_selection == 50
    with pytest.raises(ConfigError, match="3 tokens; expected one pooled feature"):
        certify.certify_image_class(
            Signs(), torch.zeros(DIM), prototypes, n=5, n_selection=5, selection=_seeded(1), estimation=_seeded(2)
        )
    one = _seeded(3)
    with pytest.raises(ConfigError, match="no draw both chooses and certifies"):
        certify.certify_image_class(
            encoder, torch.zeros(DIM), prototypes, n=5, n_selection=5, selection=one, estimation=one
        )


@pytest.mark.parametrize(
    "fault, told",
    [
        ({"sigma": 0.0}, r"sigma is 0\.0"),
        ({"clean": lambda pixels: torch.zeros(TOKENS, 2)}, r"clean features have 3 zero rows of 3"),
        (
            {"clean": lambda pixels: torch.full((TOKENS, 2), torch.nan)},
            r"clean features have values that are not finite",
        ),
        ({"clean": lambda pixels: torch.ones(2)}, r"clean features have the shape \(2,\)"),
        ({"clean": lambda pixels: torch.ones(5, 2)}, r"the same tokens and width"),
        ({"noisy": lambda *asked: iter([torch.ones(9, TOKENS, 2)])}, r"drew 9 copies; expected the 10"),
        ({"noisy": lambda *asked: iter([torch.ones(10, 2)])}, r"expected \(copies, tokens, width\)"),
        ({"noisy": lambda *asked: iter([torch.full((10, TOKENS, 2), torch.inf)])}, r"noisy features .* not finite"),
    ],
)
def test_an_encoder_that_cannot_be_certified_is_refused(fault: dict[str, object], told: str) -> None:
    encoder = Signs()
    for name, value in fault.items():
        setattr(encoder, name, value)
    with pytest.raises(ConfigError, match=told):
        certify.certify_image(encoder, torch.zeros(DIM), n=10, estimation=_seeded(1))


def test_other_bad_requests() -> None:
    for wrong, told in (
        ({"n": 1}, "n is 1"),
        ({"n": 5, "alpha": 0}, "alpha is 0"),
        ({"n": 5, "reference": "cleam"}, "clean"),
    ):
        with pytest.raises(ConfigError, match=told):
            certify.certify_image(Signs(), torch.zeros(DIM), estimation=_seeded(1), **wrong)


def test_certificates_need_no_torch() -> None:
    told = "import sys, lmms_smoothguard.certify as c; c.fcsb(.9, .1, .2); print(sorted({'torch', 'scipy.stats'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout == "[]\n"
