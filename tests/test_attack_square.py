"""Square Attack: its schedule and shapes against the paper, known optima, what it asks and what it is told."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from attack_jobs import grey_levels, margin_of

from lmms_smoothguard.attacks.craft import Crafter
from lmms_smoothguard.attacks.objective import AnswerLoss, Threat
from lmms_smoothguard.attacks.pictures import distances, norms
from lmms_smoothguard.attacks.rendering import Renderer
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.attacks.square import Square
from lmms_smoothguard.attacks.squares import Window, bump, moved, side, tiles
from lmms_smoothguard.choice import choose
from lmms_smoothguard.errors import AttackError, ConfigError


def attack(**settings):
    return Square(AttackSettings.parse("square", settings))


def grey(rows=1, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(96, 160, (rows, 3, size, size), generator=generator) / 255


# -- the paper's shapes ------------------------------------------------------------------------------------------------


def test_the_squares_shrink_as_published():
    """Section 3.2: p is halved at iterations 10, 50, 200, ... of 10,000, rescaled for other budgets; in the authors' code that
    is after the square of that number, counted from 0."""
    shape = torch.Size((3, 100, 100))
    share = {0: 0.8, 10: 0.8, 11: 0.4, 50: 0.4, 51: 0.2, 200: 0.2, 201: 0.1, 1000: 0.05, 1001: 0.025}
    share |= {8000: 0.8 / 256, 8001: 0.8 / 512}
    for number, expected in share.items():
        assert side(number, 10_000, 0.8, shape) == max(1, round(expected**0.5 * 100)), number
    assert side(20, 1000, 0.8, shape) == side(200, 10_000, 0.8, shape)
    sizes = [side(number, 300, 0.3, torch.Size((3, 8, 6)), odd=True) for number in range(300)]
    assert all(size % 2 and 3 <= size <= 6 for size in sizes)
    assert side(0, 300, 1.0, torch.Size((3, 8, 6))) == 6


def test_the_search_counts_its_squares_from_0():
    """Of 1,000 queries the squares 0 and 1 are of the first side, sqrt(.36) of the picture's, and 2 has half the area."""
    seen = []

    def objective(slots):
        seen.append(slots[0][0].clone())
        return torch.tensor([1.0 * len(seen)])  # everything is taken

    attack(eps=8 / 255, steps=1000, p_init=0.36, random_start=False).search(
        objective, (grey(size=10),), (grey(size=10),), lambda number, value: None
    )
    changed = [(a != b).any(0) for a, b in itertools.islice(itertools.pairwise(seen), 3)]
    assert [(int(mask.any(0).sum()), int(mask.any(1).sum())) for mask in changed] == [(6, 6), (6, 6), (4, 4)]


def test_the_bump_is_the_papers():
    """Section 3.4, entry by entry, counted from 1."""
    size = 7

    def eta(height, width, r, s):
        n = height // 2
        depth = n - max(abs(r - n - 1), abs(s - width // 2 - 1))
        return sum(1 / (n + 1 - k) ** 2 for k in range(depth + 1))

    left = size // 2
    expected = [
        [eta(size, left, r, s) if s <= left else -eta(size, size - left, r, s - left) for s in range(1, size + 1)]
        for r in range(1, size + 1)
    ]
    assert torch.allclose(bump(size), torch.tensor(expected), atol=1e-6)
    assert bump(size)[3].abs().max() == bump(size).abs().max()  # highest in the middle row


def test_an_l2_move_is_algorithm_3_computed_by_hand():
    """eta of length 6, so eta* = eta / 6; change of length sqrt(5) and eps sqrt(7), so each of two channels gets 1 more."""
    change = torch.tensor([[[[0.6, 0, 0, 0.8], [0, 0, 0, 0]], [[0, 2, 0, 0], [0, 0, 0, 0]]]])
    new, old = (Window.at(torch.tensor([place]), 2, change.shape) for place in ([0.0, 0.0], [0.0, 0.9]))
    eta = torch.tensor([[3.0, -3], [3, -3]])
    after = moved(change, 7**0.5, new, old, eta * torch.tensor([1.0, -1]).view(1, 2, 1, 1))
    # The old content has unit length beside eta*: (1, 0, 0, 0) + (.5, -.5, .5, -.5), and (0, 1, 0, 0) - the same.
    first, second = (2 / 3) ** 0.5, (5 / 3) ** 0.5
    expected = [[[1.5, -0.5, 0, 0], [0.5, -0.5, 0, 0]], [[-0.5, 1.5, 0, 0], [-0.5, 0.5, 0, 0]]]
    assert torch.allclose(after, torch.tensor([expected]) * torch.tensor([first, second]).view(1, 2, 1, 1), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 16, 10), (3, 2, 3)])
