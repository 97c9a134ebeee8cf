"""SmoothGuard at token level: agreement on every next token, streaming, sampling."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from sklearn.cluster import KMeans

from hf_integration import SmoothGuardLogitsProcessor
from lmms_smoothguard.defenses.consensus import MERGE_DISTANCE, agree
from lmms_smoothguard.defenses.streams import RowStreams
from lmms_smoothguard.errors import UndefendableError
from lmms_smoothguard.inputs.media import find_images
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.noise import NoiseSource

TOKEN = {"sigma": 0.2, "noise_space": "pixel", "level": "token"}
DESCRIBE = "Describe the image."


def generate(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 32, "smoothguard": TOKEN, "return_dict_in_generate": True} | kwargs
    return model.generate(**inputs, **kwargs)


def copies_of(model, inputs, sigma=0.2):
    source = NoiseSource(find_images(inputs, model.config), sigma=sigma, statistics=pixel_statistics(model), seed=0)
    return [inputs["pixel_values"], *(source.copy(number) for number in range(1, 10))]


# -- agreement ---------------------------------------------------------------------------------------------------------


def spread(*groups):
    """(1, N, V): each group is (count, token it prefers)."""
    rows = []
    for count, token in groups:
        row = torch.full((8,), 0.01)
        row[token] = 0.93
        rows += [row] * count
    return torch.stack(rows)[None]


def test_the_larger_cluster_speaks_alone():
    p = spread((4, 1), (6, 2))
    found = agree(p)
    assert torch.allclose(found.probabilities[0], p[0, 9])
    assert found.majority[0].tolist() == [False] * 4 + [True] * 6


@pytest.mark.parametrize(("clean_first", "winner"), [(True, 2), (False, 1)])
def test_a_tie_goes_to_the_noisier_cluster_then_to_copy_0(clean_first, winner):
    assert agree(spread((5, 1), (5, 2)), clean_first=clean_first).probabilities[0].argmax() == winner


def test_distributions_that_are_alike_are_averaged():
    """Two alike groups, closer than the stated Hellinger distance, and the same ones held to a smaller distance."""
    p = torch.tensor([[[0.6, 0.4], [0.6, 0.4], [0.4, 0.6], [0.4, 0.6], [0.4, 0.6]]])
    distance = float(((p[0, 0].sqrt() - p[0, 4].sqrt()).square().sum() / 2).sqrt())
    assert distance < MERGE_DISTANCE
    assert torch.allclose(agree(p).probabilities[0], torch.tensor([0.48, 0.52]))
    assert torch.allclose(agree(p, merge_distance=distance - 0.01).probabilities[0], torch.tensor([0.4, 0.6]))


def test_clusters_are_those_of_k_means_from_the_same_start():
    """scikit-learn's k-means on sqrt(p), started from copy 0 and the copy farthest from it; 60 tokens, so all count."""
    generator = torch.Generator().manual_seed(0)
    split = 0
    for _ in range(200):
        sharp = 1 + 3 * torch.rand(1, generator=generator)
        centres = sharp * torch.randn(2, 60, generator=generator)
        logits = centres[torch.randint(0, 2, (10,), generator=generator)] + torch.randn(10, 60, generator=generator)
        p = logits.softmax(-1)
        roots = p.sqrt().double().numpy()
        far = ((roots - roots[0]) ** 2).sum(1).argmax()
        labels = KMeans(2, init=roots[[0, far]], n_init=1).fit(roots).labels_
        sizes = np.bincount(labels, minlength=2)
        if sizes[0] == sizes[1]:
            continue
        expected = labels == sizes.argmax()
        found = agree(p[None], merge_distance=0.0)
        assert found.majority[0].tolist() == expected.tolist()
        assert np.allclose(found.probabilities[0], p[torch.from_numpy(expected)].mean(0), atol=1e-6)
        split += 1
    assert split > 100


def test_only_the_tokens_a_copy_would_say_are_compared_but_all_are_averaged():
    """Two copies that differ in a thousand unlikely tokens alone are alike; their mean still has every token."""
    tail = torch.zeros(2, 3000)
    tail[0, 1000:2000], tail[1, 2000:3000] = 0.0001, 0.0001
    tail[:, :100] = 0.9 / 100
    found = agree(tail[None], merge_distance=0.05)
    assert found.majority.all()
    assert torch.allclose(found.probabilities[0], tail.mean(0))


# -- decoding ----------------------------------------------------------------------------------------------------------


