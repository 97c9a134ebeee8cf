"""The embedded dual encoder: a real CLIPModel around the embedded LLaVA's vision tower, which stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmms_smoothguard.tiny import PLACES, language
from lmms_smoothguard.tiny.model import MODEL_DIR
from lmms_smoothguard.tiny.scenes import COLORS, OBJECTS, SHAPES

if TYPE_CHECKING:
    import torch
    from transformers import CLIPModel, CLIPProcessor

CLIP_DIR = PLACES["tiny-clip"]
"""Where the trained weights, the processor and the model card stand."""

PROMPT = "a photo of {}"
"""The class prompt of zero-shot classification; `{}` is an object with its article."""
WORDINGS = (PROMPT, "{}", "there is {}", "a picture of {}")
"""Everything that training says around a list of objects; `language.caption` is the fifth wording."""

# `</s>` must not be number 2: transformers takes a text model with eos_token_id 2 for a legacy one, which it reads elsewhere.
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_WORDS = ("a", "an", "and", "photo", "picture", "of", "there", "is", "in", "the", "image", ",", ".")
_POSITIONS = 32


def class_prompts() -> list[str]:
    """The prompts of the 30 classes, in the order of OBJECTS."""
    return [PROMPT.format(language.with_article(name)) for name in OBJECTS]


def statement(objects: Sequence[int], wording: int) -> str:
    """A sentence about some objects in one of the wordings, the last of which is the caption of `language`."""
    text = language.caption(objects)
    return WORDINGS[wording].format(text[:-1].lower()) if wording < len(WORDINGS) else text


def build_processor() -> CLIPProcessor:
    """One token a word, whatever its case; pictures as the embedded LLaVA takes them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, CLIPProcessor, PreTrainedTokenizerFast

    words = sorted({*COLORS, *SHAPES, *_WORDS})
    vocabulary = {word: place for place, word in enumerate((*_SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, vocabulary[name]) for name in ("<s>", "</s>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    return CLIPProcessor(CLIPImageProcessor.from_pretrained(MODEL_DIR), fast)


def tower_weights() -> dict[str, torch.Tensor]:
    """The embedded LLaVA's vision tower, by its names in a CLIPVisionModel, without the layer norm that LLaVA never uses."""
    from safetensors.torch import load_file

    from lmms_smoothguard.checkpoints import part

    stored = load_file(MODEL_DIR / "model.safetensors")
    for prefix in (
        "model.vision_tower.vision_model.",
        "model.vision_tower.",
        "vision_tower.vision_model.",
        "vision_tower.",
    ):
        if found := part(stored, prefix):
            return {name: value for name, value in found.items() if not name.startswith("post_layernorm.")}
    raise KeyError(f"no vision tower among the weights in {MODEL_DIR}")


def build_model(processor: CLIPProcessor, seed: int) -> CLIPModel:
    """The dual encoder with the LLaVA's tower in it, the rest drawn from `seed`; what is locked takes no gradient."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    tokenizer = processor.tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_POSITIONS,
        hidden_act="gelu",
        projection_dim=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig.from_pretrained(MODEL_DIR)
    vision.projection_dim = 128
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    locked = tower_weights()
    tower = model.vision_model.state_dict()
    model.vision_model.load_state_dict({**tower, **locked})
    for name, parameter in model.vision_model.named_parameters():
        parameter.requires_grad_(name not in locked)
    return model
