from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref

import pytest
import torch

import hf_integration
from lmms_smoothguard import SmoothGuardConfig
from lmms_smoothguard.choice import choose
from lmms_smoothguard.errors import ConfigError, UndefendableError

PIXEL = {"sigma": 0.2, "noise_space": "pixel"}


def verdicts(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 32, "smoothguard": PIXEL} | kwargs
    return model.generate(**inputs, return_dict_in_generate=True, **kwargs).smoothguard


def test_every_copy_answers_as_a_separate_call_would(llava, batch, images):
    """N copies in one batch are N separate calls on separately noised pixels."""
    from lmms_smoothguard.inputs.media import find_images
    from lmms_smoothguard.inputs.statistics import pixel_statistics
    from lmms_smoothguard.noise import NoiseSource

    model, processor = llava
    inputs = batch(0, 1, 2, question="Describe the image.")
    found = verdicts(model, inputs)
    source = NoiseSource(find_images(inputs, model.config), sigma=0.2, statistics=pixel_statistics(model), seed=0)
    for number in range(10):
        pixels = inputs["pixel_values"] if number == 0 else source.copy(number)
        for row in range(3):
            single = {
                "input_ids": inputs["input_ids"][row : row + 1],
                "attention_mask": inputs["attention_mask"][row : row + 1],
                "pixel_values": pixels[row : row + 1],
            }
            plain = model.generate(**single, max_new_tokens=32, smoothguard=False)
            text = processor.decode(plain[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert found[row].texts[number] == text


def test_an_answer_does_not_depend_on_its_neighbours(llava, batch, unchanged_random_state):
    model, _ = llava
    together = verdicts(model, batch(0, 1, 2, 3))
    for row in range(4):
        assert verdicts(model, batch(row))[0] == together[row]


def test_the_chosen_answer_is_what_generate_returns(llava, batch):
    model, processor = llava
    inputs = batch(0, 1, 2, question="Describe the image.")
    out = model.generate(
        **inputs, max_new_tokens=32, smoothguard=PIXEL, return_dict_in_generate=True, output_scores=True
    )
    bare = model.generate(**inputs, max_new_tokens=32, smoothguard=PIXEL)
    assert torch.equal(out.sequences, bare)
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(bare[:, :prompt], inputs["input_ids"])
    for row, verdict in enumerate(out.smoothguard):
        text = processor.decode(bare[row, prompt:], skip_special_tokens=True)
        assert text == verdict.texts[verdict.chosen]
    assert len(out.scores) == bare.shape[1] - prompt
    for step, scores in enumerate(out.scores):
        assert scores.shape == (3, model.config.text_config.vocab_size)
        for row in range(3):
            token = bare[row, prompt + step]
            if token != processor.tokenizer.pad_token_id:
                assert scores[row].argmax() == token


def test_without_noise_it_is_the_plain_answer(llava, batch):
    model, _ = llava
    inputs = batch(0, 1, question="Describe the image.")
    plain = model.generate(**inputs, max_new_tokens=32)
    assert torch.equal(model.generate(**inputs, max_new_tokens=32, smoothguard={"sigma": 0.0}), plain)


def test_it_wins_back_an_attacked_answer(llava, batch, poison_clean_copy):
    """A poisoned clean copy is outvoted: copy 0 here is another picture than the noisy copies see."""
    model, _ = llava
    inputs, other = batch(0, question="Describe the image."), batch(1, question="Describe the image.")
    poison_clean_copy(other["pixel_values"])
    verdict = verdicts(model, inputs, smoothguard=PIXEL | {"sigma": 0.02})[0]
    assert verdict.suspected
    assert verdict.suspicion == 1.0
    assert verdict.chosen != 0


def test_several_images_in_a_prompt(llava, images):
    from lmms_smoothguard.tiny.model import prompt

    model, processor = llava
    text = prompt("Describe the image.").replace("<image>", "<image><image>")
    two = processor(images=[images[0], images[0]], text=text, return_tensors="pt")
    assert two["pixel_values"].shape[0] == 2
    verdict = verdicts(model, two)
    assert len(verdict) == 1
    assert verdict[0].num_samples_used == 10
    mixed = processor(
        images=[images[0], images[0], images[1]],
        text=[text, prompt("Describe the image.")],
        padding=True,
        return_tensors="pt",
    )
    both = verdicts(model, mixed)
    assert both[0] == verdict[0]  # the neighbour changes nothing
    assert (
        both[1]
        == verdicts(model, processor(images=[images[1]], text=prompt("Describe the image."), return_tensors="pt"))[0]
    )


def test_beams_and_sampling(llava, batch):
    model, _ = llava
    inputs = batch(0, 1, question="Describe the image.")
    beams = model.generate(
        **inputs, max_new_tokens=32, num_beams=3, smoothguard=PIXEL, return_dict_in_generate=True, output_scores=True
    )
    assert beams.sequences.shape[0] == 2
    assert beams.sequences_scores.shape == (2,)
    torch.manual_seed(3)
    first = verdicts(model, inputs, do_sample=True, temperature=1.5)
    torch.manual_seed(3)
    assert verdicts(model, inputs, do_sample=True, temperature=1.5) == first


def test_fewer_copies_at_a_time_change_nothing(llava, batch):
    model, _ = llava
    inputs = batch(0, 1, question="Describe the image.")
    whole = verdicts(model, inputs)
    assert verdicts(model, inputs, smoothguard=PIXEL | {"max_copies_per_batch": 3}) == whole


def test_after_out_of_memory_it_goes_on_with_fewer(llava, batch, monkeypatch):
    model, _ = llava
    inputs = batch(0, 1, question="Describe the image.")
    whole, sizes = verdicts(model, inputs), []
    forward = type(model).forward

    @functools.wraps(forward)
    def scarce(self, *args, **kwargs):
        rows = kwargs["input_ids"].shape[0]
        sizes.append(rows)
        if rows > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", scarce)
    assert verdicts(model, inputs) == whole
    assert max(sizes) == 20
    assert sizes[-1] <= 6


def test_other_errors_are_not_taken_for_out_of_memory(llava, batch, monkeypatch):
    model, _ = llava

    @functools.wraps(type(model).forward)
    def broken(self, *args, **kwargs):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(type(model), "forward", broken)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        verdicts(model, batch(0))


def test_text_only_passes_through(llava):
    model, processor = llava
    inputs = processor.tokenizer("<s>USER: hello ASSISTANT:", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, smoothguard=True), plain)


def test_configured_once_overridden_per_call(llava, batch):
    model, _ = llava
    inputs = batch(0)
    plain = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert not hasattr(plain, "smoothguard")
    for value in (True, {"num_samples": 4}, SmoothGuardConfig(num_samples=4)):
        model.generation_config.smoothguard = value
        out = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
        assert out.smoothguard[0].num_samples_used == (10 if value is True else 4)
    more = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, smoothguard={"sigma": 0.3})
    assert more.smoothguard[0].num_samples_used == 4  # the rest of the config stays
    off = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, smoothguard=False)
    assert not hasattr(off, "smoothguard")