def test_every_token_is_what_separate_calls_agree_on(llava, batch):
    """Step by step: the ten copies' next-token distributions from ten separate calls, the majority's mean, its best."""
    model, _ = llava
    inputs = batch(1, question=DESCRIBE)
    sequence = generate(model, inputs).sequences
    prompt = inputs["input_ids"].shape[1]
    for length in range(prompt, sequence.shape[1]):
        so_far = sequence[:, :length]
        rows = []
        for pixels in copies_of(model, inputs):
            with torch.no_grad():
                logits = model(input_ids=so_far, attention_mask=torch.ones_like(so_far), pixel_values=pixels).logits
            rows.append(logits[0, -1].softmax(-1))
        assert agree(torch.stack(rows)[None]).probabilities[0].argmax() == sequence[0, length]
    assert sequence.shape[1] > prompt + 3


def test_an_answer_does_not_depend_on_its_neighbours(llava, batch):
    model, _ = llava
    together = generate(model, batch(0, 1, 2, 3, question=DESCRIBE))
    prompt = batch(0, question=DESCRIBE)["input_ids"].shape[1]
    for row in range(4):
        alone = generate(model, batch(row, question=DESCRIBE))
        answer = alone.sequences[0, prompt:]
        assert torch.equal(together.sequences[row, prompt : prompt + len(answer)], answer)
        assert together.smoothguard[row] == alone.smoothguard[0]


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}])
def test_without_noise_it_is_the_plain_answer(llava, batch, decoding):
    model, _ = llava
    inputs = batch(0, 1, 2, question=DESCRIBE)
    plain = model.generate(**inputs, max_new_tokens=32, **decoding)
    assert torch.equal(generate(model, inputs, smoothguard=TOKEN | {"sigma": 0.0}, **decoding).sequences, plain)


def test_it_outvotes_a_poisoned_clean_copy(llava, batch, poison_clean_copy):
    model, _ = llava
    inputs, other = batch(0, question=DESCRIBE), batch(1, question=DESCRIBE)
    right, wrong = (model.generate(**item, max_new_tokens=32) for item in (inputs, other))
    poison_clean_copy(other["pixel_values"])
    out = generate(model, inputs, smoothguard=TOKEN | {"sigma": 0.02})
    assert torch.equal(out.sequences, right)
    assert not torch.equal(right, wrong)
    verdict = out.smoothguard[0]
    assert verdict.suspected
    assert 0 < verdict.suspicion <= 1
    assert verdict.num_samples_used == 10


def test_sampling_draws_once_for_all_copies_of_a_row(llava, batch):
    """Without noise the draws follow the model's own warped distribution; rows draw apart, copies do not."""
    model, _ = llava
    one = batch(0, question=DESCRIBE)
    many = {key: value.repeat_interleave(200, dim=0) for key, value in one.items()}
    warp = {"do_sample": True, "temperature": 3.0, "top_k": 5}
    torch.manual_seed(0)
    drawn = generate(
        model, many, max_new_tokens=1, smoothguard=TOKEN | {"sigma": 0.0, "num_samples": 2}, **warp
    ).sequences[:, -1]
    with torch.no_grad():
        logits = model(**one).logits[0, -1] / 3.0
    best = logits.topk(5)
    counts = [(drawn == token).sum().item() for token in best.indices]
    assert sum(counts) == 200  # nothing outside top_k
    assert chisquare(counts, 200 * best.values.double().softmax(-1).numpy()).pvalue > 1e-4
    torch.manual_seed(1)
    out = generate(model, batch(0, 1, question=DESCRIBE), do_sample=True, temperature=2.0, output_scores=True)
    assert out.sequences.shape[0] == 2
    torch.manual_seed(1)
    again = generate(model, batch(0, 1, question=DESCRIBE), do_sample=True, temperature=2.0)
    assert torch.equal(out.sequences, again.sequences)


def test_sampling_in_beams_is_refused(llava, batch):
    model, _ = llava
    with pytest.raises(UndefendableError, match="sampling in beams"):
        generate(model, batch(0), do_sample=True, num_beams=2)


def test_a_generate_that_ignores_the_processor_is_refused(llava, batch, monkeypatch):
    """Its first row would be the clean copy's own answer."""
    from lmms_smoothguard.defenses import Request

    model, _ = llava
    honest = Request.__init__

    def deaf(self, model, generate, arguments, *rest):
        honest(self, model, lambda logits_processor=None, **kwargs: generate(**kwargs), arguments, *rest)

    monkeypatch.setattr(Request, "__init__", deaf)
    with pytest.raises(UndefendableError, match="does not follow its logits_processor"):
        generate(model, batch(0))


