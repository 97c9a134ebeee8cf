"""Cohen, Rosenfeld & Kolter (2019): certificates for discrete answers, by counting answers to noisy copies.

Selection draws choose the answer, fresh ones bound its probability p_A from below (Clopper-Pearson, one-sided at alpha); where
that is above 1/2 the noisy-vote classifier x -> argmax_c P(answer to x + e is c) cannot change within sigma Phi^-1(p_A).
That classifier, with all its probability, is certified: not an answer of N = 10 copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lmms_smoothguard.certify.bounds import clopper_pearson_lower
from lmms_smoothguard.certify.checks import checked_alpha, checked_count, checked_radius, checked_sigma
from lmms_smoothguard.certify.gaussian import ABSTAIN, CERTIFIED
from lmms_smoothguard.errors import ConfigError


@dataclass(frozen=True)
class AnswerCertificate:
    """With probability 1 - alpha over the n draws: the noisy vote is `answer` for every ||d||_2 < radius.

    answer, radius: None where it abstains; selected: what the selection draws chose; votes: of the n fresh draws for it;
    p_lower: Clopper-Pearson's bound of its probability.
    """

    status: str
    answer: Hashable | None
    radius: float | None
    selected: Hashable
    votes: int
    p_lower: float
    sigma: float
    n: int
    n_selection: int
    alpha: float
    bound: str = "Clopper-Pearson"

    def at(self, radius: float) -> str:
        """`certified` where the noisy vote cannot change within `radius`, else ABSTAIN."""
        checked_radius(radius)
        return CERTIFIED if self.radius is not None and radius < self.radius else ABSTAIN

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def select_answer(selection: Iterable[Hashable]) -> Hashable:
    """The most frequent answer; of equally frequent ones the first drawn."""
    found = list(selection)
    checked_count(len(found), "the number of selection draws", 1)
    return Counter(found).most_common(1)[0][0]


def certify_answer(
    selection: Iterable[Hashable], estimation: Iterable[Hashable], *, sigma: float, alpha: float = 0.001
) -> AnswerCertificate:
    """Cohen's CERTIFY from the answers to two separate sets of noisy copies. Raises ConfigError."""
    chosen, fresh = list(selection), list(estimation)
    selected = select_answer(chosen)
    votes = sum(answer == selected for answer in fresh)
    return certify_votes(selected, votes, len(fresh), sigma=sigma, alpha=alpha, n_selection=len(chosen))


def certify_votes(
    selected: Hashable, votes: int, n: int, *, sigma: float, alpha: float = 0.001, n_selection: int = 0
) -> AnswerCertificate:
    """From counts: `votes` of n fresh draws for the answer that others selected. Raises ConfigError."""
    sigma, n = checked_sigma(sigma), checked_count(n)
    p_lower = clopper_pearson_lower(votes, n, alpha)
    found = _radius(p_lower, sigma)
    certified = found > 0
    return AnswerCertificate(
        status=CERTIFIED if certified else ABSTAIN,
        answer=selected if certified else None,
        radius=found if certified else None,
        selected=selected,
        votes=int(votes),
        p_lower=p_lower,
        sigma=sigma,
        n=n,
        n_selection=n_selection,
        alpha=float(alpha),
    )


def largest_answer_radius(n: int, alpha: float, sigma: float) -> float | None:
    """sigma Phi^-1(alpha^(1 / n)): what n draws that all agree certify; None where even they abstain. Raises ConfigError."""
    found = _radius(checked_alpha(alpha) ** (1 / checked_count(n)), checked_sigma(sigma))
    return found if found > 0 else None


def _radius(probability: float, sigma: float) -> float:
    from scipy.special import ndtri

    return float(sigma * ndtri(probability))


@dataclass(frozen=True)
class CertifiedAccuracy:
    """The share of `count` samples whose answer is right and certified at `radius`: hits / count.

    status: ABSTAIN where the radius lies at or beyond `largest`, which no sample could reach with this n and alpha; hits and
    value are None then, for a share of 0 would read like a finding.
    """

    status: str
    value: float | None
    hits: int | None
    count: int
    radius: float
    largest: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)


def certified_accuracy(
    radii: Sequence[float | None], right: Sequence[bool], radius: float, largest: float | None
) -> CertifiedAccuracy:
    """radii: of each sample's certificate, None where it abstains; right: whether what was certified is the truth; largest:
    what n and alpha can certify, see `largest_answer_radius` and its like. Raises ConfigError."""
    radius = checked_radius(radius)
    if len(radii) != len(right) or not radii:
        raise ConfigError(f"{len(radii)} certificates and {len(right)} truths; expected as many of both, one at least")
    if largest is None or radius >= largest:
        return CertifiedAccuracy(ABSTAIN, None, None, len(radii), radius, largest)
    hits = sum(found is not None and found > radius and bool(fine) for found, fine in zip(radii, right, strict=True))
    return CertifiedAccuracy(CERTIFIED, hits / len(radii), hits, len(radii), radius, largest)