def test_a_generation_config_of_the_call_counts(llava, batch):
    from transformers import GenerationConfig

    model, _ = llava
    config = GenerationConfig(max_new_tokens=4, smoothguard={"num_samples": 3}, return_dict_in_generate=True)
    assert model.generate(**batch(0), generation_config=config).smoothguard[0].num_samples_used == 3


def test_positional_inputs(llava, batch):
    model, _ = llava
    inputs = batch(0)
    ids = inputs.pop("input_ids")
    named = model.generate(input_ids=ids, **inputs, max_new_tokens=4, smoothguard=PIXEL)
    assert torch.equal(model.generate(ids, **inputs, max_new_tokens=4, smoothguard=PIXEL), named)


def test_a_misspelt_field_is_refused_when_it_is_set(llava, batch):
    model, _ = llava
    with pytest.raises(ConfigError, match="did you mean 'sigma'"):
        model.generation_config.smoothguard = {"sigm": 0.1}
    with pytest.raises(ConfigError, match="did you mean 'sigma'"):
        model.generate(**batch(0), smoothguard={"sigm": 0.1})


def test_survives_save_and_load(llava, tmp_path):
    from transformers import AutoModelForImageTextToText, GenerationConfig

    model, _ = llava
    model.generation_config.smoothguard = SmoothGuardConfig(sigma=0.15)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert choose(again.generation_config.smoothguard) == choose(SmoothGuardConfig(sigma=0.15))
    derived = GenerationConfig.from_model_config(model.config)
    derived.smoothguard = {"sigma": 0.15}
    derived.save_pretrained(tmp_path / "alone")
    assert GenerationConfig.from_pretrained(tmp_path / "alone").smoothguard == {"sigma": 0.15}


def test_disable_restores_everything_and_enable_is_idempotent():
    from transformers import Blip2ForConditionalGeneration, GenerationConfig, GenerationMixin

    hf_integration.disable()
    try:
        owners = (GenerationMixin, Blip2ForConditionalGeneration)
        before = [owner.__dict__["generate"] for owner in owners] + [GenerationMixin.generate_batch]
        assert not any(hasattr(function, "__smoothguard_original__") for function in before)
        hf_integration.enable()
        hf_integration.enable()
        for owner, original in zip(owners, before, strict=False):
            wrapped = owner.__dict__["generate"]
            assert wrapped.__smoothguard_original__ is original

        class Late(GenerationMixin):
            def generate(self):
                return "late"

        assert hasattr(Late.__dict__["generate"], "__smoothguard_original__")
        hf_integration.disable()
        hf_integration.disable()
        after = [owner.__dict__["generate"] for owner in owners] + [GenerationMixin.generate_batch]
        assert after == before
        assert Late().generate() == "late"
        assert "smoothguard" not in GenerationConfig.__dict__
        assert not hasattr(Late.__dict__["generate"], "__smoothguard_original__")
    finally:
        hf_integration.enable()


