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
from collections.abc import Callable, Mapping
from typing import Any

from lmms_smoothguard.errors import AttackError, ConfigError, SmoothGuardError, explain
from lmms_smoothguard.fingerprint import model_fingerprint
from lmms_smoothguard.harness import ledger, sharding
from lmms_smoothguard.harness.lmms_eval.finishing import Finished, Finisher, tasks_of
from lmms_smoothguard.harness.summary import TOWER, Outcome, Outcomes, put_in

_MARK = "__smoothguard_attacks__"


def outcome_of(info: Mapping[str, Any], clean: Finished | None, final: Finished) -> Outcome | None:
    """The outcome of a request whose log says `info`; None where no attack was asked for."""
    if clean is None or ("attack" not in info and "attack_left_out" not in info):
        return None
    attack = info.get("attack")
    target = attack["target"] if attack is not None else None
    left_out = info.get("attack_left_out")
    return Outcome(clean.scored, final.scored, attack, target, left_out, clean.said, final.said)


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

    for task, summary in put_in(results, outcomes).items():
        logger.log("WARNING" if summary.left_out else "INFO", "Attack on {}: {}", task, summary)


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
