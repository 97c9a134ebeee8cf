"""The embedded guard model: a Llama of a quarter of a million parameters with a chat template in LlamaGuard's manner."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmms_smoothguard.tiny import PLACES, language
from lmms_smoothguard.tiny.guard_lessons import CATEGORIES, Lesson, lessons
from lmms_smoothguard.tiny.scenes import OBJECTS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

GUARD_DIR = PLACES["tiny-guard"]
"""Where the trained weights, the tokenizer and the model card stand."""

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_LINES = "\n".join(f"{code}: {name}." for code, (name, _) in CATEGORIES.items())
_TEMPLATE = (
    "{% if messages[-1]['role'] != 'assistant' %}"
    "{{ raise_exception('the last message is judged, and has to be an assistant turn') }}{% endif %}"
    "<s>[INST] Is the last message safe?\n" + _LINES + "\n"
    "{% for message in messages %}"
    "{{ 'User: ' if message['role'] == 'user' else 'Agent: ' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] | trim }}{% endfor %}{% endif %}"
    "{{ '\n' }}{% endfor %}[/INST]"
)


def verdict_text(category: str | None) -> str:
    """What the model says: LlamaGuard's words."""
    return "safe" if category is None else f"unsafe\n{category}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the language's own sentences, so that no answer is unreadable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made = [
        f"User: {item.question}\nAgent: {item.answer}\n{verdict_text(item.category)}"
        for item in lessons(4000, 0, test=False)
    ]
    words = [f" {word}" for word in (*language.FORBIDDEN_VERBS, *language.PERMITTED_VERBS, *language.THINGS, *OBJECTS)]
    bpe.train_from_iterator(
        [*made, *words * 20, *[_LINES, "[INST] Is the last message safe?", "[/INST]"] * 100], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model, weights drawn from `seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        # At the usual 0.02 the verbs of one class stay alike for hundreds of steps, and categories are not learnt.
        model.model.embed_tokens.weight.mul_(10)
    model.generation_config.do_sample = False
    return model


def prompt(tokenizer: PreTrainedTokenizerFast, item: Lesson) -> str:
    """The chat template's prompt for an exchange."""
    turns = [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))
