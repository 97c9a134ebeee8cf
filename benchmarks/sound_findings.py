"""What the figures on sounds say: sentences that hold only as long as the committed results say so, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from findings import hold, rate
from lmms_smoothguard.certifying.records import CertificateRecord
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.sweeps.grid import CLEAN
from lmms_smoothguard.sweeps.records import PointRecord, SweepRecord

Sweeps = Mapping[str, SweepRecord]
_STANDARD, _ADAPTIVE = "pgd 0.001", "pgd+eot8 0.001"


def sound_findings(sweeps: Sweeps, certificates: Mapping[str, CertificateRecord], cost: Mapping[str, Any]) -> str:
    """A list in Markdown. Raises ValueError where a result says something else than its sentence."""
    others = [_clusters(sweeps), _certified(certificates), _cost(cost)]
    return "\n".join([sound_headlines(sweeps), *(f"- {part}" for part in others)])


def sound_headlines(sweeps: Sweeps) -> str:
    """What the README says of them: does it defend, and where does it break."""
    return "\n".join(f"- {part}" for part in (_answer(sweeps), _adaptive(sweeps), _breaks(sweeps)))


def _answer(sweeps: Sweeps) -> str:
    swept = sweeps["audio_sigma"]
    plain, clean = _asr(_undefended(swept), _STANDARD), _accuracy(_undefended(swept))
    guarded, kept = _asr(_at(swept, 0.02), _STANDARD), _accuracy(_at(swept, 0.02))
    loud, louder = _accuracy(_at(swept, 0.16)), _accuracy(_at(swept, 0.32))
    hold(guarded.high < plain.low and kept.high >= clean.low, "noise on the waveform wins the answers back")
    hold(louder.high < loud.low and loud.high < kept.low, "louder noise costs right answers")
    return (
        f"**Does noise on the waveform defend? Here, yes.** PGD-40 at 0.001 has an ASR of {rate(plain)} undefended and {rate(guarded)} behind "
        f"SmoothGuard (sigma 0.02, N = 10); clean accuracy is {rate(clean)} and {rate(kept)}. Louder noise costs right answers in the end: "
        f"{rate(loud)} at sigma 0.16, {rate(louder)} at 0.32."
    )


def _adaptive(sweeps: Sweeps) -> str:
    standard, adaptive = sweeps["audio_sigma"], sweeps["audio_sigma_eot"]
    little, through = _asr(_at(standard, 0.005), _STANDARD), _asr(_at(adaptive, 0.005), _ADAPTIVE)
    usual = _asr(_at(adaptive, 0.02), _ADAPTIVE)
    hold(little.high < through.low, "at sigma 0.005 the adaptive attack is stronger")
    return (
        f"**Against an attacker who averages over the noise, more noise is needed.** At sigma 0.005 ASR is {rate(little)} by the standard attack and "
        f"{rate(through)} by the adaptive one; at sigma 0.02 that has {rate(usual)}."
    )


def _breaks(sweeps: Sweeps) -> str:
    standard, adaptive = sweeps["audio_eps"], sweeps["audio_eps_eot"]
    told = []
    for budget in ("0.005", "0.01", "0.02", "20 dB"):
        one = _asr(_at(standard, 0.02), f"pgd {budget}")
        other = _asr(_at(adaptive, 0.02), f"pgd+eot8 {budget}")
        told.append(f"{budget}: {rate(one)} and {rate(other)}")
    return f"**Where it breaks.** ASR at sigma 0.02, by the standard and by the adaptive attack: {'; '.join(told)}."


def _clusters(sweeps: Sweeps) -> str:
    questions = [
        point.figures[_STANDARD]["asr - vote"]
        for point in sweeps["audio_votes"].points
        if point.defense is not None and point.defense["aggregator"] != "vote"
    ]
    hold(all(one.value == 0 for one in questions), "every aggregator answers yes / no questions as a vote does")
    sentences = [
        point.figures[task]["asr - vote"]
        for name, task in (("audio_captions", _STANDARD), ("audio_captions_eot", _ADAPTIVE))
        for point in sweeps[name].points
        if point.defense is not None and point.defense["aggregator"] != "vote"
    ]
    hold(
        all(one.low <= 0 <= one.high for one in sentences),
        "no clustering of sentences differs from the vote beyond its interval",
    )
    low, high = (100 * pick(one.value for one in sentences) for pick in (min, max))
    return (
        "**Clustering adds nothing** beyond counting equal answers: on yes / no questions every way to vote has the ASR of the plain vote (sigma 0.0025, "
        f"where attacks still get through); on sentences they lie {low:+.1f} to {high:+.1f} points from it, none beyond its interval."
    )


def _certified(certificates: Mapping[str, CertificateRecord]) -> str:
    little, much = (certificates[f"certified_sounds_{sigma}"] for sigma in ("0.02", "0.08"))
    reach, near = "certified_accuracy@0.179", "certified_accuracy@0.02"
    hold(
        little.figures[reach].value is None and much.figures[reach].low > 0.5,
        "only the louder noise certifies that far",
    )
    return (
        "**A certificate reaches as far as the attack, with louder noise.** r = 0.179 is a change of 0.001 in every sample: within it "
        f"{rate(much.figures[reach])} of the answers are certified at sigma 0.08. At sigma 0.02, {rate(little.figures[near])} within 0.02, and no "
        f"number of right draws among {little.settings['certificate']['n']} would reach 0.05."
    )


def _cost(cost: Mapping[str, Any]) -> str:
    told = []
    for tokens, measured in cost["tokens"].items():
        ours, naive, features = (
            measured[name]["ratio"]["value"]
            for name in ("SmoothGuard, N = 10", "naive loop", "features of nine noisy copies")
        )
        told.append(
            f"{tokens} tokens: {ours:.1f} times a plain answer, the naive loop {naive:.1f} times that; features again {100 * features:.0f} %"
        )
    return f"**Cost** (N = 10, two cores; intervals below): {'; '.join(told)} of a defended answer."


def _undefended(record: SweepRecord) -> PointRecord:
    return next(point for point in record.points if point.defense is None)


def _at(record: SweepRecord, size: float) -> PointRecord:
    return next(point for point in record.points if point.main and point.defense is not None and point.size == size)


def _asr(point: PointRecord, task: str) -> Figure:
    return point.figures[task]["asr"]


def _accuracy(point: PointRecord) -> Figure:
    return point.figures[CLEAN]["accuracy"]
