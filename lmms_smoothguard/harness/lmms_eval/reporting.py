"""What became of a run's attacks, task by task: into lmms-eval's table, its results file and its log.

A wrapper sees requests and answers only, not where lmms-eval writes. So lmms-eval's `evaluate` is wrapped when our model is
built, and its results get what the wrapper noted: for every attacked task an entry of `smoothguard_attacks` and the metric
`attack_left_out`, and for tasks that do not report attacks themselves the same rates among their metrics; and where a model
sees with another vision tower, `smoothguard_vision_tower`, with the fingerprint of the model that it makes.

Every `evaluate` starts from an empty ledger, one with a model that is not ours too: its scores are of no earlier attack.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_smoothguard.errors import AttackError, ConfigError, SmoothGuardError, explain
from lmms_smoothguard.evaluation.answers import same_answer, says
from lmms_smoothguard.evaluation.rates import Rate, rate
from lmms_smoothguard.evaluation.titles import attack_title
from lmms_smoothguard.fingerprint import model_fingerprint
from lmms_smoothguard.harness.lmms_eval import ledger, sharding
from lmms_smoothguard.harness.lmms_eval.finishing import Finished, Finisher, tasks_of

RESULTS = "smoothguard_attacks"
TOWER = "smoothguard_vision_tower"
_MARK = "__smoothguard_attacks__"


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


def outcome_of(info: Mapping[str, Any], clean: Finished | None, final: Finished) -> Outcome | None:
    """The outcome of a request whose log says `info`; None where no attack was asked for."""
    if clean is None or ("attack" not in info and "attack_left_out" not in info):
        return None
    attack = info.get("attack")
    target = attack["target"] if attack is not None else None
    left_out = info.get("attack_left_out")
    return Outcome(clean.scored, final.scored, attack, target, left_out, clean.said, final.said)


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
        ledger.clear()
        given = inspect.signature(evaluate).bind_partial(*args, **kwargs).arguments
        model, task_dict = given.get("lm"), given.get("task_dict", {})
        outcomes: Outcomes | None = getattr(model, "_sg_outcomes", None)
        if model is None or outcomes is None:
            return _with_reason(evaluate, *args, **kwargs)
        outcomes.clear()
        if given.get("limit") == 0:
            raise ConfigError("limit is 0, so there is no sample to answer; expected 1 or more, or no limit")
        if given.get("response_cache") is not None:
            _refuse_cached_answers(model, task_dict)
        model._sg_finisher = Finisher(task_dict, given.get("cli_args"))
        tower = _tower(model)  # before: lmms-eval lets go of the model as soon as it has answered
        results = _with_reason(evaluate, *args, **kwargs)
        add(results, _of_all_processes(outcomes))
        if results is not None and tower is not None:
            results[TOWER] = tower
        return results

    setattr(reported, _MARK, True)
    evaluator.evaluate, evaluator.get_task_dict = reported, loaded


def _tower(model: Any) -> dict[str, Any] | None:
    """Which vision tower was put into the model, and which model that made; None for its own."""
    tower = getattr(model, "_sg_tower", None)
    return None if tower is None else tower.to_dict() | {"model_fingerprint": model_fingerprint(model._sg_model())}


def _with_reason(evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """lmms-eval tries a scorer that raises five times, and then says RetryError: what we raise, the user shall read."""
    try:
        return evaluate(*args, **kwargs)
    except Exception as error:
        attempt = getattr(error, "last_attempt", None)
        reason = attempt.exception() if attempt is not None else None
        if isinstance(reason, SmoothGuardError):
            raise reason from error
        raise


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
        shown = summary.metrics()
        if any(name.startswith(("asr,", "answer_changed,")) for name in figures):
            shown = {name: value for name, value in shown.items() if not name.startswith("answer_changed")}
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
    for task in tasks_of(task_dict):
        metadata = getattr(getattr(task, "config", None), "metadata", None)
        if model._sg_options.attack_on(metadata if isinstance(metadata, Mapping) else {}) is not None:
            raise AttackError(
                f"{task.config.task} is attacked, and lmms-eval's response cache (--use_cache) would answer for the model; "
                "expected a run without it. Adversarial images have a cache of their own, attack_cache."
            )
