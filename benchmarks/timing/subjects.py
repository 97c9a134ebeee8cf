"""The models that are timed and the requests that are put to them.

Only the embedded model is trained. The others have random weights: they cost what a model of their size costs, and
what they answer means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from lmms_smoothguard.errors import SmoothGuardError, did_you_mean
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.model import MODEL_DIR, prompt
from lmms_smoothguard.tiny.scenes import make_scenes

SCENE_SEED = 9_301  # no scene of training, tests or attacks
MIXED, QUESTIONS, CAPTIONS = "questions and captions in turn", "yes / no questions", "captions"


@dataclass(frozen=True)
class Shape:
    """A LLaVA's size: `vision_*` of its CLIP tower, the rest of its Llama; `image` and `patch` in pixels."""

    image: int
    patch: int
    vision_width: int
    vision_inner: int
    vision_layers: int
    vision_heads: int
    width: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    positions: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def image_tokens(self) -> int:
        """Image tokens in a prompt."""
        return (self.image // self.patch) ** 2


NINE_MILLION = Shape(
    image=168, patch=14, vision_width=256, vision_inner=1024, vision_layers=5, vision_heads=4,
    width=256, inner=688, layers=6, heads=8, vocabulary=544, positions=512,
)  # fmt: skip
LLAVA_7B = Shape(
    image=336, patch=14, vision_width=1024, vision_inner=4096, vision_layers=24, vision_heads=16,
    width=4096, inner=11008, layers=32, heads=32, vocabulary=32064, positions=4096,
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is timed. `processor` makes its inputs; `tokenizer` is None where its answers cannot be decoded."""

    name: str
    about: str
    model: Any
    processor: Any
    tokenizer: Any
    image_tokens: int

    def facts(self) -> dict[str, Any]:
        """What a result says of the model."""
        parameters = list(self.model.parameters())
        return {
            "about": self.about,
            "parameters": sum(parameter.numel() for parameter in parameters),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "image_tokens": self.image_tokens,
        }

    def attach(self) -> None:
        """Tells the defence the processor, so that it looks for nothing on the disk."""
        import hf_integration

        hf_integration.enable()
        hf_integration.attach(self.model, self.processor if self.tokenizer else self.processor.image_processor)


def processor_for(shape: Shape) -> Any:
    """The embedded model's tokenizer with images of `shape`: ids are those of the embedded vocabulary."""
    from transformers import AutoProcessor, CLIPImageProcessor, LlavaProcessor

    base = AutoProcessor.from_pretrained(MODEL_DIR)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": shape.image},
        crop_size={"height": shape.image, "width": shape.image},
        image_mean=list(shape.mean),
        image_std=list(shape.std),
    )
    return LlavaProcessor(
        image_processor,
        base.tokenizer,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        chat_template=base.chat_template,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def random_llava(shape: Shape, processor: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A LlavaForConditionalGeneration of `shape` whose weights are drawn on `device` in `dtype`, seed 0."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = processor.tokenizer
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_inner,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image,
        patch_size=shape.patch,
        projection_dim=shape.vision_width,
    )
    text = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=shape.image_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    devices = [torch.device(device)] if device.startswith("cuda") else []
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)  # a cast afterwards would hold 7B parameters twice
        try:
            model = LlavaForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(before)
    for name, value in special.items():
        setattr(model.generation_config, name, value)
    model.generation_config.do_sample = False
    return model


def _embedded(device: str) -> Subject:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(MODEL_DIR).eval().to(device)
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    about = "the embedded LLaVA, trained"
    return Subject("embedded", about, model, processor, processor.tokenizer, model.config.image_seq_length)


def _nine_million(device: str) -> Subject:
    processor = processor_for(NINE_MILLION)
    model = random_llava(NINE_MILLION, processor, device)
    about = "a LLaVA with random weights"
    return Subject("random-9m", about, model, processor, processor.tokenizer, NINE_MILLION.image_tokens)


def llava_7b(device: str, shape: Shape = LLAVA_7B) -> Subject:
    """LLaVA-1.5-7B's architecture with random weights in bf16; another `shape` is for trying the path on a CPU."""
    processor = processor_for(shape)
    model = random_llava(shape, processor, device, torch.bfloat16)
    about = "LLaVA-1.5-7B's architecture, random weights"
    # Its vocabulary is larger than the tokenizer's, so answers are compared as token ids.
    return Subject("llava-1.5-7b", about, model, processor, None, shape.image_tokens)


_MAKERS: dict[str, Callable[[str], Subject]] = {
    "embedded": _embedded,
    "random-9m": _nine_million,
    "llava-1.5-7b": llava_7b,
}


def load(name: str, device: str = "cpu") -> Subject:
    """The subject of that name, attached to the defence. Raises SmoothGuardError for an unknown one."""
    if name not in _MAKERS:
        raise SmoothGuardError(f"unknown model {name!r}; {did_you_mean(name, _MAKERS)}")
    subject = _MAKERS[name](device)
    subject.attach()
    return subject


def requests(subject: Subject, count: int, kind: str = MIXED) -> Sequence[dict[str, torch.Tensor]]:
    """`count` requests of one row each, every one about a clean scene of its own; `kind`: MIXED, QUESTIONS or CAPTIONS."""
    scenes = make_scenes(count, SCENE_SEED)
    made = []
    for number in range(count):
        present = scenes.present(number)
        asks = kind == QUESTIONS or (kind == MIXED and number % 2 == 0)
        text = language.existence_question(present[0]) if asks else language.DESCRIBE[0]
        inputs = subject.processor(
            images=[Image.fromarray(scenes.images[number])], text=[prompt(text)], return_tensors="pt"
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(subject.model.dtype)
        made.append(dict(inputs.to(subject.model.device)))
    return made
