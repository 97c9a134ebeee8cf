"""The README's findings about feature smoothing: sentences that hold only as long as the committed results say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from findings import hold, rate
from lmms_smoothguard.certifying.records import CertificateRecord
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.records import Record, Run
from lmms_smoothguard.evaluation.summaries import figures_of

CHOSEN_ON = 150
"""Sigma and the booster's training were chosen on so many of the questions, the first ones."""
_ADAPTIVE = {"fs": "smoothing alone", "fs_pm": "the booster", "fs_smoothguard": "SmoothGuard"}
Runs = Mapping[str, Record]
Certified = Mapping[str, CertificateRecord]


def smoothed_findings(measured: Mapping[str, Run], certified: Certified) -> str:
    """A list in Markdown, of every finding whose results are there. Raises ValueError where a result says something else than its
    sentence."""
    runs = {name: run.record for name, run in measured.items()}
    told: list[tuple[tuple[str, ...], Callable[[], str]]] = [
        (("fs_plain", "fs", "fs_pm"), lambda: purified(runs)),
        (("fs_plain", "fs", "fs_pm"), lambda: unseen(measured)),
        (tuple(f"{name}_eot" for name in _ADAPTIVE), lambda: adaptive(runs)),
        (tuple(f"{name}_eot_{budget}" for name in _ADAPTIVE for budget in ("eps8", "l2")), lambda: _wider(runs)),
        (("fs_plain", "fs", "fs_pm"), lambda: faint(runs)),
        (("fs_p", "fs_pm", "certified_fs_p", "certified_fs_pm"), lambda: _mapper(runs, certified)),
        (("certified_fs", "certified_fs_pm"), lambda: _certified(certified)),
    ]
    there = {*runs, *certified}
    return "\n".join(f"- {finding()}" for needed, finding in told if there.issuperset(needed))


def purified(runs: Runs) -> str:
    """What the booster does against standard attacks."""
    plain, bare, boosted = (_asr(runs[name], "shapes_pope_pgd") for name in ("fs_plain", "fs", "fs_pm"))
    wide, wide_boosted = (_asr(runs[name], "shapes_pope_pgd_eps8") for name in ("fs", "fs_pm"))
    told, told_boosted = (_asr(runs[name], "shapes_caption_pgd") for name in ("fs", "fs_pm"))
    before, after = (runs[name].tasks["shapes_pope"].figures["accuracy"] for name in ("fs_plain", "fs_pm"))
    hold(plain.value >= 0.9 and boosted.value <= 0.02, "the booster brings a strong attack down to 2 %")
    hold(before.value - after.value <= 0.02, "it costs at most two points of clean accuracy")
    hold(wide_boosted.high < wide.low and told_boosted.high < told.low, "the booster beats smoothing alone")
    return (
        f"**The purifier does most of it.** PGD at 4/255: {rate(plain)} undefended, {rate(bare)} smoothed, {rate(boosted)} with the booster; at "
        f"8/255 {rate(wide)} smoothed and {rate(wide_boosted)} with it, on captions {rate(told)} and {rate(told_boosted)}. Clean accuracy goes "
        f"from {rate(before)} to {rate(after)}."
    )


def unseen(measured: Mapping[str, Run]) -> str:
    """What is left of it on questions that nothing was chosen on."""

    def asr(name: str, task: str) -> Figure:
        rest = [s for s in measured[name].of(task) if int(s.id) >= CHOSEN_ON]
        return figures_of(rest)["asr"]

    plain, bare, boosted = (asr(name, "shapes_pope_pgd") for name in ("fs_plain", "fs", "fs_pm"))
    wide, wide_boosted = (asr(name, "shapes_pope_pgd_eps8") for name in ("fs", "fs_pm"))
    hold(plain.value >= 0.9 and boosted.value <= 0.02, "the booster does as well on questions it was not chosen on")
    return (
        f"**It is no fruit of choosing.** Sigma and the booster's training were chosen on the first {CHOSEN_ON} of these questions, under PGD. "
        f"On the others ASR at 4/255 is {rate(plain)} undefended, {rate(bare)} smoothed and {rate(boosted)} with the booster; at 8/255 "
        f"{rate(wide)} smoothed and {rate(wide_boosted)} with it."
    )


def adaptive(runs: Runs) -> str:
    """What is left against an attacker who crafts through the defence."""
    found = {name: _asr(runs[f"{name}_eot"], "shapes_pope_eot") for name in _ADAPTIVE}
    hold(found["fs_pm"].value < found["fs"].value, "the booster helps against an adaptive attacker too")
    listed = ", ".join(f"{about} {rate(found[name])}" for name, about in _ADAPTIVE.items())
    return f"**Against an attacker who knows the defence** and crafts through it (EOT 8, 100 steps, 4/255), ASR is another: {listed}."


def _wider(runs: Runs) -> str:
    def told(budget: str) -> str:
        found = {name: _asr(runs[f"{name}_eot_{budget}"], "shapes_pope_eot") for name in _ADAPTIVE}
        return ", ".join(f"{about} {rate(found[name])}" for name, about in _ADAPTIVE.items())

    return (
        f"**With more room that attacker gets further** (40 steps): at 8/255 {told('eps8')}; in L2 1.74 {told('l2')}."
    )


def faint(runs: Runs) -> str:
    """What it costs on the hard slice."""
    plain, bare, boosted = (runs[n].tasks["shapes_pope_faint"].figures["accuracy"] for n in ("fs_plain", "fs", "fs_pm"))
    hold(boosted.high < plain.low, "faint objects are lost")
    return (
        f"**Faint objects pay for it.** Of questions about low-contrast objects {rate(plain)} are answered right undefended, {rate(bare)} smoothed, "
        f"{rate(boosted)} with the booster. The ordinary questions show none of that."
    )


def _mapper(runs: Runs, certified: Certified) -> str:
    without, having = (_asr(runs[name], "shapes_pope_pgd") for name in ("fs_p", "fs_pm"))
    s_without, s_having = (certified[name].figures["S"] for name in ("certified_fs_p", "certified_fs_pm"))
    hold(without.low <= having.value <= without.high, "the mapper changes no answer beyond chance")
    return (
        f"**The mapper adds little here.** ASR is {rate(without)} without and {rate(having)} with it; S rises from {s_without.value:.4f} to "
        f"{s_having.value:.4f} ({s_having.low:.4f}-{s_having.high:.4f})."
    )


def _certified(certified: Certified) -> str:
    bare, boosted = (certified[name].figures["S"] for name in ("certified_fs", "certified_fs_pm"))
    bounds = [certified[name].figures["inner@0.25"] for name in ("certified_fs", "certified_fs_pm")]
    hold(boosted.low > bare.high and bounds[1].low > bounds[0].high, "the booster raises the certificate")
    return (
        f"**The booster is what makes the certificate say something:** S {bare.value:.3f} ({bare.low:.3f}-{bare.high:.3f}) without and "
        f"{boosted.value:.3f} ({boosted.low:.3f}-{boosted.high:.3f}) with it; the cosine certified at an L2 radius of .25 goes from "
        f"{bounds[0].value:.2f} to {bounds[1].value:.2f}. Attacks of 4/255 lie at up to 1.74: about those it says nothing."
    )


def _asr(record: Record, task: str) -> Figure:
    return record.tasks[task].figures["asr"]
