"""Patches: where they lie, that nothing around them changes, that they work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from lmms_smoothguard.attacks.cache import AttackCache
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.objective import answer_ids
from lmms_smoothguard.attacks.patch import Patch, PatchOptions
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.errors import AttackError, ConfigError


def settings(**fields):
    return AttackSettings.parse("patch", fields)


def pictures(count=3, height=40, width=60):
    torch.manual_seed(0)
    return (torch.randint(0, 256, (count, 3, height, width)) / 255,)


def changed(new, old):
    """(batch, height, width): where any channel differs, bit for bit."""
    return (new != old).any(1)


def box(mask):
    """Top, left, height, width of what is True."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


def bright(slots):
    return sum(slot.flatten(1).sum(1) for slot in slots)


@pytest.mark.parametrize(
    ("place", "top", "left"),
    [
        ("center", 15, 22),
        ("top-left", 0, 0),
        ("top-right", 0, 45),
        ("bottom-left", 30, 0),
        ("bottom-right", 30, 45),
        ("1,0.5", 15, 45),
        ("0:1", 30, 0),
    ],
)
def test_the_patch_lies_where_it_is_asked_for_and_nothing_else_changes(place, top, left):
    clean = pictures()
    found = Patch(settings(size=1 / 16, place=place, steps=3)).run(bright, clean)[0]
    for mask in changed(found, clean[0]):
        assert box(mask) == (top, left, 10, 15)


@pytest.mark.parametrize("start", [True, False])
def test_no_bit_changes_outside_even_of_pixels_that_are_no_grey_levels(start):
    clean = (torch.rand(2, 3, 33, 47, generator=torch.Generator().manual_seed(1)),)
    attack = Patch(settings(size=0.1, place="0.3,0.7", steps=3, momentum=0.5, random_start=start))
    found = attack.run(bright, clean)[0]
    mask = attack._masks(clean[0]).expand_as(found)
    assert torch.equal(found[~mask], clean[0][~mask])
    assert (found[mask] != clean[0][mask]).float().mean() > 0.2


def test_a_full_patch_reaches_any_colour_and_a_small_eps_holds_inside():
    """The optimum is known: white, or eps brighter."""
    clean = pictures()
    white = Patch(settings(size=0.25)).run(bright, clean)[0]
    mask = Patch(settings(size=0.25))._masks(clean[0]).expand_as(white)
    assert (white[mask] == 1).all()
    near = Patch(settings(size=0.25, eps="8/255")).run(bright, clean)[0]
    assert torch.allclose(near[mask], (clean[0][mask] + 8 / 255).clamp(max=1), atol=1e-6)


def test_a_random_place_is_a_function_of_seed_and_picture_alone():
    clean = pictures(count=4)
    attack = Patch(settings(place="random", steps=1))
    together = attack.run(bright, clean)[0]
    boxes = {box(mask)[:2] for mask in changed(together, clean[0])}
    assert len(boxes) == 4
    for row in range(4):
        alone = attack.run(bright, (clean[0][row : row + 1],))[0]
        assert torch.equal(alone[0], together[row])
    other = Patch(settings(place="random", steps=1, seed=1)).run(bright, clean)[0]
    assert boxes.isdisjoint({box(mask)[:2] for mask in changed(other, clean[0])})


def test_restarts_share_the_place():
    clean = pictures(count=2)
    found = Patch(settings(place="random", steps=2, restarts=3, size=0.1)).run(bright, clean)[0]
    mask = Patch(settings(place="random", size=0.1))._masks(clean[0]).expand_as(found)
    assert torch.equal(found[~mask], clean[0][~mask])


def test_every_picture_has_a_patch_of_its_size():
    clean = (*pictures(height=40, width=60), *pictures(height=31, width=20))
    found = Patch(settings(size=0.1, steps=2)).run(bright, clean)
    for new, old in zip(found, clean, strict=True):
        share = changed(new, old).float().mean()
        assert share == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "attack size is 0; expected the patch's share"),
        ({"size": 1.5}, "attack size is 1.5"),
        ({"size": "big"}, "attack size is 'big'"),
        ({"size": math.nan}, "attack size is nan"),
        ({"place": "centre"}, "did you mean 'center'"),
        ({"place": "0.5"}, "attack place is '0.5'"),
        ({"place": "1/2"}, "attack place is '1/2'"),
        ({"place": "2,0"}, "expected x and y from 0"),
        ({"place": "nan,0"}, "expected x and y from 0"),
        ({"momentum": 2}, "attack momentum is 2"),
        ({"norm": "l2"}, "attack norm is 'l2'; attack=patch bounds every pixel"),
    ],
)
def test_bad_options(fields, message):
    with pytest.raises(ConfigError, match=message):
        settings(**fields)


def test_a_patch_is_any_colour_by_default_and_its_settings_are_flat():
    made = AttackSettings.parse({"name": "patch", "size": "1/20"}, {"eps": "32/255", "place": "0,1"})
    assert made.options == PatchOptions(size=0.05, place="0,1")
    assert AttackSettings.parse("patch").eps == 1.0
    assert AttackSettings.parse(made.to_dict()) == made


def test_a_patch_that_is_cropped_away_says_so():
    class Blind:
        def __call__(self, slots):
            return slots[0][..., 20:40].flatten(1).sum(1)

    with pytest.raises(AttackError, match="no gradient") as caught:
        Patch(settings(place="top-left", steps=1)).run(Blind(), pictures())
    assert "place top-left" in caught.value.__notes__[0]


def test_a_patch_turns_answers_through_the_ordinary_path(trained, scenes, images, batch, tmp_path):
    model, processor = trained
    jobs = []
    for n in range(6):
        inputs = dict(batch(n))
        answer = answer_ids(processor.tokenizer, inputs["input_ids"][0].tolist(), "Yes")
        jobs.append(Job(settings(size=0.1, steps=30), (images[n],), inputs, tuple(answer)))
    fooled = 0
    for entry, job in zip(Crafter(model, processor, AttackCache(tmp_path), quiet=True).craft(jobs), jobs, strict=True):
        change = (entry.images[0] != np.asarray(job.images[0])).any(-1)
        assert 0 < change.sum() <= 20 * 20
        assert box(torch.from_numpy(change))[:2] == (22, 22)
        pixels = processor.image_processor(images=[Image.fromarray(entry.images[0])], return_tensors="pt")[
            "pixel_values"
        ]
        out = model.generate(**{**job.inputs, "pixel_values": pixels}, max_new_tokens=4)
        fooled += processor.decode(out[0, job.inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == "No"
    assert fooled >= 4
