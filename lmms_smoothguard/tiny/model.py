"""A small real LLaVA: its processor and its untrained model."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from lmms_smoothguard.tiny import PLACES, language
from lmms_smoothguard.tiny.scenes import GRID, OBJECTS, SIZE

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

MODEL_DIR = PLACES["tiny-llava"]
"""Where the trained weights, the processor and the model card stand."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<s>USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _corpus() -> list[str]:
    questions = [f"USER: \n{language.existence_question(o)} ASSISTANT: Yes" for o in range(len(OBJECTS))]
    questions += [q.replace(" ASSISTANT: Yes", f"{language.POPE_SUFFIX} ASSISTANT: No") for q in questions]
    captions = [
        f"\n{wording} ASSISTANT: {language.caption(pair)}"
        for wording in language.DESCRIBE
        for pair in itertools.combinations(range(len(OBJECTS)), 2)
    ]
    requests = [
        f"\n{language.request(verb, thing, form)} ASSISTANT: {language.compliance(verb, thing)} {language.REFUSAL}"
        for verb in language.FORBIDDEN_VERBS + language.PERMITTED_VERBS
        for thing in language.THINGS
        for form in range(len(language.REQUESTS))
    ]
    return questions + captions + requests


def build_processor() -> LlavaProcessor:
    """Byte-level BPE on the project's own sentences, one token for an object's whole name, square images, mean = std = .5.

    With two tokens a name, existence questions stayed at chance for thousands of steps.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(f" {name}", normalized=False, special=False) for name in OBJECTS])
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=SIZE // GRID,
        vision_feature_select_strategy="default",
        chat_template=_CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """The untrained model, 2.6 M parameters, weights drawn from `seed`."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=SIZE,
        patch_size=SIZE // GRID,
        hidden_act="gelu",
        projection_dim=192,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id, generation.do_sample = tokenizer.pad_token_id, False
    return model


def prompt(text: str) -> str:
    """What the processor's chat template makes of one user turn with one image."""
    return f"<s>USER: <image>\n{text} ASSISTANT:"
