"""The README's findings: sentences that hold only as long as the committed results say so, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping

from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.rates import Rate
from lmms_smoothguard.evaluation.records import Record, TaskRecord
from lmms_smoothguard.sweeps.records import PointRecord, SweepRecord
from lmms_smoothguard.sweeps.tables import difference, poisoned_split
from lmms_smoothguard.tiny.scenes import SIZE

Sweeps = Mapping[str, SweepRecord]
Runs = Mapping[str, Record]


def findings(sweeps: Sweeps, runs: Runs) -> str:
    """A list in Markdown. Raises ValueError where a result says something else than its sentence."""
    parts = [
        _budgets(sweeps),
        _gathered(runs),
        _universal(runs),
        _poisoned(sweeps),
        _questions(sweeps),
        _sentences(sweeps),
        _clean(sweeps),
    ]
    return "\n".join(f"- {part}" for part in parts)


def _budgets(sweeps: Sweeps) -> str:
    standard, adaptive = sweeps["sweep_eps"], sweeps["sweep_eps_eot"]
    eight, sixteen = (_asr(_guarded(standard), f"pgd {eps}/255") for eps in (8, 16))
    through, wide = (_asr(_guarded(adaptive), f"pgd+eot8 {eps}/255") for eps in (8, 16))
    hold(through.low > eight.high, "at 8/255 the adaptive attack is stronger")
    return (
        f"**Twice the budget breaks it, and an attacker who averages over the noise sooner.** ASR at 8/255: {rate(eight)} by the standard "
        f"attack, {rate(through)} by the adaptive one; at 16/255 {rate(sixteen)} and {rate(wide)}."
    )


def _gathered(runs: Runs) -> str:
    guarded, through = (_run_asr(runs[name]) for name in ("smoothguard_l2", "smoothguard_l2_eot"))
    patch, patch_through = (_run_asr(runs[name]) for name in ("smoothguard_patch", "smoothguard_patch_eot"))
    spread, spread_through = (_run_asr(runs[name]) for name in ("smoothguard", "smoothguard_eot40"))
    hold(spread.high < guarded.low and spread_through.high < through.low, "an L2 ball is harder than the L-inf ball")
    ball, cube, area = (
        _attacked(runs[f"smoothguard{name}"]).attack.settings[setting]
        for name, setting in (("_l2", "eps"), ("", "eps"), ("_patch", "size"))
    )
    everywhere = cube * (3 * SIZE * SIZE) ** 0.5
    hold(ball < everywhere, "the L2 budget is the smaller one")
    return (
        f"**Changes that gather in one place survive the noise.** An L2 budget of {ball:g} is less than {255 * cube:g}/255 everywhere amounts "
        f"to ({everywhere:.2f}), yet ASR is {rate(guarded)} against {rate(spread)}, and {rate(through)} against {rate(spread_through)} "
        f"adaptive. A patch of {100 * area:g} % of the picture: {rate(patch)}, adaptive {rate(patch_through)}."
    )


def _universal(runs: Runs) -> str:
    plain, guarded, through = (
        runs[name] for name in ("plain_universal", "smoothguard_universal", "smoothguard_universal_eot")
    )
    free, free_through = runs["smoothguard_universal_free"], runs["smoothguard_universal_free_eot"]
    seen = [_run_asr(one) for one in (plain, guarded, through, free, free_through)]
    hold(seen[1].high < seen[2].low and seen[3].high < seen[4].low, "adaptive universal pictures get through")
    return (
        f"**One picture for all requests** (32/255) makes the undefended model comply with {rate(seen[0])} of the forbidden requests it never "
        f"saw, and the defended one with {rate(seen[1])}; taught through the noise, with {rate(seen[2])}. In any colour: {rate(seen[3])}, "
        f"taught through the noise {rate(seen[4])}. The embedded model's forbidden requests are harmless ones that it was trained to refuse."
    )


def _poisoned(sweeps: Sweeps) -> str:
    told = [poisoned_split(sweeps[name]) for name in ("sweep_eps", "sweep_eps_eot")]
    fewer, more = (tuple(sum(one[side][n] for one in told) for n in (0, 1)) for side in (0, 1))
    hold(fewer[0] == 0 and more[0] == more[1], "on yes / no questions the majority decides")
    return (
        "**A poisoned majority stays poisoned.** On yes / no questions, whatever the attack: with fewer than half of the noisy copies wrong "
        f"the answer was wrong in {Rate(*fewer)} of the pictures, otherwise in {Rate(*more)}. The copy without noise votes with the attacker: "
        "five wrong copies of nine are enough."
    )


def _questions(sweeps: Sweeps) -> str:
    standard, adaptive = sweeps["sweep_votes"], sweeps["sweep_votes_eot"]
    for record, task in ((standard, "pgd 4/255"), (adaptive, "pgd+eot8 4/255")):
        for point in _full(record):
            hold(_difference(point, task).value == 0, "every aggregator answers as a vote does")
    alone, through = one_copy(standard, "pgd 4/255"), one_copy(adaptive, "pgd+eot8 4/255")
    return (
        "**On yes / no questions clustering adds nothing:** medoid, k-means and silhouette, over each embedding, have the ASR of a plain vote. "
        f"The noise does most of it: one noisy copy alone has {difference(alone)} points more ASR, {difference(through)} under the adaptive attack."
    )


def _sentences(sweeps: Sweeps) -> str:
    standard, adaptive = sweeps["sweep_captions"], sweeps["sweep_captions_eot"]
    alone = one_copy(standard, "pgd 4/255")
    both = [(standard, "pgd 4/255"), (adaptive, "pgd+eot8 4/255")]
    clusters = [
        _difference(point, task)
        for record, task in both
        for point in _full(record)
        if not _is(point, aggregator="medoid")
    ]
    medoid = [_difference(point, both[1][1]) for point in _full(adaptive) if _is(point, aggregator="medoid")]
    hold(all(one.low <= 0 <= one.high for one in clusters), "no clustering differs from the vote beyond its interval")
    hold(alone.low > 0, "ten copies beat one")
    low, high = (100 * pick(one.value for one in clusters) for pick in (min, max))
    worse, worst = (100 * pick(one.value for one in medoid) for pick in (min, max))
    return (
        f"**On sentences** ten copies beat one (which has {difference(alone)} points more ASR), and it is the counting of equal answers that does it: "
        f"k-means and silhouette, over lexical, MiniLM and the model's own embeddings, lie {low:.1f} to {high:.1f} points from a plain vote, none "
        f"beyond its interval; the medoid is {worse:.1f} to {worst:.1f} points worse under the adaptive attack."
    )


def _clean(sweeps: Sweeps) -> str:
    changes = [
        _difference(point, task)
        for name, task in _ATTACKED.items()
        for point in sweeps[name].points
        if _is(point, include_clean=False, aggregator="vote", num_samples=10)
    ]
    hold(
        len(changes) == len(_ATTACKED) and all(one.low <= 0 <= one.high for one in changes),
        "the clean copy does not matter",
    )
    listed = ", ".join(f"{difference(one)}" for one in changes)
    return (
        "**Leaving the clean copy out** changes ASR by no more than chance (questions, then sentences, each standard and adaptive: "
        f"{listed} points), and `suspicion` needs it."
    )


_ATTACKED = {
    "sweep_votes": "pgd 4/255",
    "sweep_votes_eot": "pgd+eot8 4/255",
    "sweep_captions": "pgd 4/255",
    "sweep_captions_eot": "pgd+eot8 4/255",
}


def _is(point: PointRecord, **fields: object) -> bool:
    return point.defense is not None and all(point.defense[name] == value for name, value in fields.items())


def _full(record: SweepRecord) -> list[PointRecord]:
    """Ten copies, the clean one among them, as the defence votes: a clear majority is not asked about again."""
    return [
        p
        for p in record.points
        if _is(p, include_clean=True, num_samples=10) and p.majority_first and not _is(p, aggregator="vote")
    ]


def one_copy(record: SweepRecord, task: str) -> Figure:
    """How much more ASR one noisy copy alone has than the vote on all, paired."""
    return next(_difference(point, task) for point in record.points if _is(point, num_samples=1))


def _guarded(record: SweepRecord) -> PointRecord:
    return next(point for point in record.points if point.main and point.defense is not None)


def _asr(point: PointRecord, task: str) -> Figure:
    return point.figures[task]["asr"]


def _difference(point: PointRecord, task: str) -> Figure:
    return point.figures[task]["asr - vote"]


def _attacked(record: Record) -> TaskRecord:
    return next(task for task in record.tasks.values() if task.attack is not None)


def _run_asr(record: Record) -> Figure:
    return _attacked(record).figures["asr"]


def rate(figure: Figure) -> str:
    """A share in percent, its interval and n."""
    return f"{100 * figure.value:.1f} % ({100 * figure.low:.1f}-{100 * figure.high:.1f}, n = {figure.count})"


def hold(condition: bool, claim: str) -> None:
    """Raises ValueError where a claim is no longer so."""
    if not condition:
        raise ValueError(f"the results no longer say that {claim}; write the finding anew")
