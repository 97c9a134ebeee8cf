"""What the figures on sounds say: sentences that hold only as long as the committed results say so, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from findings import hold, one_copy, rate
from lmms_smoothguard.certifying.records import CertificateRecord
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.sweeps.grid import CLEAN
from lmms_smoothguard.sweeps.records import PointRecord, SweepRecord
from lmms_smoothguard.sweeps.tables import difference

Sweeps = Mapping[str, SweepRecord]
_STANDARD, _ADAPTIVE = "pgd 0.001", "pgd+eot8 0.001"


def sound_findings(sweeps: Sweeps, certificates: Mapping[str, CertificateRecord], cost: Mapping[str, Any]) -> str:
    """A list in Markdown. Raises ValueError where a result says something else than its sentence."""
    others = [_clusters(sweeps), _certified(certificates), _cost(cost)]
    return "\n".join([sound_headlines(sweeps), *(f"- {part}" for part in others)])


def sound_headlines(sweeps: Sweeps) -> str:
    """What the README says of them: does it defend, and where does it break."""
    return "\n".join(f"- {part}" for part in (_answer(sweeps), _adaptive(sweeps), _breaks(sweeps), _alone(sweeps)))


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


def _alone(sweeps: Sweeps) -> str:
    questions, sentences = (
        [one_copy(sweeps[name], task) for name, task in ((standard, _STANDARD), (f"{standard}_eot", _ADAPTIVE))]
        for standard in ("audio_votes", "audio_captions")
    )
    hold(
        all(one.low <= 0 <= one.high for one in (*questions, *sentences)),
        "one noisy copy alone does as well as ten, as far as can be told",
    )
    told = "; ".join(
        f"{about} {difference(standard)}, n = {standard.count}, adaptive {difference(adaptive)}, n = {adaptive.count}"
        for about, (standard, adaptive) in (("questions", questions), ("sentences", sentences))
    )
    return (
        "**The noise does it; the vote was not seen to add to it.** One noisy copy alone differs from ten in ASR by no more than its interval, "
        f"where attacks still get through (sigma 0.0025), in points: {told}."
    )


def _clusters(sweeps: Sweeps) -> str:
    asked = {
        name: [
            point.figures[task]["asr - vote"]
            for point in sweeps[name].points
            if point.defense is not None and point.defense["aggregator"] != "vote" and point.defense["num_samples"] > 1
        ]
        for standard in ("audio_votes", "audio_captions")
        for name, task in ((standard, _STANDARD), (f"{standard}_eot", _ADAPTIVE))
    }
    questions = [one for name in ("audio_votes", "audio_votes_eot") for one in asked[name]]
    sentences = [one for name in ("audio_captions", "audio_captions_eot") for one in asked[name]]
    hold(all(one.value == 0 for one in questions), "every aggregator answers yes / no questions as a vote does")
    hold(
        all(one.low <= 0 <= one.high for one in sentences),
        "no clustering of sentences differs from the vote beyond its interval",
    )
    low, high = (100 * pick(one.value for one in sentences) for pick in (min, max))
    least, most = 100 * min(one.low for one in sentences), 100 * max(one.high for one in sentences)
    return (
        "**No clustering was seen to beat counting equal answers.** On yes / no questions every way to vote gives the answers of the plain vote "
        f"(sigma 0.0025); on sentences they lie {low:+.1f} to {high:+.1f} points of ASR from it, none beyond its interval, which all lie within "
        f"{least:+.1f} to {most:+.1f}: a gain smaller than that would not have been seen."
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
