"""What people put around `generate`: pipelines, stop strings, caches, compiled, adapted, placed and half-precision models, questions
from within a call, and functions of their own in its place."""

from __future__ import annotations

import copy
import functools
import inspect
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import GenerationMixin

import hf_integration
from lmms_smoothguard.defenses.request import SmoothGuardOutput
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.tiny.model import MODEL_DIR

PIXEL = {"sigma": 0.2, "noise_space": "pixel"}
LEVELS = [PIXEL, PIXEL | {"level": "token"}]
DESCRIBE = "Describe the image."


def answer(model, inputs, config=PIXEL, **kwargs):
    out = model.generate(**inputs, smoothguard=config, return_dict_in_generate=True, **{"max_new_tokens": 32, **kwargs})
    return out.sequences, out.smoothguard


@pytest.mark.parametrize("config", LEVELS)
def test_pipeline(llava, images, config):
    """`pipeline("image-text-to-text")` calls generate with keyword arguments of its own."""
    from transformers import pipeline

    model, processor = llava
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": DESCRIBE}],
        }
    ]
    with hf_integration.observe() as seen:
        plain = pipe(text=messages, max_new_tokens=32, return_full_text=False)[0]["generated_text"]
    assert seen.defended == 0
    with hf_integration.observe() as seen:
        found = pipe(text=messages, max_new_tokens=32, return_full_text=False, generate_kwargs={"smoothguard": config})
    assert seen.defended == 1
    assert found[0]["generated_text"] == plain
    model.generation_config.smoothguard = config
    with hf_integration.observe() as seen:
        pipe(text=messages, max_new_tokens=32, return_full_text=False)
    assert seen.defended == 1


@pytest.mark.parametrize("config", LEVELS)
def test_stop_strings(llava, batch, config):
    model, processor = llava
    inputs = batch(1, 2, question=DESCRIBE)
    prompt = inputs["input_ids"].shape[1]
    kwargs = {"stop_strings": [","], "tokenizer": processor.tokenizer, "max_new_tokens": 32}
    plain = model.generate(**inputs, **kwargs)
    sequences, verdicts = answer(model, inputs, config | {"sigma": 0.0}, **kwargs)
    assert torch.equal(sequences, plain)
    assert any(
        row.rstrip().endswith(",") for row in processor.batch_decode(plain[:, prompt:], skip_special_tokens=True)
    )
    sequences, verdicts = answer(model, inputs, config, **kwargs)
    for verdict in verdicts:
        assert all(text.count(",") <= 1 and not text.rstrip(",").count(",") for text in verdict.texts)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.5},
        {"cache_implementation": "static"},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 12},
        {"use_cache": False},
    ],
)
def test_settings_hold_for_every_copy(llava, batch, kwargs):
    """Each copy's answer is a separate call's with the same setting."""
    from lmms_smoothguard.inputs.media import find_images
    from lmms_smoothguard.inputs.statistics import pixel_statistics
    from lmms_smoothguard.noise import NoiseSource

    model, processor = llava
    inputs = batch(0, 1, question=DESCRIBE)
    prompt = inputs["input_ids"].shape[1]
    _, verdicts = answer(model, inputs, PIXEL | {"num_samples": 4}, **kwargs)
    source = NoiseSource(find_images(inputs, model.config), sigma=0.2, statistics=pixel_statistics(model), seed=0)
    for number in range(4):
        pixels = inputs["pixel_values"] if number == 0 else source.copy(number)
        plain = model.generate(**{**inputs, "pixel_values": pixels}, max_new_tokens=32, **kwargs)
        texts = processor.batch_decode(plain[:, prompt:], skip_special_tokens=True)
        assert [verdict.texts[number] for verdict in verdicts] == texts


@pytest.mark.parametrize("early_stop", ["exact", 0.01])
def test_early_stopping_gives_the_answer_of_all_copies(llava, batch, early_stop):
    """For requests of one row and together: rows are settled one by one and do not depend on each other."""
    model, _ = llava
    everything = batch(*range(8), question=DESCRIBE)
    full, _ = answer(model, everything)
    stopped, verdicts = answer(model, everything, PIXEL | {"early_stop": early_stop})
    assert torch.equal(stopped, full)
    used = [verdict.num_samples_used for verdict in verdicts]
    assert min(used) == (6 if early_stop == "exact" else 5)
    assert len(verdicts[0].candidates) == used[0]
    for row in range(8):
        _, alone = answer(model, batch(row, question=DESCRIBE), PIXEL | {"early_stop": early_stop})
        assert alone[0] == verdicts[row]


