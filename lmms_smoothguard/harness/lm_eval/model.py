"""lm-eval's `hf-multimodal` with a defence, and attacks, around it.

Prompts, generation settings and stop sequences stay lm-eval's own. Requests are answered one at a time: the N copies fill a
batch, and what was learnt of an answer belongs to one sample beyond doubt.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import gc
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM

import hf_integration
from lmms_smoothguard.choice import check, field_names
from lmms_smoothguard.encoders import TowerProvenance, check_tower, load_vision_tower
from lmms_smoothguard.errors import ConfigError, UndefendableError, did_you_mean, explain
from lmms_smoothguard.harness import sharding
from lmms_smoothguard.harness.lm_eval.attacking import Attacked, attack, pictures_of
from lmms_smoothguard.harness.options import Options, attack_keys, take_options
from lmms_smoothguard.harness.summary import Outcomes, vote_of
from lmms_smoothguard.reproducible import reproducible_sums


class SmoothGuardMultimodalLM(HFMultimodalLM):
    """`smoothguard-hf-multimodal`. Model arguments: lm-eval's, and `defense`, its fields, `attack*`, `vision_tower` as in the
    lmms-eval wrappers; `defense=none` is the undefended run."""

    _sg_tower: TowerProvenance | None = None

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        reproducible_sums()
        accepted = _parameters()
        self._sg_options: Options = take_options(kwargs, accepted)
        _explain_misspelt(kwargs, accepted, self._sg_options)
        check_tower(self._sg_options.vision_tower, self._sg_options.vision_tower_resolution)
        if not torch.cuda.is_available() and str(kwargs.get("device") or "cuda").startswith("cuda"):
            kwargs["device"] = "cpu"  # upstream's default does not work there
        super().__init__(pretrained, **kwargs)
        if sharding.sharded() and kwargs.get("tp_plan") is None:
            self._share_out()
        hf_integration.enable()
        if self._sg_options.vision_tower is not None:
            self._sg_tower = load_vision_tower(
                self.model, self._sg_options.vision_tower, self.processor, self._sg_options.vision_tower_resolution
            )
        hf_integration.attach(self.model, self.processor)
        defense = self._sg_options.defense
        check(defense, self.model, getattr(self.processor, "image_processor", self.processor))
        self.model.generation_config.smoothguard = None if defense is None else defense.to_dict()
        self.sg_metadata: Mapping[str, Mapping[str, Any]] = {}  # of the run's tasks: `reporting` hands it over
        self.sg_infos: dict[tuple[str, Any], dict[str, Any]] = {}
        self.sg_outcomes: Outcomes = {}

    def _share_out(self) -> None:
        """lm-eval shares samples out to the GPUs of one host, and to CPUs not at all: here to all processes of all hosts."""
        if not hasattr(self, "accelerator"):
            self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        atexit.register(sharding.take_leave)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Crafts the attacks that are asked for, then answers every request through the defence."""
        from tqdm import tqdm

        quiet = disable_tqdm or self.rank != 0
        metadata = {request.task_name: self.sg_metadata.get(request.task_name, {}) for request in requests}
        with _quick_collections():
            attacked = attack(
                self.model, self.processor, requests, metadata, self._sg_options, lambda r: self._sg_base(r)[0], quiet
            )
            answers = [
                self._sg_answer(request, attacked.get(id(request)))
                for request in tqdm(requests, desc="answering", unit="sample", disable=quiet)
            ]
        for request, answer in zip(requests, answers, strict=True):
            if id(request) in attacked:
                place = (str(request.task_name), request.doc_id)
                self.sg_outcomes[place] = attacked[id(request)].outcome(answer)
        return answers

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> Any:
        """Refused with a defence or an attack: a likelihood has no answers to vote on."""
        self._sg_refuse("loglikelihood", requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], **kwargs: Any) -> Any:
        """Refused with a defence or an attack."""
        self._sg_refuse("loglikelihood_rolling", requests)
        return super().loglikelihood_rolling(requests, **kwargs)

    def _sg_refuse(self, kind: str, requests: Sequence[Instance]) -> None:
        if self._sg_options.defense is not None or "name" in self._sg_options.attack:
            raise UndefendableError(
                f"a {kind} request ({requests[0].task_name}) cannot be defended or attacked; expected tasks of output_type "
                "generate_until. Use defense=none and no attack."
            )

    def _sg_answer(self, request: Instance, attacked: Attacked | None) -> str:
        started = time.perf_counter()
        text, seen = self._sg_base(request if attacked is None else attacked.request)
        info: dict[str, Any] = {**({} if attacked is None else attacked.info), "seconds": time.perf_counter() - started}
        if self._sg_options.defense is not None:
            if not seen.defended and pictures_of(request):
                raise UndefendableError(
                    f"{request.task_name}[{request.doc_id}] was answered without a defended generate(), so the answer would be "
                    "undefended"
                )
            info |= vote_of(seen)
        self.sg_infos[str(request.task_name), request.doc_id] = info
        return text

    def _sg_base(self, request: Instance) -> tuple[str, hf_integration.Observation]:
        """lm-eval's own answer to one request."""
        if len(request.args) > 2 and (audio := request.args[2].get("audio")):
            raise UndefendableError(
                f"{request.task_name}[{request.doc_id}] has {len(audio)} sounds; expected pictures: this model takes no sound"
            )
        pictures_of(request)  # what is no picture is refused before lm-eval resizes it
        with hf_integration.observe() as seen:
            (text,) = super().generate_until([request], disable_tqdm=True)
        if seen.error is not None:
            raise RuntimeError(f"{request.task_name}[{request.doc_id}] failed: {explain(seen.error)}") from seen.error
        return text, seen


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """lm-eval collects garbage after every batch, and here every request is one: what was there before is left out of it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _parameters() -> list[str]:
    """lm-eval's own arguments of the model."""
    found = [inspect.signature(base.__init__).parameters for base in (HFMultimodalLM, HFLM)]
    return [name for parameters in found for name in parameters if name not in ("self", "kwargs")]


def _explain_misspelt(kwargs: Mapping[str, Any], accepted: Sequence[str], options: Options) -> None:
    """Refuses a key that is nearly one of ours: lm-eval hands what it does not know to `from_pretrained`."""
    defense = options.defense
    ours = [*field_names("smoothguard" if defense is None else defense.name), *attack_keys(), "defense", "attack"]
    ours += ["attack_cache", "attack_batch_size", "vision_tower", "vision_tower_resolution"]
    for key in kwargs:
        if key not in accepted and difflib.get_close_matches(key, ours, 1, 0.75):
            raise ConfigError(f"unknown model argument {key!r}; {did_you_mean(key, ours)}")
