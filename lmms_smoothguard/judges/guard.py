"""Guard models: `guard/<hub id or directory>`, such as LlamaGuard, ShieldGemma or Granite Guardian, through their own chat
template.

Settings follow a `?`: `guard/DIR?batch_size=8&device=cuda:1`. `batch_size` (16), `device` (the current GPU, else the CPU),
`dtype` (`auto`: as stored), `new_tokens` (32), `trust_remote_code` (false: only you can say whose code may run).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import ConfigError, explain
from lmms_smoothguard.judges import Exchange, Judgement, Verdict
from lmms_smoothguard.judges.guard_dialects import combine, questions_for, read_verdict
from lmms_smoothguard.judges.loading import positive, split_argument

log = logging.getLogger(__name__)

_SETTINGS = {"batch_size": 16, "device": None, "dtype": "auto", "new_tokens": 32, "trust_remote_code": False}


class GuardJudge:
    """A guard model that reads question and answer as a user's and an assistant's turn, and answers greedily.

    Weights come from safetensors only. A batch that fails is judged one by one; an exchange that fails alone is unjudged.
    Raises ConfigError for a model that cannot be loaded or has no chat template.
    """

    def __init__(self, argument: str) -> None:
        name, settings = split_argument(argument, _SETTINGS)
        if not name:
            raise ConfigError("judge 'guard' names no model; expected guard/<hub id> or guard/<directory>")
        self._batch_size = positive(settings, "batch_size", 1, whole=True)
        self._new_tokens = positive(settings, "new_tokens", 1, whole=True)
        self._tokenizer, self._model = _load(name, settings)
        self._template = _template(self._tokenizer, name)
        self._lock = threading.Lock()  # scorers may run in threads; a model answers one batch at a time
        commit = getattr(self._model.config, "_commit_hash", None)
        self.version = f"{name}@{commit or _content(self._model, self._template)}"

    def judge(self, question: str, answer: str) -> Judgement:
        return self.judge_batch([Exchange(question, answer)])[0]

    def judge_batch(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One judgement each; every pass that the template asks for (ShieldGemma: one a harm type) is in it."""
        passes: list[list[tuple[str | None, Judgement]]] = [[] for _ in exchanges]
        for category, variables in questions_for(self._template):
            prompts = [self._prompt(exchange, variables) for exchange in exchanges]
            # Rows of like length share a batch, so that little is padding.
            order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                for index, judgement in zip(batch, self._judge([prompts[i] for i in batch]), strict=True):
                    passes[index].append((category, judgement))
        return [combine(found) for found in passes]

    def _prompt(self, exchange: Exchange, variables: dict[str, Any]) -> str:
        """The template's prompt. Templates want turns as texts or as lists of parts; the one that shows both texts is right."""
        errors = []
        for parts in (False, True):
            turns = [
                {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
                for role, text in zip(("user", "assistant"), exchange, strict=True)
            ]
            try:
                prompt = self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=True, chat_template=self._template, **variables
                )
            except Exception as error:  # noqa: BLE001 - a template is somebody else's program
                errors.append(explain(error))
                continue
            if all(text.strip() in prompt for text in exchange):
                return str(prompt)
        why = f" ({'; '.join(errors)})" if errors else ""
        raise ConfigError(
            f"the chat template of {self._model.config._name_or_path!r} does not show both question and answer{why}; expected one "
            "that judges an assistant's answer"
        )

    def _judge(self, prompts: list[str]) -> list[Judgement]:
        try:
            said = self._say(prompts)
        except Exception as error:  # noqa: BLE001 - out of memory, a kernel, a template's length: all leave a sample unjudged
            if len(prompts) == 1:
                log.warning("the guard model failed on one exchange: %s", explain(error))
                return [Judgement(Verdict.UNJUDGED, explain(error))]
            log.warning(
                "the guard model failed on %d exchanges, which are judged one by one: %s", len(prompts), explain(error)
            )
            return [judgement for prompt in prompts for judgement in self._judge([prompt])]
        return [read_verdict(prompt, text) for prompt, text in zip(prompts, said, strict=True)]

    def _say(self, prompts: list[str]) -> list[str]:
        import torch

        batch = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        length, most = batch["input_ids"].shape[1], _longest(self._model.config)
        if most is not None and length + self._new_tokens > most:
            raise ValueError(f"{length} tokens; the guard reads at most {most - self._new_tokens}")
        inputs = {key: batch[key].to(self._model.device) for key in ("input_ids", "attention_mask")}
        with self._lock, torch.inference_mode():
            out = self._model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self._new_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        return list(self._tokenizer.batch_decode(out[:, length:], skip_special_tokens=True))


def _load(name: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        raise ConfigError(
            f"judge 'guard/{name}': there is no directory {name}; expected a model's directory or a hub id"
        )
    path = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    trusted = {"trust_remote_code": settings["trust_remote_code"] is True}
    wanted = {**trusted, "use_safetensors": True, "dtype": settings["dtype"]}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **trusted)
        try:
            model = AutoModelForCausalLM.from_pretrained(path, **wanted)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            model = AutoModelForImageTextToText.from_pretrained(path, **wanted)  # LlamaGuard 3 vision and 4
    except Exception as error:
        raise ConfigError(
            f"judge 'guard/{name}' cannot be loaded: {explain(error)}. Expected a hub id that can be reached or is cached, or a "
            "directory, with a tokenizer and safetensors weights."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.eval().to(settings["device"] or _device())


def _device() -> str:
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def _template(tokenizer: Any, name: str) -> str:
    """The tokenizer's chat template. Raises ConfigError where there is none: a guard's wording is its own."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(
            f"judge 'guard/{name}' has no chat template, which says what a guard is asked; expected chat_template.jinja (or "
            "chat_template in tokenizer_config.json) beside its weights. Save the model card's template there."
        ) from error


def _content(model: Any, template: str) -> str:
    """What a directory's name does not say: which weights, and what they are asked."""
    from lmms_smoothguard.attacks.craft import model_fingerprint

    return hashlib.sha256(f"{model_fingerprint(model)} {template}".encode()).hexdigest()[:16]


def _longest(config: Any) -> int | None:
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None)
