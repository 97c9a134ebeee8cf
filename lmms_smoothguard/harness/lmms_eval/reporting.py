"""What became of a run's attacks, task by task: into lmms-eval's table, its results file and its log.

A wrapper sees requests and answers only, not where lmms-eval writes. So lmms-eval's `evaluate` is wrapped when our model is
built, and its results get what the wrapper noted: for every attacked task an entry of `smoothguard_attacks`, and for
tasks that do not report attacks themselves the same rates among their metrics.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_smoothguard.aggregation.verdict import normalize_answer
from lmms_smoothguard.errors import AttackError, ConfigError, SmoothGuardError, explain
from lmms_smoothguard.evaluation.rates import Rate, rate
from lmms_smoothguard.harness.lmms_eval import sharding

RESULTS = "smoothguard_attacks"
_MARK = "__smoothguard_attacks__"


@dataclass(frozen=True)
class Outcome:
    """One sample of an attacked task. `target`: the text it was to be led to; `left_out`: why it was not attacked."""

    clean_answer: str
    answer: str
    attack: Mapping[str, Any] | None
    target: str | None = None
    left_out: str | None = None


Outcomes = dict[tuple[str, Any], Outcome]
"""By task and document, so that a sample answered twice (padding of shards, repeats) counts once."""


def outcome_of(info: Mapping[str, Any], answer: str) -> Outcome | None:
    """The outcome of a request whose log says `info`; None where no attack was asked for."""
    if "attack" not in info and "attack_left_out" not in info:
        return None
    attack = info.get("attack")
    target = attack["target"] if attack is not None else None
    return Outcome(info["clean_answer"], answer, attack, target, info.get("attack_left_out"))


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
        tuple(sorted({_title(outcome.attack) for outcome in attacked if outcome.attack is not None})),
        len(attacked),
        rate(normalize_answer(o.answer) != normalize_answer(o.clean_answer) for o in attacked),
        rate(_says(o.answer, o.target) for o in aimed) if aimed else None,
        rate(_says(o.clean_answer, o.target) for o in aimed) if aimed else None,
        dict(sorted(Counter(o.left_out for o in outcomes if o.left_out is not None).items())),
    )


def _says(answer: str, target: str | None) -> bool:
    return target is not None and target.casefold() in answer.casefold()


def _title(attack: Mapping[str, Any]) -> str:
    radius = f"{attack['eps'] * 255:.3g}/255" if attack["norm"] == "linf" else f"{attack['eps']:.3g}"
    averaged = f", EOT {attack['eot']}" if attack["eot"] else ""
    return f"{attack['name']}, {attack['steps']} steps{averaged}, {attack['norm']} {radius}"


def install() -> None:
    """Wraps lmms-eval's `evaluate` and its loading of tasks, once.

    `evaluate` then raises AttackError for an attacked run with a response cache, ConfigError for one without samples.
    """
    from lmms_eval import evaluator

    evaluate, get_task_dict = evaluator.evaluate, evaluator.get_task_dict
    if hasattr(evaluate, _MARK):
        return

    @functools.wraps(get_task_dict)
    def loaded(tasks: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return get_task_dict(tasks, *args, **kwargs)
        except Exception as error:  # it names neither the task nor, behind its retries, the reason
            attempt = getattr(error, "last_attempt", None)
            reason = explain((attempt.exception() if attempt is not None else None) or error)
            raise SmoothGuardError(
                f"lmms-eval cannot load {_names(tasks)} ({reason}); expected a data set that can be reached, with at least "
                "one sample in the task's split and a first one that can be read"
            ) from error

    @functools.wraps(evaluate)
    def reported(*args: Any, **kwargs: Any) -> Any:
        model = kwargs.get("lm", args[0] if args else None)
        outcomes: Outcomes | None = getattr(model, "_sg_outcomes", None)
        if model is None or outcomes is None:
            return evaluate(*args, **kwargs)
        outcomes.clear()
        if kwargs.get("limit") == 0:
            raise ConfigError("limit is 0, so there is no sample to answer; expected 1 or more, or no limit")
        if kwargs.get("response_cache") is not None:
            _refuse_cached_answers(model, kwargs.get("task_dict", {}))
        results = evaluate(*args, **kwargs)
        add(results, _of_all_processes(outcomes))
        return results

    setattr(reported, _MARK, True)
    evaluator.evaluate, evaluator.get_task_dict = reported, loaded


def _names(tasks: Any) -> str:
    listed = [tasks] if isinstance(tasks, str) else list(tasks or [])
    return ", ".join(str(task.get("task", "?")) if isinstance(task, Mapping) else str(task) for task in listed)


def add(results: dict[str, Any] | None, outcomes: Outcomes) -> None:
    """Puts every attacked task's summary into lmms-eval's results (None in all processes but the first), and logs it."""
    if results is None:
        return
    from loguru import logger

    for task in dict.fromkeys(task for task, _ in outcomes):
        summary = summarise([outcome for (other, _), outcome in outcomes.items() if other == task])
        results.setdefault(RESULTS, {})[task] = summary.to_dict()
        logger.log("WARNING" if summary.left_out else "INFO", "Attack on {}: {}", task, summary)
        figures = results["results"].get(task, {})
        if any(name.startswith(("asr,", "answer_changed,")) for name in figures):
            shown = {name: value for name, value in summary.metrics().items() if name.startswith("target_said")}
        else:
            shown = summary.metrics()
        better = results.setdefault("higher_is_better", {}).setdefault(task, {})
        for name, value in shown.items():
            figures[f"{name},none"] = value
            better[name] = None if name.endswith("_count") or name == "attack_left_out" else False


def _of_all_processes(outcomes: Outcomes) -> Outcomes:
    """Those of every shard; each has its own samples, and lmms-eval has gathered the scores just before."""
    import torch.distributed as dist

    if not sharding.sharded() or not dist.is_available() or not dist.is_initialized():
        return dict(outcomes)
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, dict(outcomes))
    return {key: outcome for share in shares for key, outcome in share.items()}


def _refuse_cached_answers(model: Any, task_dict: Mapping[Any, Any]) -> None:
    for task in _tasks(task_dict):
        metadata = getattr(getattr(task, "config", None), "metadata", None)
        if model._sg_options.attack_on(metadata if isinstance(metadata, Mapping) else {}) is not None:
            raise AttackError(
                f"{task.config.task} is attacked, and lmms-eval's response cache (--use_cache) would answer for the model; "
                "expected a run without it. Adversarial images have a cache of their own, attack_cache."
            )


def _tasks(task_dict: Mapping[Any, Any]) -> Iterator[Any]:
    for task in task_dict.values():
        if isinstance(task, Mapping):
            yield from _tasks(task)
        else:
            yield task[1] if isinstance(task, tuple) else task