# -- the processor by itself -------------------------------------------------------------------------------------------


def tiled(model, inputs):
    copies = copies_of(model, inputs)
    return {key: torch.cat(copies) if key == "pixel_values" else value.repeat(10, 1) for key, value in inputs.items()}


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}, {"repetition_penalty": 1.3, "min_new_tokens": 12}])
def test_standalone_on_a_batch_that_the_user_tiled(llava, batch, decoding):
    model, _ = llava
    inputs = batch(0, 1, question=DESCRIBE)
    out = model.generate(
        **tiled(model, inputs), max_new_tokens=32, logits_processor=[SmoothGuardLogitsProcessor(10)], **decoding
    )
    assert torch.equal(out.view(10, 2, -1), out[:2].expand(10, 2, -1))
    assert torch.equal(out[:2], generate(model, inputs, **decoding).sequences)


def test_standalone_refuses_copies_that_came_apart(llava, batch):
    model, _ = llava
    inputs = tiled(model, batch(0, question=DESCRIBE))
    torch.manual_seed(0)
    with pytest.raises(UndefendableError, match="level': 'token'"):
        model.generate(
            **inputs,
            max_new_tokens=32,
            do_sample=True,
            temperature=5.0,
            logits_processor=[SmoothGuardLogitsProcessor(10)],
        )
    with pytest.raises(UndefendableError, match="10 rows, no multiple of num_samples = 4"):
        model.generate(**inputs, max_new_tokens=4, logits_processor=[SmoothGuardLogitsProcessor(4)])


# -- streams -----------------------------------------------------------------------------------------------------------


class Tape:
    """A streamer that notes what it gets, and how many forward passes there were before."""

    def __init__(self, forwards=None):
        self.prompt, self.tokens, self.when, self.ended, self.forwards = None, [], [], 0, forwards

    def put(self, value):
        if self.prompt is None:
            self.prompt = value
        else:
            self.tokens.append(value)
            self.when.append(None if self.forwards is None else self.forwards[0])

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("level", ["answer", "token"])
def test_one_stream_a_user_row(llava, batch, level):
    model, processor = llava
    inputs, tapes = batch(0, 1, 2, question=DESCRIBE), [Tape(), Tape(), Tape()]
    out = generate(model, inputs, streamer=tapes, smoothguard=TOKEN | {"level": level}).sequences
    prompt, end = inputs["input_ids"].shape[1], processor.tokenizer.eos_token_id
    lengths = set()
    for row, tape in enumerate(tapes):
        assert torch.equal(tape.prompt, inputs["input_ids"][row : row + 1])
        tokens = torch.cat(tape.tokens)
        assert torch.equal(tokens, out[row, prompt : prompt + len(tokens)])
        assert tokens[-1] == end
        assert tape.ended == 1
        lengths.add(len(tokens))
    assert len(lengths) > 1  # rows end at their own time


@pytest.mark.parametrize("level", ["answer", "token"])
def test_a_streamer_for_batches_gets_what_an_undefended_generate_would_give(llava, batch, level):
    model, _ = llava
    inputs, plain, defended = batch(0, 1), Tape(), Tape()
    none = TOKEN | {"level": level, "sigma": 0.0}
    model.generate(**inputs, max_new_tokens=8, streamer=plain)
    model.generate(**inputs, max_new_tokens=8, streamer=defended, smoothguard=none)
    assert torch.equal(plain.prompt, defended.prompt)
    assert torch.equal(torch.stack(plain.tokens), torch.stack(defended.tokens))
    assert defended.ended == 1


def test_sampled_tokens_are_streamed_and_the_stream_ends(llava, batch):
    """transformers drops the streamer beside a `custom_generate`; a reader of it would wait for ever."""
    model, processor = llava
    inputs, tapes = batch(0, 1, question=DESCRIBE), [Tape(), Tape()]
    torch.manual_seed(0)
    out = generate(model, inputs, streamer=tapes, do_sample=True, temperature=0.7).sequences
    for row, tape in enumerate(tapes):
        tokens = torch.cat(tape.tokens)
        assert torch.equal(tokens, out[row, inputs["input_ids"].shape[1] :][: len(tokens)])
        assert tokens[-1] == processor.tokenizer.eos_token_id
        assert tape.ended == 1


