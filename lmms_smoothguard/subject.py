"""A model under test without a harness: loaded for real, asked through its own processor, answering greedily.

subject = Subject("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
inputs = subject.inputs(question)
reply = subject.answer(inputs, max_new_tokens=32, defense=choose({"sigma": 0.2}))
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

import hf_integration
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.encoders import TowerProvenance, check_tower, load_vision_tower
from lmms_smoothguard.errors import ConfigError, did_you_mean
from lmms_smoothguard.evaluation.questions import Question
from lmms_smoothguard.inputs.fitting import is_encoder_decoder
from lmms_smoothguard.reproducible import reproducible_sums
from lmms_smoothguard.tiny import place

DTYPES = ("auto", "float32", "bfloat16", "float16")
EMBEDDED = "tiny-llava"
GREEDY: Mapping[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
"""What `generate` is told: the likeliest token every time."""


class Reply(NamedTuple):
    """text: stripped; ids: the answer's tokens without prompt and end; verdict: the defence's (`.smoothguard` of one row),
    None for an undefended answer or a defence without a vote."""

    text: str
    ids: tuple[int, ...]
    verdict: Any = None


class Subject:
    """A model and its processor.

    pretrained: a hub id, a directory, or `tiny-llava` for the embedded model; device: None = the GPU if there is one;
    dtype: "auto" is the checkpoint's. Weights are read from safetensors only, and a checkpoint's own code is run only
    where `trust_remote_code` says so. vision_tower, vision_tower_resolution: `source` and `resolution` of
    `encoders.load_vision_tower`, None = the model's own tower. Raises ConfigError for what cannot be loaded.
    """

    tower: TowerProvenance | None = None

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        *,
        trust_remote_code: bool = False,
        vision_tower: str | None = None,
        vision_tower_resolution: str = "model",
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; {did_you_mean(str(dtype), DTYPES)}")
        check_tower(vision_tower, vision_tower_resolution)
        reproducible_sums()
        self.name = str(pretrained)
        self.device = _device(device)
        self.model, self.processor = _load(place(self.name), self.device, dtype, trust_remote_code)
        if vision_tower is not None:
            self.tower = load_vision_tower(self.model, vision_tower, self.processor, vision_tower_resolution)
        hf_integration.enable()
        hf_integration.attach(self.model, self.processor)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of configs and weights, as attacks make it."""
        from lmms_smoothguard.fingerprint import model_fingerprint

        return model_fingerprint(self.model)

    def processing(self) -> dict[str, str | None]:
        """Digests of what makes tokens and pixels of a question: chat_template, tokenizer, processor (its settings and those of
        what is in it); None for what there is none of."""
        return {
            "chat_template": _digest(getattr(self.processor, "chat_template", None)),
            "tokenizer": _digest(_tokenizing(self.tokenizer)),
            "processor": _digest(_settings(self.processor)),
        }

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def inputs(self, question: Question) -> dict[str, torch.Tensor]:
        """The tensors that `generate` takes, batch size 1, on the model's device: pictures first, then the text.

        Through the processor's chat template; without one the prompt is the pictures' tokens, a line break and the text.
        Raises ConfigError where the text itself has tokens that stand for pictures.
        """
        placeholder = image_token(self.processor)
        if placeholder and placeholder in question.text:
            raise ConfigError(
                f"question {question.id!r} has {placeholder} in its text; expected the text alone, pictures are put before it"
            )
        try:
            made = self._prompted(question, placeholder)
        except ValueError as error:
            raise ConfigError(
                f"the processor of {self.name} cannot take question {question.id!r}: {error}; expected one for pictures and text, "
                "with a chat template that has pictures in it"
            ) from error
        if not any(key.startswith("pixel_values") for key in made):
            raise ConfigError(
                f"the processor of {self.name} made no pixels of question {question.id!r}; expected a chat template that takes "
                "pictures"
            )
        return {
            key: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for key, value in made.items()
            if isinstance(value, torch.Tensor) and key != "labels"
        }

    def _prompted(self, question: Question, placeholder: str) -> Mapping[str, Any]:
        images = list(question.images)
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image", "image": image} for image in images]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}]
            made: Mapping[str, Any] = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            return made
        text = f"{placeholder * len(images)}\n{question.text}" if placeholder else question.text
        made = self.processor(images=[images], text=[text], return_tensors="pt")
        return made

    def answer(self, inputs: Mapping[str, Any], max_new_tokens: int = 32, defense: Choice | None = None) -> Reply:
        """The greedy answer, defended or not. Raises UndefendableError where the defence asked for cannot act."""
        with torch.inference_mode(), hf_integration.observe() as seen:
            output = self.model.generate(
                **inputs, **GREEDY, max_new_tokens=max_new_tokens, smoothguard=False if defense is None else defense
            )
        ids = self._without_prompt_and_end(output[0].tolist(), inputs)
        verdicts = [verdict for call in seen.verdicts for verdict in call]
        text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return Reply(text, ids, verdicts[-1] if verdicts else None)

    def _without_prompt_and_end(self, ids: list[int], inputs: Mapping[str, Any]) -> tuple[int, ...]:
        prompt = inputs["input_ids"][0].tolist()
        # Encoder-decoders and a few wrappers around language models give the answer alone.
        answer = ids[len(prompt) :] if ids[: len(prompt)] == prompt else ids
        if is_encoder_decoder(self.model.config):
            answer = answer[1:]  # the decoder's start, which may be the end token too
        ends = self.model.generation_config.eos_token_id
        stop = set(ends if isinstance(ends, list) else [ends])
        return tuple(answer[: next((n for n, token in enumerate(answer) if token in stop), len(answer))])


