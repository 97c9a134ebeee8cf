"""What is told of a sample's vote, and of a run's attacks on one task: for a harness's tables, files and logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_integration import Observation
from lmms_smoothguard.attacks.cache import Entry
from lmms_smoothguard.evaluation.answers import same_answer, says
from lmms_smoothguard.evaluation.rates import Rate, rate
from lmms_smoothguard.evaluation.titles import attack_title

RESULTS = "smoothguard_attacks"
"""Where a harness's results file has the summaries, by task."""
TOWER = "smoothguard_vision_tower"
"""Where it has the vision tower that was put into the model, and the fingerprint of the model that this made."""
NO_IMAGE, NO_SOUND, NO_ANSWER = "no image", "no sound", "empty clean answer"
"""Why a sample of an attacked run is left as it is, and out of every rate under attack."""


@dataclass(frozen=True)
class Outcome:
    """One sample of an attacked task, its answers as they are scored. target: the text it was to be led to; left_out: why it
    was not attacked; clean_said, said: the answers before the task's filters, which may leave a choice's letter alone (None:
    they are the same)."""

    clean_answer: str
    answer: str
    attack: Mapping[str, Any] | None
    target: str | None = None
    left_out: str | None = None
    clean_said: str | None = None
    said: str | None = None

    def says_target(self, *, clean: bool = False) -> bool:
        """Whether the final, or the clean, answer says the target."""
        text, whole = (self.clean_answer, self.clean_said) if clean else (self.answer, self.said)
        return says(text if whole is None else whole, self.target or "")


Outcomes = dict[tuple[str, Any], Outcome]
"""By task and document, so that a sample answered twice (padding of shards, repeats) counts once."""


@dataclass(frozen=True)
class Summary:
    """A task under attack. Rates are over `attacked` samples; those left out are in none of them.

    changed: final answers that differ from the undefended clean answer, rephrasings among them; said: final answers in which
    the target appears; said_clean: clean ones in which it did already (both None without a target).
    """

    attacks: tuple[str, ...]
    attacked: int
    changed: Rate
    said: Rate | None
    said_clean: Rate | None
    left_out: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "attacks": list(self.attacks),
            "attacked": self.attacked,
            "answer_changed": self.changed.figure().to_dict(),
            "target_said": None if self.said is None else self.said.figure().to_dict(),
            "target_said_clean": None if self.said_clean is None else self.said_clean.figure().to_dict(),
            "left_out": self.left_out,
        }

    def metrics(self) -> dict[str, float]:
        """As lmms-eval's table shows them."""
        rates = {"answer_changed": self.changed} | ({} if self.said is None else {"target_said": self.said})
        found: dict[str, float] = {"attack_left_out": sum(self.left_out.values())}
        for name, value in rates.items():
            low, high = value.interval
            found |= {name: value.value, f"{name}_low": low, f"{name}_high": high, f"{name}_count": value.count}
        return found

    def __str__(self) -> str:
        parts = [f"{self.attacked} samples attacked ({', '.join(self.attacks) or 'none'})"]
        if self.attacked:
            parts.append(f"final answer other than the undefended clean one: {self.changed}")
        if self.said is not None and self.said_clean is not None:
            parts.append(f"target said: {self.said}, by clean answers already {self.said_clean.hits}")
        parts += [f"left out, {reason}: {count}" for reason, count in self.left_out.items()]
        return "; ".join(parts)


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """The summary of one task's outcomes."""
    attacked = [outcome for outcome in outcomes if outcome.left_out is None]
    aimed = [outcome for outcome in attacked if outcome.target is not None]
    return Summary(
        tuple(sorted({attack_title(outcome.attack) for outcome in attacked if outcome.attack is not None})),
        len(attacked),
        rate(not same_answer(o.answer, o.clean_answer) for o in attacked),
        rate(o.says_target() for o in aimed) if aimed else None,
        rate(o.says_target(clean=True) for o in aimed) if aimed else None,
        dict(sorted(Counter(o.left_out for o in outcomes if o.left_out is not None).items())),
    )


def put_in(results: dict[str, Any], outcomes: Outcomes) -> dict[str, Summary]:
    """Puts every attacked task's summary into a harness's results: an entry of `RESULTS`, and metrics in its table."""
    found = {}
    for task in dict.fromkeys(task for task, _ in outcomes):
        found[task] = summary = summarise([outcome for (other, _), outcome in outcomes.items() if other == task])
        results.setdefault(RESULTS, {})[task] = summary.to_dict()
        figures = results["results"].get(task, {})
        shown = summary.metrics()
        if any(name.startswith(("asr,", "answer_changed,")) for name in figures):
            shown = {name: value for name, value in shown.items() if not name.startswith("answer_changed")}
        better = results.setdefault("higher_is_better", {}).setdefault(task, {})
        for name, value in shown.items():
            figures[f"{name},none"] = value
            better[name] = None if name.endswith("_count") or name == "attack_left_out" else False
    return found


def told_of(entry: Entry) -> dict[str, Any]:
    """What the samples log says of an adversarial picture or sound."""
    numbers = {f"attack_{name}": entry.record[name] for name in ("linf", "l2", "rendering_gap", "seconds")}
    apart = [decibels for decibels in entry.record.get("snr_db", ()) if decibels is not None]
    least = {"attack_snr": min(apart)} if apart else {}
    return {"attack": entry.record["attack"], "attack_key": entry.key, **numbers, **least}


def vote_of(seen: Observation) -> dict[str, Any]:
    """What the samples log says of an answer: whether it was defended (text alone is not), and the vote if there was one."""
    verdicts = [verdict for call in seen.verdicts for verdict in call]
    if not verdicts:
        return {"defended": seen.defended > 0}
    last = verdicts[-1]
    return {
        "defended": True,
        "agreement": last.agreement,
        "suspicion": last.suspicion,
        "suspected": last.suspected,
        "num_samples_used": last.num_samples_used,
        "candidates": list(last.texts if last.texts is not None else map(str, last.candidates)),
        "labels": list(last.labels),
        "warnings": list(last.warnings),
    }
