"""The benchmark's own logic; no time is asserted."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import bench
from lmms_smoothguard.noise import NoiseSource
from timing import memory, parts, streaming, subjects, variants
from timing.paired import median, ratio, run_paired
from timing.table import markdown
from timing.variants import EXACT, NAIVE, OURS, PLAIN, TOKEN, Length

SMALL_7B = dataclasses.replace(
    subjects.LLAVA_7B, image=56, vision_width=32, vision_inner=64, vision_layers=2, vision_heads=2,
    width=64, inner=128, layers=2, heads=4, vocabulary=1024, positions=256,
)  # fmt: skip


@pytest.fixture(scope="module")
def embedded():
    return subjects.load("embedded")


@pytest.fixture(scope="module")
def small():
    """LLaVA-1.5-7B's path, a millionth of its size."""
    subject = subjects.llava_7b("cpu", SMALL_7B)
    subject.attach()
    return subject


def test_a_ratio_is_taken_within_rounds_and_not_between_medians():
    found = ratio([1.0, 10.0, 3.0], [1.0, 5.0, 30.0])  # 1, 2, 0.1; the medians' ratio is 0.6
    assert found.value == 1.0
    assert (found.low, found.high, found.count) == (0.1, 2.0, 3)
    with pytest.raises(ValueError, match="3 numerators for 2 denominators"):
        ratio([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_interval_covers_the_true_median_and_narrows_with_rounds():
    rng = np.random.default_rng(0)
    runs = [median(rng.lognormal(np.log(3), 0.2, 20)) for _ in range(100)]
    covered = sum(run.low <= 3 <= run.high for run in runs)
    assert 88 <= covered <= 99
    many = median(rng.lognormal(np.log(3), 0.2, 500))
    assert many.high - many.low < 0.5 * np.mean([run.high - run.low for run in runs])
    assert median([2.0] * 5) == (2.0, 2.0, 2.0, 5)


def test_every_round_runs_every_variant_once_in_an_order_of_its_own():
    def orders(seed):
        calls = []
        tasks = {name: lambda number, name=name: calls.append((name, number)) or number for name in "abc"}
        found = run_paired(tasks, 8, warmup=2, seed=seed)
        assert all(answered == list(range(8)) for answered in found.answered.values())
        assert all(len(seconds) == 8 for seconds in found.seconds.values())
        rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
        assert len(rounds) == 10
        for listed in rounds:
            assert sorted(name for name, _ in listed) == ["a", "b", "c"]
            assert len({number for _, number in listed}) == 1  # all variants get the same request
        return ["".join(name for name, _ in listed) for listed in rounds]

    assert len(set(orders(0))) > 2
    assert orders(0) == orders(0) != orders(1)


def test_the_naive_loop_answers_as_we_do_where_the_winner_is_clear(embedded, monkeypatch):
    generates = []
    original = embedded.model.generate
    monkeypatch.setattr(embedded.model, "generate", lambda **kwargs: generates.append(1) or original(**kwargs))
    length, clear = Length(32, forced=False), 0
    for inputs in subjects.requests(embedded, 6):
        ours = variants.answer(embedded, inputs, OURS, length)
        generates.clear()
        naive = variants.answer(embedded, inputs, NAIVE, length)
        assert len(generates) == 11
        if ours.verdict.agreement > 0.8:
            clear += 1
            assert naive.ids == ours.ids
    assert clear >= 4


def test_the_naive_loop_gives_every_copy_our_noise(embedded):
    """Copies that disagree: else the two would not do the same work."""
    inputs = subjects.requests(embedded, 1, subjects.CAPTIONS)[0]
    ours, naive = (variants.answer(embedded, inputs, variant, Length(12), sigma=1.5) for variant in (OURS, NAIVE))
    assert len(set(ours.candidates)) > 2
    assert naive.candidates == ours.candidates


def test_the_naive_loop_takes_the_majoritys_central_member():
    crowd = [[1.0, 0.1 * i] for i in range(-2, 5)]  # the centroid points to [1, 0.1]
    few = [[-5.0, 3.0], [-5.0, 3.1], [-5.0, 3.2]]
    assert variants.nearest_to_the_majority(np.array(few + crowd)) == 3 + 3


def test_a_forced_length_is_kept_and_ones_own_ends_earlier(embedded):
    inputs = subjects.requests(embedded, 1, subjects.QUESTIONS)[0]
    for variant in (PLAIN, OURS, EXACT, TOKEN, NAIVE):
        assert len(variants.answer(embedded, inputs, variant, Length(8)).ids) == 8
    assert len(variants.answer(embedded, inputs, PLAIN, Length(8, forced=False)).ids) < 4


def test_parts_sum_to_the_whole_and_leave_nothing_behind(embedded):
    inputs = subjects.requests(embedded, 1)[0]
    stood = (NoiseSource.copy, NoiseSource.__init__, embedded.model.lm_head.forward.__func__)

    def shares_of(variant, tokens):
        answer = lambda _: variants.answer(embedded, inputs, variant, Length(tokens), sigma=1.5)  # noqa: E731
        shares = parts.measure(embedded.model, "cpu", 1, answer)["shares"]
        return {part: interval["value"] for part, interval in shares.items()}

    found = {key: shares_of(*key) for key in ((PLAIN, 4), (OURS, 1), (OURS, 4), (TOKEN, 4))}
    for shares in found.values():
        assert shares.pop("own") == pytest.approx(shares["noise"] + shares["aggregation"])
        assert tuple(shares) == parts.PARTS
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) >= 0
        assert shares["vision"] > 0 < shares["prefill"]
    assert found[PLAIN, 4]["noise"] == found[PLAIN, 4]["aggregation"] == found[OURS, 1]["decode"] == 0
    for key in ((OURS, 4), (TOKEN, 4)):
        assert min(found[key][part] for part in ("noise", "aggregation", "decode")) > 0
    assert stood == (NoiseSource.copy, NoiseSource.__init__, embedded.model.lm_head.forward.__func__)
    assert "forward" not in vars(embedded.model.lm_head)


def test_the_first_token_is_told_from_the_prompt():
    streamer = streaming.FirstToken(3)
    streamer.start()
    streamer.put(torch.tensor([[1, 2, 3]]))
    assert streamer.seconds is None
    streamer.put(torch.tensor([4]))
    first = streamer.seconds
    streamer.put(torch.tensor([5]))
    assert first is not None and streamer.seconds == first


def test_the_path_of_the_7b_model_at_a_small_size(small):
    facts = small.facts()
    assert facts["dtype"] == "bfloat16"
    assert facts["image_tokens"] == 16
    assert torch.get_default_dtype() == torch.float32
    row = bench.measure(small, bench.Case(subjects.MIXED, Length(1)), bench.Plan(rounds=2, instrumented=1))
    assert row["copies"][OURS]["num_samples_used"] == 10
    assert set(row["ratios"]) == {f"{above} : {below}" for above, below in bench.RATIOS}
    result = {"models": {small.name: facts}, "rows": [{"model": small.name, **row}]}
    assert len(markdown(json.loads(json.dumps(result))).splitlines()) == 3


def test_sizes_are_those_they_are_named_for():
    processor = subjects.processor_for(subjects.NINE_MILLION)
    model = subjects.random_llava(subjects.NINE_MILLION, processor)
    assert 8.5e6 < sum(p.numel() for p in model.parameters()) < 9.5e6
    assert subjects.NINE_MILLION.image_tokens == 144
    large = subjects.random_llava(subjects.LLAVA_7B, processor, "meta", torch.bfloat16)  # without its weights
    assert sum(p.numel() for p in large.parameters()) == 7_063_427_072
    assert {p.dtype for p in large.parameters()} == {torch.bfloat16}
    inputs = processor(images=[np.zeros((64, 64, 3), np.uint8)], text=["<image>"], return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 144


def test_the_table_shows_what_was_measured_and_a_dash_for_the_rest():
    interval = {"value": 2.25, "low": 2.0, "high": 2.5, "count": 20}
    row = {
        "model": "m", "requests": "captions", "new_tokens": 32, "forced": True, "sigma": 0.2,
        "seconds": {"plain": {"value": 0.2, "low": 0.19, "high": 0.21, "count": 20}},
        "ratios": {"smoothguard : plain": interval, "exact early stop : plain": interval},
        "copies": {"exact early stop": {"num_samples_used": 6.04}},
        "parts": {"smoothguard": {"shares": {"own": {"value": 0.02, "low": 0.01, "high": 0.03, "count": 10}}}},
        "memory": {
            variant: memory.above_loaded([{"loaded": 2**20, "peak": (1 + size) * 2**20} for size in sizes])
            for variant, sizes in {"plain": [2], "smoothguard": [7, 8, 9]}.items()
        },
    }  # fmt: skip
    own = {**row, "forced": False, "parts": {}, "memory": {}, "ratios": {}}
    agreeing = {**row, "sigma": 0.0}
    model = {"about": "a model", "parameters": 9_294_336, "image_tokens": 144}
    lines = markdown({"models": {"m": model}, "rows": [row, own, agreeing]}).splitlines()
    assert lines[2] == (
        "| a model, 9.3 M parameters, 144 image tokens | 32 | 200 (190-210) | 2.25 (2.00-2.50) "
        "| 2.25 (2.00-2.50), 6.0 copies | - | - | 2.0 (1.0-3.0) | 2 / 8 (7-9) |"
    )
    assert lines[3].split(" | ")[1:5] == ["as many as captions take", "200 (190-210)", "-", "-"]
    assert lines[4].split(" | ")[1] == "32, copies that agree (sigma 0)"


@pytest.mark.slow
def test_peak_memory_of_ten_copies_is_above_that_of_one():
    found = {v: memory.peak_of(v, "random-9m", Length(1), None) for v in (PLAIN, OURS)}
    above = {variant: sizes["peak"] - sizes["loaded"] for variant, sizes in found.items()}
    assert above[OURS] > 2 * above[PLAIN] > 0