def test_early_stopping_answers_no_more_copies_than_it_needs(llava, batch):
    """Images that pass the vision tower, batch by batch."""
    model, _ = llava
    batches, seen = [], set()
    tower = model.model.vision_tower
    hook = tower.register_forward_hook(lambda module, args, kwargs, out: batches.append(len(out[0])), with_kwargs=True)
    try:
        for number in range(6):
            batches.clear()
            _, verdicts = answer(model, batch(number, question=DESCRIBE), PIXEL | {"early_stop": "exact"})
            assert batches == ([6] if verdicts[0].num_samples_used == 6 else [6, 4])
            seen.add(len(batches))
    finally:
        hook.remove()
    assert seen == {1, 2}


def test_bf16_flips_few_answers(trained, scenes, images):
    """Per copy, against fp32; the measured rate is in benchmarks/results/precision.json."""
    from transformers import AutoModelForImageTextToText

    from lmms_smoothguard.tiny.model import prompt

    model, processor = trained
    half = AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).eval()
    inputs = processor(images=images, text=[prompt(DESCRIBE)] * len(images), padding=True, return_tensors="pt")
    _, exact = answer(model, inputs)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    _, rough = answer(half, inputs)
    pairs = [
        (a, b) for one, other in zip(exact, rough, strict=True) for a, b in zip(one.texts, other.texts, strict=True)
    ]
    assert sum(a != b for a, b in pairs) <= 0.1 * len(pairs)


@pytest.mark.parametrize("how", [pytest.param("forward", marks=pytest.mark.slow), "module"])
def test_compiled_models(trained, batch, how):
    model = copy.deepcopy(trained[0])
    hf_integration.attach(model, trained[1])
    inputs = batch(0, question=DESCRIBE)
    expected = answer(model, inputs, PIXEL | {"num_samples": 4}, max_new_tokens=6)
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="aot_eager", dynamic=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    sequences, verdicts = answer(compiled, inputs, PIXEL | {"num_samples": 4}, max_new_tokens=6)
    assert torch.equal(sequences, expected[0])
    assert verdicts == expected[1]


@pytest.mark.slow
def test_compiled_with_inductor_and_a_static_cache(trained, batch):
    model = copy.deepcopy(trained[0])
    hf_integration.attach(model, trained[1])
    inputs = batch(0, question=DESCRIBE)
    expected = answer(model, inputs, PIXEL | {"num_samples": 4}, max_new_tokens=6)
    model.forward = torch.compile(model.forward, mode="reduce-overhead")
    sequences, verdicts = answer(
        model, inputs, PIXEL | {"num_samples": 4}, max_new_tokens=6, cache_implementation="static"
    )
    assert torch.equal(sequences, expected[0])
    assert verdicts == expected[1]


def test_peft_wrapped_models(trained, batch):
    peft = pytest.importorskip("peft")
    model, processor = copy.deepcopy(trained[0]), trained[1]
    model.name_or_path = ""  # no directory to find a tokenizer in
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_alpha=200, init_lora_weights=False)
    )
    hf_integration.attach(adapted, processor)
    inputs = batch(0, 1, question=DESCRIBE)
    plain = adapted.generate(**inputs, max_new_tokens=8)
    assert not torch.equal(plain, trained[0].generate(**inputs, max_new_tokens=8))  # the adapter is at work
    sequences, verdicts = answer(adapted, inputs, PIXEL | {"sigma": 0.0}, max_new_tokens=8)
    assert torch.equal(sequences, plain)
    assert verdicts[0].texts is not None  # what was attached to the wrapper is known to the model inside
    adapted.generation_config.smoothguard = PIXEL | {"num_samples": 3}
    with hf_integration.observe() as seen:
        adapted.generate(**inputs, max_new_tokens=4)
    assert [v.num_samples_used for v in seen.verdicts[0]] == [3, 3]