def test_an_l2_move_spends_the_whole_budget_and_moves_what_was_elsewhere(shape):
    torch.manual_seed(0)
    change = tiles(torch.randn(4, 1000).sign(), torch.Size((4, *shape)))
    change = 0.9 * change / norms(change)
    size = min(3, *shape[1:])
    new, old = (Window.at(torch.rand(4, 2), size, torch.Size((4, *shape))) for _ in range(2))
    after = moved(change, 1.0, new, old, bump(size) * torch.ones(4, 3, 1, 1))
    assert torch.allclose(norms(after), torch.ones(4, 1, 1, 1), atol=1e-5)
    untouched = new.painted(old.painted(torch.ones_like(change), 0.0), 0.0)
    assert torch.allclose(after * untouched, change * untouched)
    assert not (old.painted(after, 0.0) - after).masked_fill(new.painted(torch.zeros_like(after), 1.0) > 0, 0).any()


def test_windows_reach_every_corner_and_no_further():
    shape = torch.Size((3, 3, 5, 7))
    window = Window.at(torch.tensor([[0.0, 0.0], [0.9999999, 0.9999999], [0.5, 0.0]]), 3, shape)
    marks = window.painted(torch.zeros(shape), 1.0)
    assert marks.sum((1, 2, 3)).tolist() == [27.0] * 3
    assert marks[0, :, :3, :3].all() and marks[1, :, 2:, 4:].all() and marks[2, :, 1:4, :3].all()
    content = torch.arange(81.0).view(3, 3, 3, 3)
    assert torch.equal(window.read(window.painted(torch.zeros(shape), content)), content)


# -- known optima, rows, restarts --------------------------------------------------------------------------------------


def test_it_finds_the_optimum_of_a_linear_objective():
    torch.manual_seed(0)
    slope, clean = torch.randn(1, 3, 4, 4), torch.full((1, 3, 4, 4), 128 / 255)
    objective = lambda slots: (slots[0] * slope).flatten(1).sum(1)  # noqa: E731
    found = attack(eps=8 / 255, steps=1000, p_init=0.3).run(objective, (clean,))[0]
    assert torch.allclose(found - clean, 8 / 255 * slope.sign(), atol=1e-6)


def test_in_l2_it_goes_far_along_a_smooth_linear_objective():
    slope, clean = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8).clone(), torch.full((1, 3, 8, 8), 128 / 255)
    objective = lambda slots: (slots[0] * slope).flatten(1).sum(1)  # noqa: E731
    found = attack(eps=1.0, norm="l2", steps=1000, p_init=0.3).run(objective, (clean,))[0]
    assert float(objective((found,)) - objective((clean,))) > 0.5 * float(slope.norm())  # a random change: 0.07
    assert distances((found,), (clean,))[0]["l2"] <= 1.0


def test_it_climbs_stairs_that_have_no_gradient():
    """Largest where every value is 8 levels off in its own direction; flat almost everywhere, so nothing for PGD."""
    torch.manual_seed(0)
    way, clean = torch.randn(1, 3, 4, 4).sign(), torch.full((1, 3, 4, 4), 128 / 255)
    objective = lambda slots: ((slots[0] - clean) * way * 255 / 4).round().flatten(1).sum(1)  # noqa: E731
    found = attack(eps=8 / 255, steps=1000, p_init=0.3).run(objective, (clean,))
    assert float(objective(found)) == 2 * 48


@pytest.mark.parametrize("norm, eps", [("linf", 8 / 255), ("l2", 1.0)])
@pytest.mark.parametrize("feedback", ["scores", "answers"])
def test_a_row_knows_nothing_of_its_neighbours(norm, eps, feedback):
    """Two pictures each, two restarts; alone and together the same bits, inside the budget."""
    first, second = grey(3, seed=1), grey(3, size=6, seed=2)

    def objective(slots):
        value = torch.cos(200 * slots[0]).flatten(1).sum(1) + torch.sin(90 * slots[1]).flatten(1).sum(1)
        return value if feedback == "scores" else (value > 0).float()

    one = attack(norm=norm, eps=eps, steps=80, feedback=feedback, probes=3, restarts=2)
    together = one.run(objective, (first, second))
    for row in range(3):
        alone = one.run(objective, (first[row : row + 1], second[row : row + 1]))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    for new, old in zip(together, (first, second), strict=True):
        assert max(d[norm] for d in distances((new,), (old,))) <= eps + 1e-6
        assert (new != old).any()