@pytest.mark.parametrize("level", ["answer", "token"])
def test_a_row_that_stops_without_an_end_token_gets_no_padding(llava, batch, level):
    """Some rows stop at a comma while others go on."""
    model, processor = llava
    inputs, tapes = batch(*range(6), question=DESCRIBE), [Tape() for _ in range(6)]
    kwargs = {"stop_strings": [","], "tokenizer": processor.tokenizer, "max_new_tokens": 12}
    out = generate(
        model, inputs, streamer=tapes, smoothguard=TOKEN | {"level": level, "sigma": 0.0}, **kwargs
    ).sequences
    pad = processor.tokenizer.pad_token_id
    answers = out[:, inputs["input_ids"].shape[1] :].tolist()
    end = processor.tokenizer.eos_token_id
    assert any(pad in answer and end not in answer for answer in answers)  # or nothing was tested
    for answer, tape in zip(answers, tapes, strict=True):
        assert torch.cat(tape.tokens).tolist() == [token for token in answer if token != pad]
        assert tape.ended == 1


def test_an_encoder_decoders_start_token_does_not_end_its_answer():
    """BART's decoder starts with the token that ends it."""
    from types import SimpleNamespace

    from lmms_smoothguard.defenses.replies import Replies
    from lmms_smoothguard.defenses.request import Request

    config = SimpleNamespace(is_encoder_decoder=True)
    generation = SimpleNamespace(eos_token_id=2, pad_token_id=1)
    model = SimpleNamespace(config=config, generation_config=generation)
    replies = Replies(Request(model, lambda: None, {}), rows=1)
    replies.add(torch.tensor([[2, 0, 55, 2, 1], [2, 0, 66, 77, 2]]), copies=2)
    assert replies.candidates(0) == [(2, 0, 55), (2, 0, 66, 77)]
    assert replies.output([0], []).tolist() == [[2, 0, 55, 2]]


