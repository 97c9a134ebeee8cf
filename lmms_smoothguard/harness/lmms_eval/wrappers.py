"""lmms-eval's own model wrappers with a defence, and attacks, around them.

Classes are made on demand: `chat__llava_hf` is lmms-eval's chat wrapper `llava_hf` with `SmoothGuardMixin` before it, so
that prompts and generation settings stay those of the base. Requests are answered one at a time: the N copies fill a
batch, and what was learnt of an answer belongs to one sample beyond doubt.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import inspect
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts, unwrap_generation_output

import hf_integration
from hf_integration.protecting import hears
from lmms_smoothguard.choice import check
from lmms_smoothguard.encoders import TowerProvenance, check_tower, load_vision_tower
from lmms_smoothguard.errors import ConfigError, UndefendableError, explain
from lmms_smoothguard.harness import sharding
from lmms_smoothguard.harness.lmms_eval import judging, reporting
from lmms_smoothguard.harness.lmms_eval.attacking import CLEAN, INFO, attacked_requests
from lmms_smoothguard.harness.lmms_eval.bases import BLACK_BOXES
from lmms_smoothguard.harness.lmms_eval.finishing import PADDING, Finished, Finisher
from lmms_smoothguard.harness.lmms_eval.instances import has_media
from lmms_smoothguard.harness.options import Options, explain_leftover, take_options
from lmms_smoothguard.harness.summary import vote_of
from lmms_smoothguard.reproducible import reproducible_sums


class SampleCounts(TokenCounts):
    """Token counts that carry what we log of a sample: lmms-eval writes them into the samples file."""

    def __init__(self, info: dict[str, Any], counts: TokenCounts | None) -> None:
        super().__init__(**(dataclasses.asdict(counts) if counts is not None else {}))
        self.info = info

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.info}


class SmoothGuardMixin:
    """Stands before a wrapper of lmms-eval; reads `defense`, its fields and `attack*` from the model's arguments."""

    _sg_options: Options
    _sg_outcomes: reporting.Outcomes
    _sg_tower: TowerProvenance | None = None  # None: the model's own
    _sg_finisher: Finisher  # of the run in progress: `reporting` hands it over

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sg_outcomes, self._sg_finisher = {}, Finisher()
        reproducible_sums()
        reporting.install()
        sharding.guard_evaluator()
        with sharding.all_or_none():
            self._sg_init(args, kwargs)

    def _sg_init(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        base_init = parameters_of(type(self))
        accepted = [*base_init, "batch_size", "max_batch_size", "device"]
        self._sg_options = take_options(kwargs, accepted)
        explain_leftover(kwargs, accepted, self._sg_options.defense)
        judging.use(self._sg_options.judge)
        check_tower(self._sg_options.vision_tower, self._sg_options.vision_tower_resolution)
        if not torch.cuda.is_available():  # upstream's defaults, "cuda" and "", do not work on a CPU
            if "device" in base_init:
                kwargs["device"] = "cpu" if str(kwargs.get("device") or "cuda").startswith("cuda") else kwargs["device"]
            if "device_map" in base_init and not kwargs.get("device_map"):
                kwargs["device_map"] = _device_map_of_cpu(base_init["device_map"].default)
        super().__init__(*args, **kwargs)
        if not torch.cuda.is_available() and getattr(self, "device_map", None) == "auto":
            self.device_map = "cpu"  # upstream sends the inputs of an "auto" model to "cuda"
        hf_integration.enable()
        model = self._sg_model()
        processor = _find_processor(self)
        if self._sg_options.vision_tower is not None:
            self._sg_tower = load_vision_tower(
                model, self._sg_options.vision_tower, processor, self._sg_options.vision_tower_resolution
            )
        if processor is not None:
            if hears(processor):
                hf_integration.protect(processor)
            hf_integration.attach(model, processor)
        defense = self._sg_options.defense
        check(defense, model, getattr(processor, "image_processor", processor))
        model.generation_config.smoothguard = None if defense is None else defense.to_dict()

    def _sg_model(self) -> Any:
        model = getattr(self, "model", None) or getattr(self, "_model", None)
        if model is None or not hasattr(model, "generation_config"):
            raise UndefendableError(
                f"{type(self).__name__} holds no Hugging Face model with a generation config; it cannot be defended"
            )
        return model

    def _sg_quiet(self) -> bool:
        """Progress bars are the first process's."""
        return getattr(self, "rank", 0) != 0

    # -- what lmms-eval calls ------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Crafts the attacks that the requests' tasks ask for, then answers every request through the defence."""
        from tqdm import tqdm

        model, processor, quiet = self._sg_model(), _find_processor(self), self._sg_quiet()

        def plain(request: Instance) -> str:
            return self._sg_base(request)[0]

        with _one_voice(type(self)):
            attacked = attacked_requests(
                self, requests, self._sg_options, model, processor, plain, self._sg_finisher, quiet
            )
            asked = [attacked.get(id(request), request) for request in requests]
            bar = tqdm(asked, desc="answering", unit="sample", disable=quiet)
            answers = [self._sg_answer(request) for request in bar]
        finals = self._sg_finish(asked, answers)
        judging.judge_ahead(self, finals)
        return answers

    def _sg_finish(
        self, asked: Sequence[Instance], answers: Sequence[GenerationResult]
    ) -> list[tuple[Instance, Finished]]:
        """Every request that is attacked or judged, once, with its answer as it is scored; notes what became of attacks."""
        texts: dict[int, list[str]] = {}
        for request, answer in zip(asked, answers, strict=True):
            wanted = INFO in request.metadata or judging.JUDGED in request.metadata
            if wanted and not request.metadata.get(PADDING):
                texts.setdefault(id(request), []).append(answer.text)
        made = self._sg_finisher.finish(asked, texts)
        by_id = {id(request): request for request in asked}
        finals = [(by_id[place], final) for place, final in made.items()]
        for request, final in finals:
            outcome = reporting.outcome_of(request.metadata.get(INFO, {}), request.metadata.get(CLEAN), final)
            if outcome is not None:
                self._sg_outcomes[request.task_name, request.doc_id] = outcome
        return finals

    def loglikelihood(self, requests: Sequence[Instance]) -> Any:
        """Refused with a defence: a likelihood has no answers to vote on."""
        self._sg_refuse("loglikelihood", requests)
        return super().loglikelihood(requests)  # type: ignore[misc]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Any:
        """Refused with a defence or an attack: not supported yet."""
        self._sg_refuse("generate_until_multi_round", requests)
        return super().generate_until_multi_round(requests)  # type: ignore[misc]

    def _sg_refuse(self, kind: str, requests: Sequence[Instance]) -> None:
        attacked = any(self._sg_options.attack_on(request.metadata) is not None for request in requests)
        if self._sg_options.defense is not None or attacked:
            raise UndefendableError(
                f"a {kind} request cannot be defended or attacked; expected generate_until. Use defense=none and no attack."
            )

    # -- one answer ----------------------------------------------------------------------------------------------------

    def _sg_answer(self, request: Instance) -> GenerationResult:
        info = dict(request.metadata.get(INFO, {}))
        started = time.perf_counter()
        text, counts, seen = self._sg_base(request)
        info["seconds"] = time.perf_counter() - started
        if self._sg_options.defense is not None:
            if not seen.defended and has_media(self, request):
                raise UndefendableError(
                    f"{type(self).__name__} answered {request.task_name}[{request.doc_id}] without a defended generate(); "
                    "this wrapper bypasses it, so its answers would be undefended"
                )
            info |= vote_of(seen)
        return GenerationResult(text=text, token_counts=SampleCounts(info, counts))

    def _sg_base(self, request: Instance) -> tuple[str, TokenCounts | None, hf_integration.Observation]:
        """The wrapper's own answer to one request; raises what happened inside generate, which wrappers swallow."""
        # Wrappers change the settings they are given, so each call gets its own.
        arguments = tuple(copy.deepcopy(part) if isinstance(part, dict) else part for part in request.args)
        with hf_integration.observe() as seen:
            results = super().generate_until([dataclasses.replace(request, arguments=arguments)])  # type: ignore[misc]
        if seen.error is not None:
            raise RuntimeError(f"{request.task_name}[{request.doc_id}] failed: {explain(seen.error)}") from seen.error
        if not results:
            raise RuntimeError(f"{type(self).__name__} gave no answer to {request.task_name}[{request.doc_id}]")
        text, counts = unwrap_generation_output(results[0])
        return text, counts, seen


# -- the wrapper underneath --------------------------------------------------------------------------------------------


def _device_map_of_cpu(default: Any) -> str:
    """Wrappers whose default is "cuda" look at `device` under "auto" alone, and take "cuda:0" for any other map."""
    return "auto" if str(default).startswith("cuda") else "cpu"


def parameters_of(wrapper: type) -> dict[str, inspect.Parameter]:
    """The named arguments of a wrapper's own `__init__`, and of the next ones for as long as each hands `**kwargs` on."""
    own = wrapper.__mro__[wrapper.__mro__.index(SmoothGuardMixin) + 1 :]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found: dict[str, inspect.Parameter] = {}
    for base in own:
        if "__init__" not in base.__dict__ or base is object:
            continue
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        found = {name: p for name, p in parameters.items() if p.kind in named and name != "self"} | found
        # Most take **kwargs only to assert that there are none; those that hand them on name no model of their own.
        if "pretrained" in found:
            break
    return found


def _find_processor(wrapper: Any) -> Any:
    """The wrapper's processor (tokenizer and image processor in one), whatever it calls it."""
    names = ("processor", "_processor", "_image_processor", "image_processor")
    found = [getattr(wrapper, name, None) for name in names]
    whole = [item for item in found if hasattr(item, "image_processor") and hasattr(item, "tokenizer")]
    return (whole or [item for item in found if item is not None] or [None])[0]


@contextlib.contextmanager
def _one_voice(wrapper: type) -> Iterator[None]:
    """Silences the progress bar and gathers the throughput report that a wrapper would give for every single request."""
    from tqdm import tqdm

    modules = [
        sys.modules[base.__module__] for base in wrapper.__mro__ if base.__module__.startswith("lmms_eval.models.")
    ]
    originals = [(m, name, getattr(m, name)) for m in modules for name in ("tqdm", "log_metrics") if hasattr(m, name)]
    reports: list[dict[str, Any]] = []
    for module, name, original in originals:
        if name == "log_metrics":
            module.log_metrics = lambda **report: reports.append(report)  # type: ignore[attr-defined]
        elif original is tqdm:
            module.tqdm = lambda *args, **kwargs: tqdm(*args, **{**kwargs, "disable": True})  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
    log_metrics = next((original for _, name, original in originals if name == "log_metrics"), None)
    if log_metrics is not None and reports:
        tokens = sum(report.get("total_gen_tokens", 0) for report in reports)
        seconds = sum(report.get("total_elapsed_time", 0.0) for report in reports)
        speed = tokens / seconds if seconds else 0.0
        log_metrics(**{**reports[-1], "total_gen_tokens": tokens, "total_elapsed_time": seconds, "avg_speed": speed})


def __getattr__(name: str) -> type:
    """`simple__<base>` and `chat__<base>`: the defended subclass of lmms-eval's wrapper."""
    kind, separator, base = name.partition("__")
    if not separator or kind not in ("simple", "chat"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import lmms_eval.models as models

    table = models.AVAILABLE_SIMPLE_MODELS if kind == "simple" else models.AVAILABLE_CHAT_TEMPLATE_MODELS
    if base not in table:
        raise ConfigError(f"lmms-eval has no {kind} model {base!r}")
    path = table[base] if "." in table[base] else f"lmms_eval.models.{kind}.{base}.{table[base]}"
    module, _, attribute = path.rpartition(".")
    parent = getattr(importlib.import_module(module), attribute)
    made = type(name, (_mixin(base), parent), {"__module__": __name__, "__doc__": parent.__doc__})
    globals()[name] = made
    return made


def _mixin(base: str) -> type[SmoothGuardMixin]:
    """What stands before a wrapper: the defence inside of its model, or around one that is out of reach."""
    if base not in BLACK_BOXES:
        return SmoothGuardMixin
    from lmms_smoothguard.harness.lmms_eval.black_boxes import BlackBoxMixin

    return BlackBoxMixin
