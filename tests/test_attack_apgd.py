"""APGD: its schedule, what it finds where the optimum is known, and what rows, restarts and noise change."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from attack_jobs import grey_levels, margin_of

from lmms_smoothguard.attacks.apgd import APGD, checkpoints
from lmms_smoothguard.attacks.pgd import PGD
from lmms_smoothguard.attacks.pictures import distances
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import choose
from lmms_smoothguard.errors import ConfigError

LEVEL = 1 / 255


def attack(**settings):
    return APGD(AttackSettings.parse("apgd", settings))


def grey(rows=1, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(96, 160, (rows, 3, size, size), generator=generator) / 255


def two_wells(clean, depth):
    """Largest, 0, where every pixel is `depth` off, up or down; the clean picture is a minimum."""

    def value(slots):
        delta = (slots[0] - clean.repeat(len(slots[0]) // len(clean), 1, 1, 1)) / depth
        return -((delta**2 - 1) ** 2).flatten(1).sum(1)

    return value


@pytest.mark.parametrize("steps", [1, 7, 40, 100, 1000])
def test_the_checkpoints_are_the_papers(steps):
    """p_0 = 0, p_1 = .22, p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06), w_j = ceil(p_j N), in exact fractions."""
    shares = [Fraction(0), Fraction(22, 100)]
    while (following := shares[-1] + max(shares[-1] - shares[-2] - Fraction(3, 100), Fraction(6, 100))) <= 1:
        shares.append(following)
    assert checkpoints(steps) == sorted({math.ceil(share * steps) for share in shares[1:]})
    if steps == 100:
        assert checkpoints(steps) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_it_climbs_to_the_optimum_of_a_linear_objective():
    torch.manual_seed(0)
    slope, clean = torch.randn(1, 3, 8, 8), torch.full((1, 3, 8, 8), 128 / 255)
    objective = lambda slots: (slots[0] * slope).flatten(1).sum(1)  # noqa: E731
    found = attack(eps=8 / 255, steps=20).run(objective, (clean,))[0]
    assert torch.allclose(found - clean, 8 / 255 * slope.sign(), atol=1e-6)
    found = attack(eps=1.0, norm="l2", steps=40).run(objective, (clean,))[0]
    assert float(objective((found,)) - objective((clean,))) == pytest.approx(float(slope.norm()), rel=0.01)
    assert distances((found,), (clean,))[0]["l2"] <= 1.0


def test_it_settles_inside_the_ball_where_the_optimum_of_a_non_concave_objective_lies():
    """A step of constant length goes to and fro there."""
    clean = grey()
    objective = two_wells(clean, 13 * LEVEL)
    found = attack(eps=32 * LEVEL, steps=100).run(objective, (clean,))[0]
    assert ((found - clean).abs() - 13 * LEVEL).abs().max() < 1e-5
    constant = PGD(AttackSettings(eps=32 * LEVEL, steps=100)).run(objective, (clean,))[0]
    assert float(objective((found,))) > float(objective((constant,)))


def test_the_step_is_halved_by_either_condition():
    """Rows: going up all the time; up every other step to ever new heights; up always, never above the beginning."""
    from lmms_smoothguard.attacks.apgd import _Judge

    judge = _Judge(torch.tensor([0.0, 0.0, 9.0]), 1.0)
    last, best = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 9.0])
    for number in range(4):
        value = torch.tensor([number + 1.0, (-1.0) ** number * (number + 1), number + 1.0])
        judge.watch(last, value)
        last, best = value, torch.maximum(best, value)
    assert judge.halve(best, 0.75).tolist() == [False, True, True]
    assert judge.step.tolist() == [1.0, 0.5, 0.5]
    for number in range(4):  # the third stays below 9 again: just halved, so condition 2 waits; it went up, so does 1
        judge.watch(torch.full((3,), number + 0.0), torch.full((3,), number + 1.0))
    assert judge.halve(best, 0.75).tolist() == [True, False, False]
    assert judge.step.tolist() == [0.5, 0.5, 0.5]


def test_it_ends_with_the_best_it_has_seen_after_as_many_gradients_as_steps():
    clean, seen, kinds = grey(3), [], []
    inner = two_wells(clean, 5 * LEVEL)

    def objective(slots):
        kinds.append(torch.is_grad_enabled())
        seen.append(inner(slots).detach())
        return inner(slots)

    one = attack(eps=32 * LEVEL, steps=12)
    numbers = []
    found = one.search(objective, (clean,), one.start((clean,), 0), lambda number, value: numbers.append(number))
    assert torch.equal(inner(found), torch.stack(seen).amax(0))
    assert kinds == [True] * 12 + [False]
    assert numbers == list(range(1, 13))


def test_a_row_whose_step_was_halved_goes_on_from_its_best(monkeypatch):
    """Steps of twice the ball's radius jump over both wells, so the picture at the first checkpoint is not the best."""
    clean, left, stepped = grey(3), [], APGD._stepped

    def watched(self, now, before, origin, step, alpha):
        left.append((now.value, step))
        return stepped(self, now, before, origin, step, alpha)

    monkeypatch.setattr(APGD, "_stepped", watched)
    seen = []

    def objective(slots):
        seen.append(two_wells(clean, 5 * LEVEL)(slots).detach())
        return two_wells(clean, 5 * LEVEL)(slots)

    attack(eps=32 * LEVEL, steps=50).run(objective, (clean,))
    first = checkpoints(50)[0]
    value, step = left[first]
    assert torch.allclose(step, torch.full((3,), 32 * LEVEL))
    assert torch.equal(value, torch.stack(seen[: first + 1]).amax(0))
    assert not torch.equal(value, seen[first])