def test_threads_do_not_mix(llava, batch):
    model, _ = llava
    inputs = [batch(n) for n in range(4)]
    alone = [verdicts(model, item) for item in inputs]
    found: dict[int, object] = {}

    def work(number):
        if number % 2:
            found[number] = [verdicts(model, inputs[number]) for _ in range(4)]
        else:  # undefended calls in between
            found[number] = [
                hasattr(model.generate(**inputs[number], max_new_tokens=4, return_dict_in_generate=True), "smoothguard")
                for _ in range(8)
            ]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (1, 3):
        assert found[number] == [alone[number]] * 4
    for number in (0, 2):
        assert found[number] == [False] * 8


def test_a_streamer_gets_the_chosen_answer(llava, batch):
    from transformers import TextIteratorStreamer

    model, processor = llava
    inputs = batch(0, question="Describe the image.")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = model.generate(**inputs, max_new_tokens=32, smoothguard=PIXEL, streamer=streamer)
    text = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(streamer) == text
    with pytest.raises(UndefendableError, match="one row"):
        model.generate(**batch(0, 1), smoothguard=PIXEL, streamer=streamer)


def test_a_class_with_its_own_generate_is_defended():
    """BLIP-2 overrides generate and answers without repeating the prompt."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ).to_dict(),
        qformer_config=Blip2QFormerConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            encoder_hidden_size=16,
            vocab_size=40,
        ).to_dict(),
        text_config=OPTConfig(
            vocab_size=40,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=64,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        ).to_dict(),
        num_query_tokens=4,
        image_token_index=39,
    )
    model = Blip2ForConditionalGeneration(config).eval()
    inputs = {
        "pixel_values": torch.randn(2, 3, 16, 16),
        "input_ids": torch.tensor([[39] * 4 + [2, 5, 6]] * 2),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
    }
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    same = model.generate(**inputs, max_new_tokens=5, do_sample=False, smoothguard={"sigma": 0.0})
    assert torch.equal(plain, same)
    out = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, smoothguard={"sigma": 2.0}, return_dict_in_generate=True
    )
    assert len(out.smoothguard) == 2
    assert out.sequences.shape[0] == 2


def test_observation_counts_calls_and_keeps_errors(llava, batch):
    model, _ = llava
    with hf_integration.observe() as seen:
        model.generate(**batch(0), max_new_tokens=4)
        model.generate(**batch(0), max_new_tokens=4, smoothguard=True)
        with pytest.raises(UndefendableError):
            model.generate(**batch(0), max_new_tokens=4, smoothguard=True, num_return_sequences=2, num_beams=2)
    assert seen.defended == 1
    assert len(seen.verdicts) == 1
    assert isinstance(seen.error, UndefendableError)


def test_a_positional_generation_config_counts(llava, batch):
    from transformers import GenerationConfig

    model, _ = llava
    inputs = batch(0)
    ids = inputs.pop("input_ids")
    config = GenerationConfig(max_new_tokens=4, smoothguard={"num_samples": 3}, return_dict_in_generate=True)
    assert model.generate(ids, config, **inputs).smoothguard[0].num_samples_used == 3
    with pytest.raises(UndefendableError, match="bypasses generate"):
        model.generate_batch([[1, 2]], config)


def test_a_model_inside_another_models_generate_is_defended(llava, batch):
    """Omni models answer through a thinker of their own."""
    import copy

    from transformers import GenerationMixin

    model, _ = llava
    inner = copy.deepcopy(model)
    inner.generation_config.smoothguard = {"num_samples": 3}

    class Outer(GenerationMixin):
        generation_config = model.generation_config

        def generate(self, **kwargs):
            return inner.generate(**kwargs)

    out = Outer().generate(**batch(0), max_new_tokens=4, return_dict_in_generate=True)
    assert out.smoothguard[0].num_samples_used == 3


@pytest.mark.parametrize("outer", ["defended", "plain", "text"])
def test_a_call_from_within_another_models_call_is_a_request_of_its_own(llava, batch, outer):
    """A stopping criterion asks a second model, whose generation config asks for the defence."""
    model, processor = llava
    other = copy.deepcopy(model)
    hf_integration.attach(other, processor)
    other.generation_config.smoothguard = PIXEL
    asked = []

    def ask(ids, scores, **kwargs):
        if not asked:
            asked.append(other.generate(**batch(1), max_new_tokens=4, return_dict_in_generate=True))
        return torch.zeros(len(ids), dtype=torch.bool)

    inputs = batch(0) if outer != "text" else processor(text="Describe", return_tensors="pt")
    config = {"defended": PIXEL, "plain": False, "text": PIXEL}[outer]
    with hf_integration.observe() as seen:
        model.generate(**inputs, max_new_tokens=4, smoothguard=config, stopping_criteria=[ask])
    assert len(asked[0].smoothguard[0].candidates) == 10
    assert seen.defended == (2 if outer == "defended" else 1)


def test_a_request_with_an_image_from_within_the_models_own_text_call_is_defended(llava, batch):
    model, processor = llava
    model.generation_config.smoothguard = PIXEL
    asked = []

    def ask(ids, scores, **kwargs):
        if not asked:
            asked.append(model.generate(**batch(1), max_new_tokens=4, return_dict_in_generate=True))
        return torch.zeros(len(ids), dtype=torch.bool)

    model.generate(**processor(text="Describe", return_tensors="pt"), max_new_tokens=3, stopping_criteria=[ask])
    assert len(asked[0].smoothguard[0].candidates) == 10


def test_an_end_token_that_the_call_switches_off_cuts_no_answer(llava, batch):
    model, _ = llava
    plain = model.generate(**batch(0), max_new_tokens=12, eos_token_id=None, smoothguard=False)
    out = model.generate(**batch(0), max_new_tokens=12, eos_token_id=None, smoothguard=PIXEL | {"sigma": 0.0})
    assert torch.equal(out, plain)


def test_a_batchs_cache_is_let_go_before_the_next_batch(llava, batch):
    """Otherwise max_copies_per_batch would save no memory."""
    model, _ = llava
    caches, alive = [], []

    def watch(module, args, out):
        if not any(seen() is out.past_key_values for seen in caches):
            caches.append(weakref.ref(out.past_key_values))
            gc.collect()
            alive.append(sum(seen() is not None for seen in caches))

    hook = model.register_forward_hook(watch)
    try:
        verdicts(model, batch(0), smoothguard=PIXEL | {"max_copies_per_batch": 2})
    finally:
        hook.remove()
    assert alive == [1] * 5


def test_generation_code_of_a_checkpoint_refuses(llava, monkeypatch):
    """transformers puts it on the instance, where no class-level override sees it."""
    from transformers import GenerationMixin

    class Custom(GenerationMixin):
        generation_config = None

    hf_integration.disable()
    try:
        monkeypatch.setattr(
            GenerationMixin, "adjust_generation_fn", lambda self: setattr(self, "generate", lambda **k: "custom")
        )
        hf_integration.enable()
        model = Custom()
        model.adjust_generation_fn()
        assert model.generate() == "custom"
        with pytest.raises(UndefendableError, match="generation code of its own"):
            model.generate(smoothguard=True)
    finally:
        hf_integration.disable()
        monkeypatch.undo()
        hf_integration.enable()


def test_a_rows_constraint_holds_for_all_its_copies(llava, batch):
    model, processor = llava
    yes, no = (processor.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    allowed = {0: [yes], 1: [no]}
    found = verdicts(model, batch(0, 1), max_new_tokens=1, prefix_allowed_tokens_fn=lambda row, ids: allowed[row])
    assert set(found[0].candidates) == {(yes,)}
    assert set(found[1].candidates) == {(no,)}


def test_observers_of_equal_content_are_told_apart(llava, batch):
    model, _ = llava
    with hf_integration.observe() as outer:
        with hf_integration.observe():
            pass
        model.generate(**batch(0), max_new_tokens=4, smoothguard=True)
    assert outer.defended == 1
    assert len(outer.verdicts) == 1


def test_in_a_batch_each_row_gets_its_own_chosen_copy(llava, batch, poison_clean_copy):
    """Poisoned clean copies, so that what is chosen is not copy 0, whose rows happen to come first."""
    model, processor = llava
    inputs, others = (batch(*rows, question="Describe the image.") for rows in ((0, 1, 2), (3, 4, 5)))
    poison_clean_copy(others["pixel_values"])
    config = PIXEL | {"sigma": 0.02}
    out = model.generate(**inputs, max_new_tokens=32, smoothguard=config, return_dict_in_generate=True)
    prompt = inputs["input_ids"].shape[1]
    for row, verdict in enumerate(out.smoothguard):
        assert verdict.chosen > 0
        assert processor.decode(out.sequences[row, prompt:], skip_special_tokens=True) == verdict.texts[verdict.chosen]
