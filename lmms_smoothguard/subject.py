"""A model under test without a harness: loaded for real, asked through its own processor, answering greedily.

subject = Subject("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
inputs = subject.inputs(question)
reply = subject.answer(inputs, max_new_tokens=32, defense=choose({"sigma": 0.2}))
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

import hf_integration
from hf_integration.protecting import extractor_of
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.encoders import TowerProvenance, check_tower, load_vision_tower
from lmms_smoothguard.errors import ConfigError, UndefendableError, did_you_mean
from lmms_smoothguard.evaluation.questions import Question
from lmms_smoothguard.hearing import audio_token, drops_the_end, heard_seconds
from lmms_smoothguard.inputs.carried import CLIPS
from lmms_smoothguard.inputs.fitting import is_encoder_decoder
from lmms_smoothguard.inputs.media import AUDIO_KEYS
from lmms_smoothguard.model_loading import device_of, load_model
from lmms_smoothguard.processing import processing_digests
from lmms_smoothguard.reproducible import reproducible_sums
from lmms_smoothguard.sounds import Sound
from lmms_smoothguard.tiny import place

EMBEDDED = "tiny-llava"
DTYPES = ("auto", "float32", "bfloat16", "float16")
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

    pretrained: a hub id, a directory, or the name of an embedded model (`tiny-llava`); device: None = the GPU if there is one;
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
        self.device = device_of(device)
        self.model, self.processor = load_model(place(self.name), self.device, dtype, trust_remote_code)
        if vision_tower is not None:
            self.tower = load_vision_tower(self.model, vision_tower, self.processor, vision_tower_resolution)
        hf_integration.enable()
        hf_integration.attach(self.model, self.processor)
        if extractor_of(self.processor) is not None:
            hf_integration.protect(self.processor)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of configs and weights, as attacks make it."""
        from lmms_smoothguard.fingerprint import model_fingerprint

        return model_fingerprint(self.model)

    def processing(self) -> dict[str, str | None]:
        """Digests of what makes tokens and pixels of a question: chat_template, tokenizer, processor (its settings and those of
        what is in it); None for what there is none of."""
        return processing_digests(self.processor)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def sounds(self, question: Question) -> tuple[Sound, ...]:
        """The question's sounds at the model's rate, as the processor gets them. Raises ConfigError for a model without one."""
        if not question.sounds:
            return ()
        extractor = extractor_of(self.processor)
        if extractor is None:
            raise ConfigError(
                f"question {question.id!r} has sounds, and {self.name} has a {type(self.processor).__name__}, which takes none; "
                "expected a model that hears"
            )
        return tuple(sound.at(int(extractor.sampling_rate)) for sound in question.sounds)

    def inputs(self, question: Question) -> dict[str, Any]:
        """What `generate` takes, batch size 1, tensors on the model's device: pictures first, then sounds, then the text.

        Through the processor's chat template; without one the prompt is the tokens of pictures and sounds, a line break and the
        text. With sounds there is, beside the tensors, what a defence needs of them (`inputs.carried.CLIPS`).
        Raises ConfigError where the text itself has tokens that stand for pictures or sounds, for pictures or sounds that the
        model does not take, and for a sound whose end its processor would drop.
        """
        self._check_text(question)
        sounds = self.sounds(question)
        made = self._made(question, sounds)
        for kind, there, found in (
            ("pixels", question.images, any(key.startswith("pixel_values") for key in made)),
            ("features of the sounds", sounds, any(key in AUDIO_KEYS for key in made)),
        ):
            if there and not found:
                raise ConfigError(
                    f"the processor of {self.name} made no {kind} of question {question.id!r}; expected a chat template that takes "
                    f"{'pictures' if there is question.images else 'sounds'}"
                )
        self._check_heard(question, sounds)
        return {
            key: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in made.items()
            if key == CLIPS or (isinstance(value, torch.Tensor) and key != "labels")
        }

    def _check_text(self, question: Question) -> None:
        for token, kind in (
            (image_token(self.processor), "pictures"),
            (getattr(self.processor, "audio_token", None), "sounds"),
        ):
            if token and token in question.text:
                raise ConfigError(
                    f"question {question.id!r} has {token} in its text; expected the text alone, {kind} are put before it"
                )

    def _check_heard(self, question: Question, sounds: tuple[Sound, ...]) -> None:
        for slot, sound in enumerate(sounds):

            def replaced(other: Sound, slot: int = slot) -> Mapping[str, Any]:
                return self._made(question, (*sounds[:slot], other, *sounds[slot + 1 :]))

            if drops_the_end(self.processor, sound, replaced):
                most = heard_seconds(self.processor)
                heard = "a part of it" if most is None else f"its first {most:g} seconds"
                raise ConfigError(
                    f"sound {slot + 1} of question {question.id!r} lasts {sound.seconds:g} seconds, of which {self.name} hears {heard} "
                    f"alone; expected at most {'that' if most is None else f'{most:g} seconds'}. Cut it into parts"
                )

    def _made(self, question: Question, sounds: tuple[Sound, ...]) -> Mapping[str, Any]:
        try:
            made = self._prompted(question, sounds)
            if CLIPS in made and (problem := made[CLIPS].problem):
                raise UndefendableError(problem)
            return made
        except UndefendableError as error:
            raise ConfigError(f"question {question.id!r} cannot be asked of {self.name}: {error}") from error
        except ValueError as error:
            kind = "pictures" if not sounds else "sounds" if not question.images else "pictures, sounds"
            raise ConfigError(
                f"the processor of {self.name} cannot take question {question.id!r}: {error}; expected one for {kind} and text, "
                f"with a chat template that has {kind.replace(',', ' and')} in it"
            ) from error

    def _prompted(self, question: Question, sounds: tuple[Sound, ...]) -> Mapping[str, Any]:
        images, waves = list(question.images), [sound.samples for sound in sounds]
        if getattr(self.processor, "chat_template", None):
            content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
            content += [{"type": "audio", "audio": wave} for wave in waves]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}]
            made: Mapping[str, Any] = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            return made
        tokens = image_token(self.processor) * len(images) + audio_token(self.processor) * len(waves)
        text = f"{tokens}\n{question.text}" if tokens else question.text
        given: dict[str, Any] = {"images": [images]} if images else {}
        if waves:
            given |= {"audio": waves, "audio_kwargs": {"sampling_rate": sounds[0].rate}}
        made = self.processor(text=[text], return_tensors="pt", **given)
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