def test_models_placed_by_a_device_map(trained, batch, tmp_path):
    """Layers offloaded to disk, with accelerate's hooks on forward."""
    from transformers import AutoModelForImageTextToText

    model, _ = trained
    names = [name for name, _ in model.model.named_children()]
    placed = AutoModelForImageTextToText.from_pretrained(
        MODEL_DIR,
        device_map={"lm_head": "cpu"}
        | {f"model.{name}": "disk" if name == "vision_tower" else "cpu" for name in names},
        offload_folder=tmp_path,
    )
    assert placed.hf_device_map["model.vision_tower"] == "disk"
    inputs = batch(0, 1, question=DESCRIBE)
    assert answer(placed, inputs)[1] == answer(model, inputs)[1]


def test_a_config_without_the_override_is_no_defence_and_says_nothing():
    """The README warns of it; held here so that the warning stays true."""
    script = f"""
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(MODEL_DIR)!r})
model.generation_config.smoothguard = True
ids = torch.tensor([[1] + [model.config.image_token_id] * 64 + [5]])
request = dict(input_ids=ids, pixel_values=torch.zeros(1, 3, 64, 64), max_new_tokens=2, return_dict_in_generate=True)
print(hasattr(model.generate(**request), "smoothguard"))
import hf_integration
print(hasattr(model.generate(**request), "smoothguard"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["False", "True"]


def test_verdicts_are_plain_values(llava, batch):
    """A verdict can be compared, hashed and pickled by process pools: no tensors in it."""
    model, _ = llava
    for config in LEVELS:
        verdict = answer(model, batch(0), config)[1][0]
        assert isinstance(verdict, SmoothGuardOutput)
        assert hash(verdict) == hash(copy.deepcopy(verdict))


# -- questions from within a call --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [PIXEL, False, None, "text"])
def test_whoever_names_the_defence_gets_it_from_within_any_call(llava, batch, outer):
    """Stopping criteria ask the same model about other pictures, and those of that call ask once more: every one is answered once."""
    model, processor = llava
    asked = []

    def criterion(depth):
        def ask(ids, scores, **kwargs):
            if len(asked) < depth:
                asked.append(None)
                further = [criterion(depth + 1)] if depth < 3 else None
                out = model.generate(
                    **batch(depth),
                    max_new_tokens=2,
                    smoothguard=PIXEL | {"num_samples": 2 + depth},
                    return_dict_in_generate=True,
                    stopping_criteria=further,
                )
                asked[depth - 1] = len(out.smoothguard[0].candidates)
            return torch.zeros(len(ids), dtype=torch.bool)

        return ask

    inputs = batch(0) if outer != "text" else processor(text="Describe", return_tensors="pt")
    config = True if outer == "text" else outer
    with hf_integration.observe() as seen:
        model.generate(**inputs, max_new_tokens=2, smoothguard=config, stopping_criteria=[criterion(1)])
    assert asked == [3, 4, 5]
    assert seen.defended == 3 + (outer == PIXEL)


def test_a_generation_config_that_names_the_defence_counts_from_within_a_call_without_one(llava, batch):
    from transformers import GenerationConfig

    model, _ = llava
    config = GenerationConfig(max_new_tokens=2, smoothguard={"num_samples": 3}, return_dict_in_generate=True)
    asked = []

    def ask(ids, scores, **kwargs):
        if not asked:
            asked.append(model.generate(**batch(1), generation_config=config))
        return torch.zeros(len(ids), dtype=torch.bool)

    model.generate(**batch(0), max_new_tokens=2, stopping_criteria=[ask])
    assert len(asked[0].smoothguard[0].candidates) == 3


class Asking:
    """A streamer that asks a new question when it is told of a token, or of the end."""

    def __init__(self, when, ask):
        self.when, self.ask, self.answers = when, ask, []

    def put(self, value):
        if self.when == "put" and not self.answers:
            self.answers.append(self.ask())

    def end(self):
        if self.when == "end":
            self.answers.append(self.ask())


@pytest.mark.parametrize("when", ["put", "end"])
@pytest.mark.parametrize("config", [*LEVELS, {"defense": "feature_smoothing", "num_samples": 2}])
def test_what_a_streamer_asks_is_a_request_of_its_own(llava, batch, config, when):
    model, _ = llava
    model.generation_config.smoothguard = config

    def ask():
        with hf_integration.observe() as seen:
            model.generate(**batch(1), max_new_tokens=2)
        return seen.defended

    streamers = [Asking(when, ask) for _ in range(2)]
    model.generate(**batch(0), max_new_tokens=2, streamer=streamers[0])
    assert streamers[0].answers == [1]
    if config in LEVELS:  # a streamer a row
        model.generate(**batch(0, 2), max_new_tokens=2, streamer=streamers[1:] + streamers[1:])
        assert set(streamers[1].answers) == {1}


# -- functions of their own in its place -------------------------------------------------------------------------------


def test_what_stands_in_place_of_generate_looks_like_it_and_hands_nothing_undefended_out(llava):
    model, _ = llava
    shown = inspect.signature(model.generate)
    for function in (GenerationMixin.generate, GenerationMixin.generate_batch):
        assert not hasattr(function, "__wrapped__")
        assert inspect.unwrap(function) is function
    name, doc = model.generate.__name__, model.generate.__doc__
    hf_integration.disable()
    try:
        assert shown == inspect.signature(model.generate)
        assert (name, doc) == (model.generate.__name__, model.generate.__doc__)
    finally:
        hf_integration.enable()


def test_a_way_past_generate_is_refused_where_its_call_asks_for_the_defence(llava):
    from hf_integration.refusing import bypassing

    method = bypassing(lambda self, inputs, **kwargs: (inputs, kwargs), "generate_batch")
    assert method(llava[0], [[1]], warmup=False, smoothguard=None) == ([[1]], {"warmup": False})
    with pytest.raises(UndefendableError, match="bypasses"):
        method(llava[0], [[1]], smoothguard=True)


OWN_CODE = "def generate(model, **arguments):\n    return [model, arguments]\n"


@pytest.fixture
def with_own_code(tmp_path):
    """Loads the embedded model with generation code of its own beside it."""
    from transformers import AutoModelForImageTextToText

    where = tmp_path / "with_own_code"
    shutil.copytree(MODEL_DIR, where)
    (where / "custom_generate").mkdir()
    (where / "custom_generate" / "generate.py").write_text(OWN_CODE)
    yield lambda: AutoModelForImageTextToText.from_pretrained(where, trust_remote_code=True)
    hf_integration.enable()


@pytest.mark.parametrize("when", ["before", "after"])
def test_generation_code_on_the_instance_is_refused_whenever_it_was_loaded(with_own_code, batch, when):
    if when == "before":
        hf_integration.disable()
    model = with_own_code()
    own = vars(model)["generate"]
    assert hf_integration.enabled(model) == (when == "after")
    hf_integration.enable()
    assert hf_integration.enabled(model)
    inputs = dict(batch(0))
    assert model.generate(**inputs, smoothguard=None) == [model, inputs]
    with pytest.raises(UndefendableError, match="generation code of its own"):
        model.generate(**inputs, smoothguard=True)
    hf_integration.force(PIXEL)
    try:
        with pytest.raises(UndefendableError, match="generation code of its own"):
            model.generate(**inputs, smoothguard=False)
    finally:
        hf_integration.force(None)
    model.generation_config.smoothguard = PIXEL
    for call in ({}, {"smoothguard": None}):
        with pytest.raises(UndefendableError, match="generation code of its own"):
            model.generate(**inputs, **call)
    assert model.generate(**inputs, smoothguard=False) == [model, inputs]
    model.generation_config.smoothguard = None
    other = copy.deepcopy(model)
    assert other.generate()[0] is other
    hf_integration.disable()
    assert not hf_integration.enabled(model)
    assert isinstance(vars(model)["generate"], functools.partial)
    assert when == "after" or vars(model)["generate"] is own
    assert isinstance(vars(other)["generate"], functools.partial)


class Lookup:
    """A descriptor of its own kind."""

    def __init__(self, function):
        self.function = function

    def __get__(self, model, owner=None):
        return self if model is None else functools.partial(self.function, model)


class Callable:
    """No descriptor: it is called without the model, and has one of its own."""

    def __init__(self, function):
        self.function, self.model = function, None

    def __call__(self, **kwargs):
        return self.function(self.model, **kwargs)


WAYS = {
    "partialmethod": lambda plain, holder: functools.partialmethod(plain, max_new_tokens=3),
    "wraps": lambda plain, holder: functools.wraps(GenerationMixin.generate)(
        lambda self, **kwargs: plain(self, **kwargs)
    ),
    "property": lambda plain, holder: property(lambda self: functools.partial(plain, self)),
    "descriptor": lambda plain, holder: Lookup(plain),
    "static": lambda plain, holder: staticmethod(lambda **kwargs: plain(holder.model, **kwargs)),
    "class": lambda plain, holder: classmethod(lambda cls, **kwargs: plain(holder.model, **kwargs)),
    "callable": lambda plain, holder: holder,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_whatever_a_class_has_as_generate_is_defended(trained, batch, way, when):
    from transformers import LlavaForConditionalGeneration

    plain = GenerationMixin.generate.__smoothguard_original__
    holder = Callable(plain)
    if when == "before":
        hf_integration.disable()
    try:
        stood = WAYS[way](plain, holder)
        kind = type("LlavaForConditionalGeneration", (LlavaForConditionalGeneration,), {"generate": stood})
        hf_integration.enable()
        holder.model = model = kind.from_pretrained(MODEL_DIR).eval()
        hf_integration.attach(model, trained[1])
        assert hf_integration.enabled(model)
        few = {"max_new_tokens": 3, "return_dict_in_generate": True}
        with hf_integration.observe() as seen:
            out = model.generate(**batch(0), **few, smoothguard=PIXEL | {"num_samples": 3})
        assert (seen.defended, len(out.smoothguard[0].candidates)) == (1, 3)
        if way in ("static", "class"):  # which have no model when they are called so
            assert not hasattr(kind.generate(**batch(0), **few), "smoothguard")
        assert not hasattr(model.generate(**batch(0), **few), "smoothguard")
    finally:
        hf_integration.disable()
        assert kind.__dict__["generate"] is stood
        hf_integration.enable()


def test_arguments_that_a_class_gives_generate_are_seen_by_the_defence(trained, batch):
    from transformers import LlavaForConditionalGeneration

    several = functools.partialmethod(
        GenerationMixin.generate.__smoothguard_original__, num_return_sequences=2, num_beams=2, max_new_tokens=2
    )
    kind = type("LlavaForConditionalGeneration", (LlavaForConditionalGeneration,), {"generate": several})
    model = kind.from_pretrained(MODEL_DIR).eval()
    assert len(model.generate(**batch(0))) == 2
    with pytest.raises(UndefendableError, match="num_return_sequences is 2"):
        model.generate(**batch(0), smoothguard=PIXEL)


def test_whether_a_models_generate_is_ours(trained):
    """The ways that no override sees, and wrappers that hand on."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR)
    wrapped = torch.compile(model, backend="eager"), torch.nn.DataParallel(model)
    assert all(map(hf_integration.enabled, (model, *wrapped)))
    model.generate = functools.partial(model.generate, max_new_tokens=3)
    assert all(map(hf_integration.enabled, (model, *wrapped)))  # it is ours inside
    model.generate = functools.wraps(type(model).generate)(lambda *args, **kwargs: "plain")
    assert not any(map(hf_integration.enabled, (model, *wrapped)))
    del model.generate
    kind = type("LlavaForConditionalGeneration", (LlavaForConditionalGeneration,), {"generate": lambda self: "plain"})
    other = kind.from_pretrained(MODEL_DIR)
    assert hf_integration.enabled(other)
    kind.generate = mine = lambda self: "another"
    assert not hf_integration.enabled(other)
    assert hf_integration.enabled(model)
    assert not hf_integration.enabled(torch.nn.Linear(1, 1))  # it has none
    hf_integration.disable()
    try:
        assert kind.__dict__["generate"] is mine  # what was put there since stays
        assert not hf_integration.enabled(model)
    finally:
        hf_integration.enable()


def test_a_function_of_ours_that_somebody_kept_does_nothing_once_the_override_is_out(llava, batch):
    model, _ = llava
    kept = model.generate
    model.generation_config.smoothguard = PIXEL
    hf_integration.disable()
    try:
        out = kept(**batch(0), max_new_tokens=2, return_dict_in_generate=True)
    finally:
        hf_integration.enable()
    assert not hasattr(out, "smoothguard")
