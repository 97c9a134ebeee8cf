"""The figures of a sweep's points: rates, differences from a plain vote, and what poisoned copies do."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from lmms_smoothguard.evaluation.clusters import clustered_rate
from lmms_smoothguard.evaluation.differences import paired_difference
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.means import mean
from lmms_smoothguard.evaluation.outcomes import groups_of_samples, outcomes
from lmms_smoothguard.evaluation.rates import rate
from lmms_smoothguard.evaluation.samples import SampleRecord
from lmms_smoothguard.evaluation.seeds import pooled_rate
from lmms_smoothguard.sweeps.collect import is_right

BySeed = Mapping[int, Sequence[SampleRecord]]
"""One task's samples at one point, for each seed of the noise."""


def rates(by_seed: BySeed) -> dict[str, Figure]:
    """accuracy; asr of an attacked task; agreement of a defended one; poisoned: the mean share of noisy copies that are
    wrong. Questions about one scene or clip are a cluster; several seeds are pooled over questions."""
    samples = [sample for listed in by_seed.values() for sample in listed]
    figures = {"accuracy": _rate({seed: outcomes(listed, "accuracy") for seed, listed in by_seed.items()}, by_seed)}
    if samples[0].clean_right is not None:
        figures["asr"] = _rate({seed: outcomes(listed, "asr") for seed, listed in by_seed.items()}, by_seed)
    if samples[0].agreement is not None:
        figures["agreement"] = _mean(by_seed, lambda sample: sample.agreement)
        figures["poisoned"] = _mean(by_seed, lambda sample: _poisoned(sample) / max(1, len(_noisy(sample))))
    return figures


def by_poisoned_copies(by_seed: BySeed) -> dict[str, Figure]:
    """`wrong[k]`: of the samples that the undefended model gets right when clean and of whose noisy copies k are wrong, the
    share whose vote is wrong: ASR, by how many copies the attack still reaches through the noise. The outcomes of one
    question, scene or clip are a cluster."""
    counted: dict[int, list[tuple[bool, Hashable]]] = {}
    for listed in by_seed.values():
        groups = groups_of_samples(listed)
        for sample in listed:
            if sample.candidates is not None and sample.clean_right is not False and sample.left_out is None:
                counted.setdefault(_poisoned(sample), []).append((not sample.right, groups[sample.id]))
    figures = {}
    for k in sorted(counted):
        wrong, places = zip(*counted[k], strict=True)
        figures[f"wrong[{k}]"] = _over_groups(wrong, places)
    return figures


def differences(by_seed: BySeed, vote: BySeed) -> dict[str, Figure]:
    """`accuracy - vote` and `asr - vote`: this point's rate minus that of the vote on all copies, paired by question."""
    names = ["accuracy", *(["asr"] if next(iter(by_seed.values()))[0].clean_right is not None else [])]
    figures = {}
    for name in names:
        first, second = (_all_seeds(side, name) for side in (by_seed, vote))
        groups: dict[str, Hashable] = {
            f"{seed}|{key}": group
            for seed, listed in by_seed.items()
            for key, group in groups_of_samples(listed).items()
        }
        if first:
            figures[f"{name} - vote"] = paired_difference(first, second, groups)
    return figures


def _rate(by_seed: Mapping[Hashable, Mapping[str, bool]], samples: BySeed) -> Figure:
    groups = groups_of_samples(next(iter(samples.values())))
    if len(by_seed) > 1 and next(iter(by_seed.values())):
        return pooled_rate(by_seed, groups)
    (told,) = list(by_seed.values())[:1]
    return _over_groups(list(told.values()), [groups[name] for name in told])


def _over_groups(told: Sequence[bool], groups: Sequence[Hashable]) -> Figure:
    """Wilson's interval where each outcome has a group of its own, else over the groups."""
    return rate(told).figure() if len(set(groups)) == len(groups) else clustered_rate(told, groups)


def _mean(by_seed: BySeed, of: Any) -> Figure:
    """Over questions: the copies, and the seeds, of one question are one observation."""
    columns = zip(*by_seed.values(), strict=True)
    return mean([sum(of(sample) for sample in column) / len(column) for column in columns]).figure()


def _noisy(sample: SampleRecord) -> Sequence[str]:
    """The noisy copies' answers; suspicion is undefined where there is no clean one."""
    candidates = sample.candidates or ()
    return candidates if sample.suspicion is None else candidates[1:]


def _poisoned(sample: SampleRecord) -> int:
    return sum(not is_right(text, sample.target or "") for text in _noisy(sample))


def _all_seeds(by_seed: BySeed, name: Any) -> dict[str, bool]:
    return {
        f"{seed}|{key}": value
        for seed, listed in by_seed.items()
        for key, value in outcomes(list(listed), name).items()
    }
