"""Adaptive attacks on feature smoothing: gradients go through the noisy passes, with draws that are the attacker's own."""

from __future__ import annotations

import pytest
import torch
from attack_jobs import job_of, margin_of

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter
from lmms_smoothguard.attacks.objective import InnerDraws
from lmms_smoothguard.choice import choose
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.smoothing.config import FeatureSmoothingConfig
from lmms_smoothguard.smoothing.context import smoothed
from lmms_smoothguard.smoothing.towers import find_tower

FS = {"defense": "feature_smoothing", "num_samples": 8, "sigma": 0.2}
BOTH = {"defense": "smoothguard+feature_smoothing", "sigma": 0.2, "feature_samples": 8, "feature_sigma": 0.1}


@pytest.fixture
def crafter(trained, tmp_path):
    model, processor = trained

    def make(defense, **kwargs):
        return Crafter(model, processor, AttackCache(tmp_path / "attacks"), choose(defense), quiet=True, **kwargs)

    return make


@pytest.fixture
def jobs(trained, images, batch):
    return lambda count, **settings: [job_of(trained, images[n], batch(n), **settings) for n in range(count)]


def served_margin(trained, entry, job, seed):
    """Against the served defence, with its own seed."""
    model, processor = trained
    with smoothed(model, FeatureSmoothingConfig(num_samples=16, sigma=0.2, seed=seed), processor.image_processor):
        return margin_of(trained, entry, job)


def test_an_attack_through_the_smoothing_beats_one_that_does_not_know_it(crafter, jobs, trained):
    """In the served defence's own margin, over four questions: the gradient is that of the smoothed model."""
    standard, adaptive = jobs(4, eps=8 / 255, steps=12), jobs(4, eps=8 / 255, steps=12, eot=4)
    plain, through = crafter(None).craft(standard), crafter(FS).craft(adaptive)
    gains = [
        served_margin(trained, b, job, seed=5) - served_margin(trained, a, job, seed=5)
        for a, b, job in zip(plain, through, standard, strict=True)
    ]
    assert sum(gains) / len(gains) > 0.5
    assert min(gains) > -0.5


def test_the_defences_seed_and_passes_are_nothing_to_the_attacker(crafter, jobs):
    job = jobs(1, steps=2, eot=3)
    (first,) = crafter(FS).craft(job)
    other = crafter(FS | {"seed": 99, "num_samples": 2})
    assert other._key(job[0]) == crafter(FS)._key(job[0])
    assert crafter(FS | {"sigma": 0.1})._key(job[0]) != crafter(FS)._key(job[0])
    assert first.record["randomness"] == {
        "defense": "feature_smoothing", "sigma": 0.2, "mapper": True, "content": None, "code": None,
    }  # fmt: skip


@pytest.mark.parametrize("defense", [FS, BOTH], ids=["features", "both"])
def test_a_rows_draws_depend_on_no_neighbour(crafter, jobs, tmp_path, trained, defense):
    """The same pictures however requests share batches."""
    model, processor = trained
    listed = jobs(3, steps=2, eot=2)
    together = crafter(defense).craft(listed)
    alone = Crafter(
        model, processor, AttackCache(tmp_path / "others"), choose(defense), batch_size=1, quiet=True
    ).craft(list(reversed(listed)))
    for one, other in zip(together, reversed(alone), strict=True):
        assert (one.images[0] == other.images[0]).mean() > 0.999  # a sum in another order may round a sign elsewhere


def test_restarts_share_a_rows_draws_and_every_step_has_new_ones():
    inner = InnerDraws(7)
    keys = ["a", "b"]
    inner.expect(keys, 4, 1)  # two restarts of two rows
    first = [g.initial_seed() for g in inner(8)]  # two pictures a row
    assert first[:4] == first[4:]
    assert len(set(first[:4])) == 4
    inner.expect(keys, 4, 1)
    assert not {g.initial_seed() for g in inner(8)} & set(first)
    inner.expect(["a"], 1, 1)
    assert [g.initial_seed() for g in inner(2)] == first[:2]  # a row alone draws as it did beside another
    inner.expect(["a"], 1, 2)
    assert (
        len({g.initial_seed() for g in inner(4)}) == 4
    )  # draws of the noise before the model have noise of their own inside
    with pytest.raises(AttackError, match="called with 3 pictures for 2 rows"):
        inner.expect(keys, 2, 1) or inner(3)


@pytest.mark.parametrize(("defense", "each"), [(FS, 1), (BOTH, 2)], ids=["features", "both"])
def test_a_step_has_as_many_noisy_passes_as_the_attacker_asks_for(crafter, jobs, trained, monkeypatch, defense, each):
    """attack_eot draws a row; where noisy copies come before the smoothing, two passes for each of them."""
    tower, sizes = find_tower(trained[0]).module, []
    original = type(tower).forward

    def counted(self, pixel_values, *args, **kwargs):
        if torch.is_grad_enabled() and pixel_values.requires_grad:
            sizes.append(len(pixel_values))
        return original(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(tower), "forward", counted)
    crafter(defense).craft(jobs(1, steps=1, eot=5))
    assert sizes == [5 * each]


def test_without_eot_the_bare_model_is_attacked(crafter, jobs):
    (bare,), (defended,) = crafter(None).craft(jobs(1, steps=2)), crafter(FS).craft(jobs(1, steps=2))
    assert (bare.images[0] == defended.images[0]).all()


def test_the_smoothing_ends_with_the_attack(crafter, jobs, trained):
    crafter(FS).craft(jobs(1, steps=1, eot=2))
    assert "forward" not in vars(find_tower(trained[0]).module)


def test_feature_attacks_and_apgd_go_through_it_too(crafter, jobs):
    for name in ("feature", "apgd", "patch"):
        known, blind = jobs(1, name=name, steps=2, eot=2), jobs(1, name=name, steps=2)
        (adaptive,), (standard,) = crafter(FS).craft(known), crafter(None).craft(blind)
        assert (adaptive.images[0] != standard.images[0]).any()
        assert torch.tensor(adaptive.record["objective"]).isfinite().all()