@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("l2", 1.0)])
def test_a_row_knows_nothing_of_its_neighbours(norm, eps):
    """Rows that halve their steps at different times, two pictures each; alone and together the same bits."""
    first, second = grey(4, seed=1), grey(4, size=6, seed=2)
    scale = torch.arange(1.0, 7.0)

    def objective(slots):
        return torch.cos(200 * slots[0]).flatten(1).sum(1) + torch.sin(90 * slots[1] * scale).flatten(1).sum(1)

    one = attack(norm=norm, eps=eps, steps=15)
    together = one.run(objective, (first, second))
    for row in range(4):
        alone = one.run(objective, (first[row : row + 1], second[row : row + 1]))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    for new, old in zip(together, (first, second), strict=True):
        assert max(d[norm] for d in distances((new,), (old,))) <= eps + 1e-6


def test_more_restarts_are_never_worse():
    clean = grey(4)
    objective = lambda slots: torch.cos(150 * slots[0]).flatten(1).sum(1)  # noqa: E731
    few, many = (attack(eps=8 / 255, steps=6, restarts=n).run(objective, (clean,)) for n in (1, 4))
    assert (objective(many) >= objective(few)).all()
    assert (objective(many) > objective(few)).any()


def test_it_goes_further_than_pgd_on_the_trained_model(trained, attack_crafter, attack_jobs):
    """The same steps; measured on the 8-bit pictures through the ordinary path."""
    found = {}
    for name in ("pgd", "apgd"):
        jobs = attack_jobs(count=8, name=name, eps=4 / 255, steps=40)
        entries = attack_crafter().craft(jobs)
        assert all(0 < np.abs(grey_levels(e, j)).max() <= 4 for e, j in zip(entries, jobs, strict=True))
        found[name] = [margin_of(trained, e, j) for e, j in zip(entries, jobs, strict=True)]
    assert np.mean(found["apgd"]) > np.mean(found["pgd"])


def test_a_target_is_said(trained, attack_crafter, attack_jobs):
    (job,) = attack_jobs(count=1, answer="No", name="apgd", target="No", eps=8 / 255, steps=15, norm="linf")
    entry = attack_crafter().craft([job])[0]
    assert margin_of(trained, entry, job) < 0  # of the target's token: no other one is larger
    assert entry.record["objective"][-1] > entry.record["objective"][0]
    assert len(entry.record["objective"]) == 15


def test_under_eot_it_ends_where_it_is_and_not_at_a_lucky_draw():
    """The noise is far larger than the slope: the largest value says nothing, the gradients' sum everything."""
    clean, generator = grey(4), torch.Generator().manual_seed(0)

    def noisy(slots):
        value = (slots[0] - clean).flatten(1).sum(1)
        return value + 1000 * torch.randn(len(value), generator=generator)

    found = attack(eps=8 / 255, steps=25, eot=2).run(noisy, (clean,))[0]
    assert torch.allclose(found - clean, torch.full_like(clean, 8 / 255), atol=1e-6)
    lucky = attack(eps=8 / 255, steps=25).run(noisy, (clean,))[0]
    assert not torch.allclose(lucky, found)


def test_eot_goes_through_the_defence(attack_crafter, attack_jobs):
    (job,) = attack_jobs(count=1, name="apgd", eot=2, steps=4)
    (entry,) = attack_crafter(defense=choose({"sigma": 0.2})).craft([job])
    assert entry.record["randomness"]["sigma"] == 0.2
    assert len(entry.record["objective"]) == 4


def test_dlr_does_not_hang_on_the_scale_of_the_logits():
    from lmms_smoothguard.attacks.objective import _TOKEN_LOSSES

    torch.manual_seed(0)
    logits = torch.randn(3, 2, 9)
    labels = torch.randint(0, 9, (3, 2))
    found = _TOKEN_LOSSES["dlr"](logits, labels)
    assert torch.allclose(found, _TOKEN_LOSSES["dlr"](7 * logits, labels), atol=1e-5)
    for row in range(3):
        for place in range(2):
            z, y = logits[row, place], int(labels[row, place])
            ordered = z.sort(descending=True).values
            other = max(float(v) for n, v in enumerate(z) if n != y)
            assert float(found[row, place]) == pytest.approx(
                -(float(z[y]) - other) / float(ordered[0] - ordered[2]), rel=1e-4
            )


@pytest.mark.parametrize("options", [{"rho": 1.5}, {"alpha": -0.1}, {"rho": True}, {"alpha": "fast"}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=f"attack {next(iter(options))} is .*expected a number from 0 to 1"):
        attack(**options)