def image_token(processor: Any) -> str:
    """What stands for a picture in a plain prompt; empty where the processor puts it in by itself."""
    if hasattr(processor, "num_query_tokens"):  # InstructBLIP's and BLIP-2's
        return ""
    token = str(getattr(processor, "boi_token", None) or getattr(processor, "image_token", None) or "")
    if token == "<|image_pad|>":  # Qwen-VL's positions count from the token before it
        return f"<|vision_start|>{token}<|vision_end|>"
    return token


def _digest(parts: Any) -> str | None:
    if not parts:
        return None
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_plain).encode()).hexdigest()[:32]


def _plain(value: Any) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # an address is another one in every process


def _settings(part: Any) -> dict[str, Any]:
    """A processor's, of whatever kind, without where it lies."""
    made = {"class": type(part).__name__, **part.to_dict()}
    for name in ("image_processor", "video_processor", "feature_extractor"):  # not all processors list them
        inner: Any = getattr(part, name, None)
        if hasattr(inner, "to_dict"):
            made[name] = {"class": type(inner).__name__, **inner.to_dict()}
    return {name: value for name, value in made.items() if name not in ("_name_or_path", "name_or_path")}


def _tokenizing(tokenizer: Any) -> list[Any]:
    """What a tokenizer does to a text. Padding and truncation are each call's own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        inside: Any = tokenizer.get_vocab()
    else:
        inside = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return [type(tokenizer).__name__, inside]


def _device(device: str | None) -> torch.device:
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; expected cpu, cuda or cuda:0") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, and torch sees no GPU; expected cpu")
    return found


def _load(where: str, device: torch.device, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(where, trust_remote_code=trust_remote_code)
        model = AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype, device_map=str(device), use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"the model {where!r} cannot be loaded: {str(error).splitlines()[0] if str(error) else type(error).__name__}. "
            f"Expected a hub id, a directory with safetensors weights and a processor, or {EMBEDDED}"
        ) from error
    if not hasattr(processor, "image_processor"):
        raise ConfigError(f"{where!r} has a {type(processor).__name__}; expected a processor of pictures and text")
    return model.eval(), processor
