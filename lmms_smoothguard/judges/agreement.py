"""How far judges agree: the share of equal verdicts, and Cohen's kappa, which takes off what chance alone would give."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmms_smoothguard.evaluation.rates import Rate, rate
from lmms_smoothguard.judges import Verdict

OPINIONS = (Verdict.SAFE, Verdict.UNSAFE)


@dataclass(frozen=True)
class Agreement:
    """Two judges over the samples on which both have an opinion (safe or unsafe).

    equal: the share of equal verdicts, with Wilson's interval; kappa: Cohen (1960), NaN where both gave one and the same
    verdict throughout (there is nothing to correct for) or there is no such sample; samples: all of them, opinions or not.
    """

    first: str
    second: str
    equal: Rate
    kappa: float
    samples: int

    def to_dict(self) -> dict[str, object]:
        return {
            "judges": [self.first, self.second],
            **self.equal.figure().to_dict(),
            "kappa": self.kappa,
            "samples": self.samples,
        }


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa of two lists of verdicts; NaN where it is not defined."""
    if not first or len({*first, *second}) < 2:
        return float("nan")
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(list(map(str, first)), list(map(str, second))))


def agreement(name: str, first: Sequence[str], other: str, second: Sequence[str]) -> Agreement:
    """The agreement of two judges, verdicts in the order of the samples. Raises ValueError for lists of unequal length."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} verdicts of {name} and {len(second)} of {other}; expected one each a sample")
    pairs = [(one, two) for one, two in zip(first, second, strict=True) if one in OPINIONS and two in OPINIONS]
    kappa = cohens_kappa([one for one, _ in pairs], [two for _, two in pairs])
    return Agreement(name, other, rate(one == two for one, two in pairs), kappa, len(first))


def pairwise(verdicts: Mapping[str, Sequence[str]]) -> list[Agreement]:
    """Every pair of judges, in the order they were named."""
    return [agreement(one, verdicts[one], two, verdicts[two]) for one, two in itertools.combinations(verdicts, 2)]