def test_every_picture_of_a_request_gets_its_squares():
    torch.manual_seed(0)
    slope, first, second = torch.randn(1, 3, 2, 2), grey(1), grey(1, size=2)
    objective = lambda slots: (slots[1] * slope).flatten(1).sum(1)  # noqa: E731
    found = attack(eps=8 / 255, steps=400).run(objective, (first, second))
    assert torch.allclose(found[1] - second, 8 / 255 * slope.sign(), atol=1e-6)


def test_no_query_asks_about_the_same_picture_again():
    """One square in eight would have the signs that stand there already."""
    seen = []

    def objective(slots):
        seen.append(slots[0].clone())
        return torch.arange(len(seen), len(seen) + 1).expand(4) * 1.0  # everything is taken

    attack(eps=8 / 255, steps=100).search(objective, (grey(4),), (grey(4),), lambda number, value: None)
    assert all((a != b).flatten(1).any(1).all() for a, b in itertools.pairwise(seen))


def test_more_restarts_are_never_worse():
    clean = grey(4)
    objective = lambda slots: torch.cos(150 * slots[0]).flatten(1).sum(1)  # noqa: E731
    few, many = (attack(eps=8 / 255, steps=30, restarts=n).run(objective, (clean,)) for n in (1, 4))
    assert (objective(many) >= objective(few)).all()
    assert (objective(many) > objective(few)).any()


@pytest.mark.parametrize(
    "settings, queries",
    [({}, 50), ({"feedback": "answers", "probes": 6}, 49), ({"eot": 2}, 50), ({"random_start": False}, 50)],
)
def test_steps_are_queries_and_none_asks_for_a_gradient(settings, queries):
    """(1 + 6 probes) * 7 pictures = 49; a comparison under EOT asks for both pictures."""
    clean, asked, told = grey(3), [], []

    def objective(slots):
        assert not torch.is_grad_enabled()
        asked.append(len(slots[0]))
        if "feedback" in settings:
            assert torch.equal(slots[0], (slots[0] * 255).round() / 255)  # nobody can send another picture
        return (slots[0].mean((1, 2, 3)) > 0.5).float()

    one = attack(steps=50, **settings)
    one.search(objective, (clean,), (clean,), lambda number, value: told.append(number))
    assert queries - (1 if "eot" in settings else 0) == sum(asked) // 3
    assert told == list(range(1, len(told) + 1)) and len(told) in (49, 50)


def test_under_noise_no_lucky_draw_is_kept():
    """Scores that are mostly noise, the same for both pictures of a call: the signal is climbed all the same."""
    clean, generator = torch.full((1, 3, 2, 2), 128 / 255), torch.Generator().manual_seed(0)

    def objective(slots):
        return (slots[0] - 128 / 255).flatten(1).sum(1) * 255 + 1000 * torch.randn(1, generator=generator)

    found = attack(eps=8 / 255, steps=600, eot=2, p_init=0.3).run(objective, (clean,))[0]
    assert torch.allclose(found - clean, torch.full_like(clean, 8 / 255), atol=1e-6)


# -- on models ---------------------------------------------------------------------------------------------------------


def test_scores_climb_on_the_trained_model(trained, attack_crafter, attack_jobs):
    jobs = attack_jobs(count=3, name="square", eps=8 / 255, steps=60)
    for entry, job in zip(attack_crafter().craft(jobs), jobs, strict=True):
        climbed = entry.record["objective"]
        assert len(climbed) == 60 and climbed == sorted(climbed) and climbed[-1] > climbed[0] + 0.5
        assert climbed[-1] == pytest.approx(margin_of(trained, entry, job), abs=1e-3)
        assert np.abs(grey_levels(entry, job)).max() == 8


