"""Certificates of one image, given an encoder that draws its own noise.

An encoder is anything with `sigma`, `clean` and `noisy`. It need not be of torch; tensors are brought to numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from lmms_smoothguard.certify.bounds import DEFAULT_METHODS
from lmms_smoothguard.certify.checks import checked_count, checked_sigma, unit_rows
from lmms_smoothguard.certify.classes import ClassCertificate, certify_class
from lmms_smoothguard.certify.features import (
    CLEAN,
    SERVED,
    FeatureCertificate,
    TokenCertificate,
    certify_feature,
    certify_tokens,
)
from lmms_smoothguard.errors import ConfigError, did_you_mean


class Encoder(Protocol):
    """What a certificate needs of an encoder.

    sigma: of the noise it adds, in the units of `pixels`.
    """

    @property
    def sigma(self) -> float: ...

    def clean(self, pixels: Any) -> Any:
        """(T, d): the PLAIN encoder's features of the picture as it is, without noise and without a booster."""

    def noisy(self, pixels: Any, count: int, generator: Any) -> Iterable[Any]:
        """(b, T, d) parts, `count` rows in all: g of that many copies with fresh noise, independent of each other.

        generator: of all the randomness there is, such as a torch.Generator; the noise must not hang on anything else.
        """


class ImageCertificates(NamedTuple):
    """Of the same n draws: `feature` of all tokens in their mean, `tokens` of each of them. Each holds at its own alpha; both
    at once hold at the sum."""

    feature: FeatureCertificate
    tokens: TokenCertificate


def certify_image(
    encoder: Encoder,
    pixels: Any,
    *,
    n: int,
    estimation: Any,
    alpha: float = 0.001,
    selection: Any = None,
    n_selection: int = 0,
    reference: str = CLEAN,
    methods: tuple[str, ...] = DEFAULT_METHODS,
) -> ImageCertificates:
    """How far the smoothed feature of one picture can turn.

    estimation: generator of the n draws that certify; reference: "clean" compares with the plain encoder's clean feature,
    "served" with the mean direction of each token over n_selection draws of the other generator. Raises ConfigError.
    """
    sigma, n = checked_sigma(encoder.sigma), checked_count(n)
    if reference == CLEAN:
        against, n_selection = unit_rows(_matrix(encoder.clean(pixels)), "clean features"), 0
    elif reference == SERVED:
        check_generators(selection, estimation)
        n_selection = checked_count(n_selection, "n_selection", 1)
        against = unit_rows(sum(_draws(encoder, pixels, n_selection, selection)), "mean features")
    else:
        raise ConfigError(f"reference is {reference!r}; {did_you_mean(str(reference), (CLEAN, SERVED))}")
    inner = np.stack([_inner(rows, against) for rows in _draws(encoder, pixels, n, estimation)])
    told: dict[str, Any] = {
        "sigma": sigma, "alpha": alpha, "reference": reference, "n_selection": n_selection, "methods": methods
    }  # fmt: skip
    return ImageCertificates(certify_feature(inner, **told), certify_tokens(inner, **told))


def certify_image_class(
    encoder: Encoder,
    pixels: Any,
    prototypes: Any,
    *,
    n: int,
    n_selection: int,
    selection: Any,
    estimation: Any,
    alpha: float = 0.001,
    methods: tuple[str, ...] = DEFAULT_METHODS,
) -> ClassCertificate:
    """How far the nearest prototype of one picture's smoothed feature stays the nearest; of pooled features, T = 1.

    Raises ConfigError.
    """
    check_generators(selection, estimation)
    chosen = _pooled(encoder, pixels, checked_count(n_selection, "n_selection", 1), selection)
    fresh = _pooled(encoder, pixels, checked_count(n), estimation)
    return certify_class(chosen, fresh, prototypes, sigma=encoder.sigma, alpha=alpha, methods=methods)


def check_generators(selection: Any, estimation: Any) -> None:
    """Raises ConfigError for one generator, or two of one seed: draws that choose may not certify as well."""
    seeds = [
        found() if callable(found := getattr(one, "initial_seed", None)) else id(one) for one in (selection, estimation)
    ]
    if selection is None or estimation is None or seeds[0] == seeds[1]:
        raise ConfigError(
            f"the generators of selection and estimation are {selection!r} and {estimation!r}; expected two with different "
            "seeds, so that no draw both chooses and certifies"
        )


def _pooled(encoder: Encoder, pixels: Any, count: int, generator: Any) -> np.ndarray:
    rows = np.stack(list(_draws(encoder, pixels, count, generator)))
    if rows.shape[1] != 1:
        raise ConfigError(
            f"the encoder gives {rows.shape[1]} tokens; expected one pooled feature to compare with prototypes"
        )
    made: np.ndarray = rows[:, 0]
    return made


def _draws(encoder: Encoder, pixels: Any, count: int, generator: Any) -> Iterator[np.ndarray]:
    """`count` times (T, d) unit rows, one copy at a time: many tokens of many copies fill a memory."""
    made = 0
    for part in encoder.noisy(pixels, count, generator):
        block = _plain(part)
        if block.ndim != 3:
            raise ConfigError(f"noisy features have the shape {block.shape}; expected (copies, tokens, width)")
        made += len(block)
        for rows in block:
            yield unit_rows(rows, "noisy features")
    if made != count:
        raise ConfigError(f"the encoder drew {made} copies; expected the {count} that it was asked for")


def _inner(rows: np.ndarray, against: np.ndarray) -> np.ndarray:
    if rows.shape != against.shape:
        raise ConfigError(
            f"noisy features have the shape {rows.shape} and clean ones {against.shape}; expected the same tokens and width"
        )
    made: np.ndarray = np.einsum("td,td->t", rows, against)
    return made


def _matrix(features: Any) -> np.ndarray:
    made = _plain(features)
    if made.ndim != 2:
        raise ConfigError(f"clean features have the shape {made.shape}; expected (tokens, width)")
    return made


def _plain(features: Any) -> np.ndarray:
    if hasattr(features, "detach"):  # numpy has no bfloat16
        features = features.detach().float().cpu()
    return np.asarray(features)
