"""What became of a run's answers and attacks: into lm-eval's table, its results file and its samples.

lm-eval's `evaluate` is wrapped: it tells our model of the tasks' metadata, names the task that is being scored, and gives the
results what the model noted: `smoothguard` in every sample; for every attacked task an entry of `smoothguard_attacks` and the
metric `attack_left_out`. With any other model it is left as it is.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.fingerprint import model_fingerprint
from lmms_smoothguard.harness import ledger
from lmms_smoothguard.harness.lm_eval.attacking import METADATA
from lmms_smoothguard.harness.summary import TOWER, put_in

log = logging.getLogger(__name__)
_MARK = "__smoothguard__"
SAMPLE = "smoothguard"


def install() -> None:
    """Wraps `evaluate`, once. It then raises ConfigError for a run whose answers would come from a cache."""
    import lm_eval
    from lm_eval import evaluator

    evaluate = evaluator.evaluate
    if hasattr(evaluate, _MARK):
        return

    @functools.wraps(evaluate)
    def reported(*args: Any, **kwargs: Any) -> Any:
        from lm_eval.api.model import CachingLM

        from lmms_smoothguard.harness.lm_eval.model import SmoothGuardMultimodalLM

        ledger.clear()
        given = inspect.signature(evaluate).bind_partial(*args, **kwargs).arguments
        model, tasks = given.get("lm"), _tasks(given.get("task_dict", {}))
        inner: Any = model.lm if isinstance(model, CachingLM) else model
        if not isinstance(inner, SmoothGuardMultimodalLM):
            return evaluate(*args, **kwargs)
        inner.sg_metadata = {name: getattr(task.config, "metadata", None) or {} for name, task in tasks.items()}
        inner.sg_infos, inner.sg_outcomes = {}, {}
        if inner is not model:
            _refuse_cached_answers(inner)
        for name, task in tasks.items():
            _name_when_scored(name, task)
        results = evaluate(*args, **kwargs)
        infos, outcomes = _of_all_processes(inner, inner.sg_infos), _of_all_processes(inner, inner.sg_outcomes)
        if results is None:
            return None
        for task, samples in (results.get("samples") or {}).items():
            for sample in samples:
                sample[SAMPLE] = infos.get((task, sample["doc_id"]), {})
        for task, summary in put_in(results, outcomes).items():
            log.log(logging.WARNING if summary.left_out else logging.INFO, "Attack on %s: %s", task, summary)
        if inner._sg_tower is not None:
            results[TOWER] = inner._sg_tower.to_dict() | {"model_fingerprint": model_fingerprint(inner.model)}
        return results

    setattr(reported, _MARK, True)
    evaluator.evaluate = lm_eval.evaluate = reported


def _tasks(task_dict: Mapping[str, Any]) -> dict[str, Any]:
    """By name, from what `evaluate` is given."""
    found: dict[str, Any] = {}
    for name, value in (task_dict.get("tasks") or task_dict).items():
        if isinstance(value, Mapping):
            found |= _tasks(value)
        elif hasattr(value, "process_results"):
            found[str(name)] = value
    return found


def _name_when_scored(name: str, task: Any) -> None:
    """Scorers are handed a document and an answer alone."""
    own = task.process_results

    def named(*args: Any, **kwargs: Any) -> Any:
        with ledger.scoring(name):
            return own(*args, **kwargs)

    task.process_results = named


def _refuse_cached_answers(model: Any) -> None:
    """lm-eval's cache knows an answer by its prompt alone: not by the defence, its noise or the attack."""
    options, metadata = model._sg_options, model.sg_metadata.values()
    attacked = any(options.attack_on({"attack": one.get(METADATA)}) is not None for one in metadata)
    if options.defense is not None or attacked or model._sg_tower is not None:
        raise ConfigError(
            "lm-eval's cache (--use_cache) would answer for the model, whatever its defence, attack or vision tower; expected a run without it. "
            "Adversarial images have a cache of their own, attack_cache"
        )


def _of_all_processes(model: Any, noted: dict[Any, Any]) -> dict[Any, Any]:
    """What every process noted of its own share of the samples."""
    if model.world_size == 1:
        return noted
    import torch.distributed as dist

    shares: list[Any] = [None] * model.world_size
    dist.all_gather_object(shares, noted)
    return {key: value for share in shares for key, value in share.items()}