def test_answers_tell_no_more_than_decoding_does(trained, attack_jobs):
    """What the decision-only attacker is told equals whether `generate` says something else."""
    model, processor = trained
    jobs = [job for job in attack_jobs(count=8) if job.inputs["input_ids"].shape[1] == 79][:4] or attack_jobs(count=1)
    pictures = torch.stack([torch.from_numpy(np.array(job.images[0])).permute(2, 0, 1) / 255 for job in jobs])
    torch.manual_seed(1)
    noisy = (pictures + 0.35 * torch.randn(pictures.shape)).clamp(0, 1)
    renderer = Renderer(processor.image_processor, model.device, torch.float32)
    texts = [{k: v for k, v in job.inputs.items() if k != "pixel_values"} for job in jobs]
    threat = Threat(model, processor, renderer, (), texts, [job.answer for job in jobs])
    with torch.no_grad():
        away, forced = (AnswerLoss(threat, kind)((noisy,)) for kind in ("led away", "forced"))
        pixels = renderer((noisy,))["pixel_values"]
        for row, job in enumerate(jobs):
            out = model.generate(**{**job.inputs, "pixel_values": pixels[row : row + 1]}, max_new_tokens=3)
            begins = out[0, job.inputs["input_ids"].shape[1] :][: len(job.answer)].tolist() == list(job.answer)
            assert (float(away[row]), float(forced[row])) == (float(not begins), float(begins))


@pytest.mark.parametrize("target, told", [(None, 0.0), ("No", 0.0), ("Yes", 1.0)])
def test_what_an_answer_tells_of_a_picture_that_changes_nothing(attack_crafter, attack_jobs, target, told):
    """The answer is yes, and a grey level does not alter it: not led away, no no is forced, a yes would be."""
    settings = {"name": "square", "feedback": "answers", "probes": 0, "steps": 1, "eps": 1 / 255, "target": target}
    (entry,) = attack_crafter().craft(attack_jobs(count=1, answer=target or "Yes", **settings))
    assert entry.record["objective"] == [told]


def test_probes_show_the_way_where_answers_alone_are_a_plateau():
    """The answer changes three tenths of the way to the ball's best corner; a random corner is a twentieth off."""
    torch.manual_seed(0)
    clean, slope = grey(6), torch.randn(6, 3, 8, 8)
    reach = 16 / 255 * slope.abs().flatten(1).sum(1)

    def decision(slots):
        times = len(slots[0]) // 6
        along = ((slots[0] - clean.repeat(times, 1, 1, 1)) * slope.repeat(times, 1, 1, 1)).flatten(1).sum(1)
        return (along > 0.3 * reach.repeat(times)).float()

    seeing, blind = (
        attack(feedback="answers", eps=16 / 255, steps=4800, probes=probes).run(decision, (clean,))
        for probes in (31, 0)
    )
    assert decision(seeing).sum() >= 3 > 1 >= decision(blind).sum()


class Int8Linear(torch.nn.Module):
    """Weights in 8 bits, and a kernel that passes no gradient."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight8", (linear.weight / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        with torch.no_grad():
            return torch.nn.functional.linear(x, self.weight8 * self.scale, self.bias)


@pytest.fixture(scope="module")
def quantised(trained):
    model = copy.deepcopy(trained[0]).requires_grad_(False)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear:
                setattr(module, name, Int8Linear(child))
    return model


def test_a_quantised_model_refuses_gradients_and_yields_to_squares(quantised, attack_crafter, attack_jobs):
    crafter: Crafter = attack_crafter(model=quantised)
    for name in ("pgd", "apgd"):
        with pytest.raises(AttackError, match=r"no gradient reaches the pixels.*attack=square"):
            crafter.craft(attack_jobs(count=1, name=name, steps=2))
    (entry,) = crafter.craft(attack_jobs(count=1, name="square", eps=8 / 255, steps=30))
    assert entry.record["objective"][-1] > entry.record["objective"][0]


def test_eot_goes_through_the_defence(attack_crafter, attack_jobs):
    (job,) = attack_jobs(count=1, name="square", eot=2, steps=8)
    (entry,) = attack_crafter(defense=choose({"sigma": 0.2})).craft([job])
    assert entry.record["randomness"]["sigma"] == 0.2
    assert np.abs(grey_levels(entry, job)).max() == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"feedback": "answer"}, "did you mean 'answers'"),
        ({"p_init": 0}, "attack p_init is 0; expected a share"),
        ({"probes": -1}, "attack probes is -1"),
        ({"probe_sigma": "wide"}, "attack probe_sigma is 'wide'"),
        ({"feedback": "answers", "steps": 31}, "steps is 31 queries, and judging one picture costs 32"),
        ({"eot": 3, "steps": 1}, "steps is 1 queries, each the mean of 3 passes, and judging one picture costs 2"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    """Refused before anything runs."""
    with pytest.raises(ConfigError, match=message):
        AttackSettings.parse("square", settings)