@pytest.mark.parametrize("level", ["answer", "token"])
@pytest.mark.parametrize("given", [None, [2, 11, 12], [2, 3, 12], [11, 3]])
def test_an_encoder_decoders_given_tokens_are_no_part_of_its_answer(level, given):
    """A task prompt for the decoder, as Donut has it; it may hold the end token, or lack the start token."""
    from transformers import BertConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(image_size=32, patch_size=8, **sizes), BertConfig(vocab_size=60, **sizes)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionEncoderDecoderModel(config).eval()
        pixels = torch.randn(1, 3, 32, 32)
    special = {"decoder_start_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    for name, value in special.items():
        setattr(model.generation_config, name, value)
        setattr(model.config, name, value)
    inputs = {"pixel_values": pixels} | ({} if given is None else {"decoder_input_ids": torch.tensor([given])})
    ours, theirs = Tape(), Tape()
    plain = generate(model, inputs, streamer=theirs, output_scores=True, max_new_tokens=5, smoothguard=False)
    config = {"sigma": 0.0, "num_samples": 3, "level": level}
    out = generate(model, inputs, streamer=ours, output_scores=True, max_new_tokens=5, smoothguard=config)
    assert torch.equal(out.sequences, plain.sequences)
    assert len(out.scores) == len(plain.scores)
    assert ours.prompt.tolist() == theirs.prompt.tolist()
    assert torch.cat(ours.tokens).tolist() == torch.cat(theirs.tokens).tolist()
    if given is not None:
        assert out.smoothguard[0].candidates[0] == tuple(t for t in plain.sequences[0, -5:].tolist() if t != 3)


def test_an_encoder_decoders_start_token_does_not_end_its_stream():
    """BART's decoder starts with the token that ends it."""
    tape = Tape()
    streams = RowStreams([tape], {2}, 1, together=False)
    streams.replay(torch.tensor([[2, 0, 55, 66, 2]]), 1, [4])
    assert tape.prompt.tolist() == [[2]]
    assert torch.cat(tape.tokens).tolist() == [0, 55, 66, 2]
    assert tape.ended == 1


def test_a_padding_token_within_an_answer_is_streamed_and_padding_after_it_is_not():
    first, second = Tape(), Tape()
    streams = RowStreams([first, second], {2}, 1, together=False)
    streams.put(torch.tensor([[0], [0]]))
    for step in ([5, 5], [1, 1], [1, 1], [6, 1]):
        streams.put(torch.tensor(step))
    streams.end()
    assert torch.cat(first.tokens).tolist() == [5, 1, 1, 6]
    assert torch.cat(second.tokens).tolist() == [5]


def test_stop_strings_and_scores_when_sampling(llava, batch):
    model, processor = llava
    inputs = batch(1, question=DESCRIBE)
    kwargs = {"do_sample": True, "temperature": 0.5, "top_k": 7, "output_scores": True}
    torch.manual_seed(0)
    free = generate(model, inputs, **kwargs)
    torch.manual_seed(0)
    stopped = generate(model, inputs, stop_strings=[","], tokenizer=processor.tokenizer, **kwargs)
    start = inputs["input_ids"].shape[1]
    text = processor.decode(stopped.sequences[0, start:])
    assert text.count(",") == 1
    assert text.endswith(",")
    assert torch.equal(free.sequences[0, : stopped.sequences.shape[1]], stopped.sequences[0])
    assert len(free.scores) == free.sequences.shape[1] - start
    for scores in free.scores:  # what was drawn from, not what was drawn
        assert scores.shape[0] == 1
        assert torch.isfinite(scores).sum() == 7


def test_half_precision_around_it_does_not_reach_the_agreement():
    p = torch.tensor([[[0.5001, 0.4999, 0.0]] * 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = agree(p)
    assert found.probabilities.dtype == torch.float32
    assert torch.allclose(found.probabilities[0], p[0, 0])


def test_one_processor_for_several_requests_keeps_the_last_ones_votes(llava, batch):
    model, _ = llava
    processor = SmoothGuardLogitsProcessor(10)
    lengths = []
    for number in (0, 1):
        out = model.generate(
            **tiled(model, batch(number, question=DESCRIBE)), max_new_tokens=32, logits_processor=[processor]
        )
        lengths.append(out.shape[1] - batch(number, question=DESCRIBE)["input_ids"].shape[1])
        assert len(processor.majorities) == lengths[-1]


def test_a_request_that_is_one_token_longer_than_the_last_is_another():
    processor, scores = SmoothGuardLogitsProcessor(2), torch.randn(2, 9)
    for length in (5, 6):
        processor(torch.zeros(2, length, dtype=torch.long), scores)
    assert len(processor.majorities) == 2
    processor(torch.ones(2, 7, dtype=torch.long), scores)
    assert len(processor.majorities) == 1


def test_tokens_are_streamed_as_they_arise(llava, batch, monkeypatch):
    model, _ = llava
    forwards, forward = [0], type(model).forward

    def counted(self, *args, **kwargs):
        forwards[0] += 1
        return forward(self, *args, **kwargs)

    counted.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", counted)
    tape = Tape(forwards)
    generate(model, batch(0, question=DESCRIBE), streamer=tape)
    assert tape.when[:4] == [1, 2, 3, 4]


def test_streamers_that_do_not_fit_are_refused_before_anything_is_answered(llava, batch):
    from transformers import TextStreamer

    model, processor = llava
    with pytest.raises(UndefendableError, match="2 streamers were given for 3 rows"):
        generate(model, batch(0, 1, 2), streamer=[Tape(), Tape()])
    with pytest.raises(UndefendableError, match="takes one row, the request has 2"):
        generate(model, batch(0, 1), streamer=TextStreamer(processor.tokenizer))
    text = processor.tokenizer("<s>USER: hello ASSISTANT:", return_tensors="pt")
    with pytest.raises(UndefendableError, match="one streamer for text alone"):
        generate(model, text, streamer=[Tape()])


def test_an_all_black_picture_is_still_answered(llava):
    from lmms_smoothguard.tiny.model import prompt

    model, processor = llava
    inputs = processor(images=[Image.new("RGB", (64, 64))], text=prompt(DESCRIBE), return_tensors="pt")
    assert generate(model, inputs).smoothguard[0].num_samples_used == 10


def test_processes_that_share_a_models_parts_decode_equally_long(trained, monkeypatch):
    """transformers drops `synced_gpus` beside a callable, so it is decided here, as there."""
    from transformers.integrations import deepspeed

    from lmms_smoothguard.defenses.consensus import synced_gpus

    model, _ = trained
    assert synced_gpus(model, None) is False
    assert synced_gpus(model, True) is True
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert synced_gpus(model, None) is False  # two processes with a model each need not wait for each other
    monkeypatch.setattr(deepspeed, "is_deepspeed_zero3_enabled", lambda: True)
    assert synced_gpus(model, None) is True
    assert synced_gpus(model, False) is False
