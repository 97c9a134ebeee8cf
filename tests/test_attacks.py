from __future__ import annotations

import json
import stat

import numpy as np
import pytest
import torch
from PIL import Image

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.cache import AttackCache, content_key
from lmms_smoothguard.attacks.craft import Crafter, Job
from lmms_smoothguard.attacks.objective import AnswerLoss, Threat, answer_ids
from lmms_smoothguard.attacks.pgd import PGD
from lmms_smoothguard.attacks.pictures import distances
from lmms_smoothguard.attacks.rendering import Renderer
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import choose
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.fingerprint import model_fingerprint

YES_NO = {"yes": " No", "no": " Yes"}


@pytest.fixture
def jobs(trained, scenes, images, batch):
    """A job for every scene: its existence question, away from the right answer."""
    _, processor = trained

    def make(count=4, **settings):
        made = []
        for n in range(count):
            inputs = dict(batch(n))
            answer = tuple(answer_ids(processor.tokenizer, inputs["input_ids"][0].tolist(), "Yes"))
            made.append(Job(AttackSettings(**settings), (images[n],), inputs, answer))
        return made

    return make


@pytest.fixture
def crafter(trained, tmp_path):
    model, processor = trained

    def make(**kwargs):
        return Crafter(model, processor.image_processor, AttackCache(tmp_path / "attacks"), **kwargs)

    return make


def grey_levels(entry, job):
    clean = np.asarray(job.images[0]).astype(int)
    return entry.images[0].astype(int) - clean


@pytest.mark.parametrize("eps", [1 / 255, 4 / 255, 0.0137])
def test_linf_budget_holds_after_rounding(crafter, jobs, eps):
    listed = jobs(eps=eps, steps=3, step_size=2 / 255)
    for entry, job in zip(crafter().craft(listed), listed, strict=True):
        most = np.abs(grey_levels(entry, job)).max()
        assert 0 < most <= eps * 255 + 1e-6
        assert entry.record["linf"] == pytest.approx(most / 255, rel=1e-5)


@pytest.mark.parametrize("eps", [0.5, 1.5])
def test_l2_budget_holds_after_rounding(crafter, jobs, eps):
    listed = jobs(eps=eps, norm="l2", steps=20)
    for entry, job in zip(crafter().craft(listed), listed, strict=True):
        norm = np.linalg.norm(grey_levels(entry, job) / 255)
        assert 0.3 * eps < norm <= eps + 1e-6


def test_eps_0_is_the_clean_image(crafter, jobs):
    listed = jobs(eps=0.0)
    for entry, job in zip(crafter().craft(listed), listed, strict=True):
        assert not grey_levels(entry, job).any()


def test_pgd_fools_the_model_and_random_noise_of_the_same_size_does_not(trained, crafter, jobs, scenes):
    """Through the ordinary path: 8-bit PNG, the processor, generate."""
    model, processor = trained
    listed = jobs(count=12, eps=8 / 255, steps=20)
    rng = np.random.default_rng(0)
    fooled = {"pgd": 0, "random": 0}
    for entry, job in zip(crafter().craft(listed), listed, strict=True):
        offset = rng.choice([-8, 8], entry.images[0].shape)
        pictures = {
            "pgd": entry.images[0],
            "random": (np.asarray(job.images[0]).astype(int) + offset).clip(0, 255).astype(np.uint8),
        }
        for name, picture in pictures.items():
            pixels = processor.image_processor(images=[Image.fromarray(picture)], return_tensors="pt")["pixel_values"]
            out = model.generate(**{**job.inputs, "pixel_values": pixels}, max_new_tokens=4)
            answer = processor.decode(out[0, job.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            fooled[name] += answer.strip() != "Yes"
    assert fooled["pgd"] >= 10
    assert fooled["random"] <= 2


def test_a_target_text_can_be_forced(trained, crafter, batch, images):
    model, processor = trained
    inputs = dict(batch(0, question="Describe the image."))
    target = "A blue star."
    answer = answer_ids(processor.tokenizer, inputs["input_ids"][0].tolist(), target)
    job = Job(AttackSettings(eps=32 / 255, steps=80, target=target), (images[0],), inputs, tuple(answer))
    entry = crafter().craft([job])[0]
    pixels = processor.image_processor(images=[Image.fromarray(entry.images[0])], return_tensors="pt")["pixel_values"]
    out = model.generate(**{**inputs, "pixel_values": pixels}, max_new_tokens=12)
    assert target in processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_gradients_agree_with_finite_differences(trained, jobs):
    """Through resizing, normalisation and the model, for a picture of another size than the model's."""
    model, processor = trained
    job = jobs(count=1)[0]
    renderer = Renderer(processor.image_processor, model.device, torch.float32)
    prompt = {k: v for k, v in job.inputs.items() if k != "pixel_values"}
    loss = AnswerLoss(Threat(model, processor, renderer, (), [prompt], [job.answer]), "ce")
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 96, 80).requires_grad_()
    gradient = torch.autograd.grad(loss((picture,)).sum(), picture)[0]
    direction = gradient / gradient.norm()
    step = 1e-2
    with torch.no_grad():
        measured = (loss((picture + step * direction,)) - loss((picture - step * direction,))) / (2 * step)
    assert float(measured) == pytest.approx(float((gradient * direction).sum()), rel=0.05)


def test_the_loss_is_the_models_own_whatever_the_batch(trained, jobs):
    """Four rows, answers of three tokens, against one plain forward each; lengths must agree."""
    model, processor = trained
    listed = [Job(j.settings, j.images, j.inputs, (*j.answer, 7, 9 + n)) for n, j in enumerate(jobs(count=4))]
    listed = [j for j in listed if j.inputs["input_ids"].shape == listed[0].inputs["input_ids"].shape]
    assert len(listed) >= 2
    renderer = Renderer(processor.image_processor, model.device, torch.float32)
    texts = [{k: v for k, v in job.inputs.items() if k != "pixel_values"} for job in listed]
    packed = AnswerLoss(Threat(model, processor, renderer, (), texts, [job.answer for job in listed]), "ce")
    pictures = torch.stack([torch.from_numpy(np.array(job.images[0])).permute(2, 0, 1) / 255 for job in listed])
    with torch.no_grad():
        together = packed((pictures,))
        for row, job in enumerate(listed):
            ids = torch.cat([job.inputs["input_ids"], torch.tensor([job.answer])], dim=1)
            labels = ids.clone()
            labels[:, : job.inputs["input_ids"].shape[1]] = -100
            plain = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=job.inputs["pixel_values"],
                labels=labels,
            )
            assert float(together[row]) == pytest.approx(float(plain.loss), rel=1e-3, abs=1e-5)
    with pytest.raises(AttackError, match="several lengths"):
        AnswerLoss(Threat(model, processor, renderer, (), texts[:2], [(5, 6), (5,)]), "ce")


def test_an_answer_is_tokenised_as_the_model_says_it(trained, batch):
    model, processor = trained
    inputs = batch(0)
    out = model.generate(**inputs, max_new_tokens=4)
    said = [t for t in out[0, inputs["input_ids"].shape[1] :].tolist() if t != processor.tokenizer.eos_token_id]
    text = processor.decode(said)
    assert answer_ids(processor.tokenizer, inputs["input_ids"][0].tolist(), text.strip()) == said


def test_a_text_without_tokens(trained):
    class Mute:
        def __call__(self, text, **kwargs):
            return type("E", (), {"input_ids": []})

        def decode(self, ids, **kwargs):
            return ""

    with pytest.raises(AttackError, match="no tokens"):
        answer_ids(Mute(), [1], "x")


def test_a_preprocessing_that_differs_is_noticed(trained, crafter, jobs):
    job = jobs(count=1)[0]
    inputs = {**job.inputs, "pixel_values": job.inputs["pixel_values"] * 0.5 + 0.4}
    with pytest.raises(AttackError, match="does not reproduce pixel_values"):
        crafter().craft([Job(job.settings, job.images, inputs, job.answer)])


def test_the_model_is_left_as_it_was(trained, crafter, jobs, unchanged_random_state):
    model, _ = trained
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    mode = model.training
    crafter().craft(jobs(count=2, steps=2))
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    assert model.training == mode


class Still(PGD):
    """Stays where it starts."""

    def step(self, number, current, gradients):
        return current


def test_the_start_depends_on_the_image_and_the_seed_alone():
    settings = AttackSettings(steps=1)
    pictures = torch.rand(3, 3, 8, 8).mul(255).round() / 255
    flat = lambda slots: slots[0].flatten(1).sum(1)  # noqa: E731
    together = Still(settings).run(flat, (pictures,))[0]
    for row in range(3):
        assert torch.equal(Still(settings).run(flat, (pictures[row : row + 1],))[0][0], together[row])
    assert not torch.equal(Still(AttackSettings(steps=1, seed=1)).run(flat, (pictures,))[0], together)


def test_pgd_climbs_to_the_corner_of_a_linear_objective():
    """The optimum over the ball is known: eps times the sign of the slope, or along the slope."""
    torch.manual_seed(0)
    slope, clean = torch.randn(1, 3, 8, 8), torch.full((1, 3, 8, 8), 128 / 255)
    objective = lambda slots: (slots[0] * slope).flatten(1).sum(1)  # noqa: E731
    found = PGD(AttackSettings(eps=8 / 255, steps=40)).run(objective, (clean,))[0]
    assert torch.allclose(found - clean, 8 / 255 * slope.sign(), atol=1e-6)
    found = PGD(AttackSettings(eps=1.0, norm="l2", steps=60)).run(objective, (clean,))[0]
    assert float(objective((found,)) - objective((clean,))) == pytest.approx(float(slope.norm()), rel=0.05)
    assert distances((found,), (clean,))[0]["l2"] <= 1.0


# -- EOT ---------------------------------------------------------------------------------------------------------------


def test_eot_needs_a_defence(crafter, jobs):
    with pytest.raises(AttackError, match="attack_eot is 4"):
        crafter().craft(jobs(eot=4, steps=1))


def test_eot_goes_through_the_defences_noise_with_draws_of_its_own(crafter, jobs):
    job = jobs(count=1, eot=2, steps=3)
    weak, strong = choose({"sigma": 0.01}), choose({"sigma": 0.5})
    entries = [crafter(defense=defense).craft(job)[0] for defense in (weak, strong)]
    known = {"defense": "smoothguard", "sigma": 0.01, "noise_space": "normalized", "code": None}
    assert entries[0].record["randomness"] == known
    assert (entries[0].images[0] != entries[1].images[0]).any()
    reseeded = crafter(defense=choose(SmoothGuardConfig(sigma=0.5, seed=99))).craft(job)[0]
    assert (reseeded.images[0] == entries[1].images[0]).all()  # the evaluation's seed is nothing to the attacker


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_nothing_is_crafted_twice(crafter, jobs, monkeypatch):
    listed = jobs(count=3, steps=2)
    first = crafter().craft(listed)
    monkeypatch.setattr(PGD, "run", lambda *a, **k: pytest.fail("crafted again"))
    again = crafter().craft(list(reversed(listed)))
    for old, new in zip(first, reversed(again), strict=True):
        assert (old.images[0] == new.images[0]).all()


def test_any_change_of_what_matters_is_another_entry(crafter, jobs, trained, monkeypatch):
    job = jobs(count=1, steps=2)[0]
    maker = crafter()
    keys = {maker._key(job)}
    keys.add(maker._key(jobs(count=1, steps=3)[0]))
    keys.add(maker._key(jobs(count=2, steps=2)[1]))
    keys.add(maker._key(Job(job.settings, job.images, job.inputs, (*job.answer, 5))))
    monkeypatch.setattr(plugins, "provenance", lambda kind, name: "somebody's new source")
    keys.add(maker._key(job))
    maker.fingerprint = "another model's"
    keys.add(maker._key(job))
    assert len(keys) == 6


def test_an_attack_that_leaves_its_budget_is_refused(crafter, jobs, monkeypatch):
    monkeypatch.setattr(
        PGD, "run", lambda self, objective, clean, progress: tuple((c + 0.1).clamp(0, 1) for c in clean)
    )
    with pytest.raises(AttackError, match=r"'pgd' left its budget: linf 0\.1"):
        crafter().craft(jobs(count=1, eps=4 / 255))


def test_the_fingerprint_tells_weights_apart(trained):
    import copy

    model, _ = trained
    other = copy.deepcopy(model)
    assert model_fingerprint(other) == model_fingerprint(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.001)
    assert model_fingerprint(other) != model_fingerprint(model)


def test_a_killed_run_goes_on(crafter, jobs, monkeypatch):
    listed = jobs(count=4, steps=2)
    run, calls = PGD.run, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(PGD, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        crafter(batch_size=1).craft(listed)
    assert len(crafter(batch_size=1).craft(listed)) == 4
    assert len(calls) == 5  # two done, one killed, two left


def test_a_damaged_entry_is_made_again(tmp_path, caplog):
    cache = AttackCache(tmp_path)
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    key = content_key(a=1)
    cache.put(key, [picture], {"linf": 0.0})
    assert (cache.get(key).images[0] == picture).all()
    image = next(tmp_path.rglob("*.png"))
    image.write_bytes(image.read_bytes()[:-4])
    assert cache.get(key) is None
    assert "damaged" in caplog.text
    cache.put(key, [picture], {"linf": 0.0})
    record = next(tmp_path.rglob("*.json"))
    record.write_text("{")
    assert cache.get(key) is None
    record.write_text(json.dumps([1]))
    assert cache.get(key) is None
    image.unlink()
    assert AttackCache(tmp_path).get(content_key(a=2)) is None


def test_a_record_is_written_after_its_images(tmp_path, monkeypatch):
    """Killed between the two, there is no entry."""
    from lmms_smoothguard.attacks import cache as module

    cache, replace = AttackCache(tmp_path), module._replace

    def dies(path, data):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        replace(path, data)

    monkeypatch.setattr(module, "_replace", dies)
    with pytest.raises(KeyboardInterrupt):
        cache.put(content_key(a=1), [np.zeros((2, 2, 3), np.uint8)], {})
    assert list(tmp_path.rglob("*.png"))
    assert cache.get(content_key(a=1)) is None


def test_an_unwritable_cache(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(AttackError, match="cannot be written to"):
        AttackCache(blocked / "cache")
    assert stat.S_ISREG(blocked.stat().st_mode)


def test_rounding_keeps_most_of_a_small_l2_change():
    """Truncation towards the clean image would lose nearly all of it."""
    torch.manual_seed(0)
    clean = torch.full((2, 3, 336, 336), 128 / 255)
    attack = PGD(AttackSettings(eps=2.0, norm="l2"))
    wanted = torch.randn(clean.shape)
    wanted = wanted / wanted.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 2.0
    found = attack.to_whole_steps(clean + wanted, clean) - clean
    assert (found.flatten(1).norm(dim=1) <= 2.0 + 1e-5).all()
    assert (found.flatten(1).norm(dim=1) >= 1.9).all()
    assert ((found * 255) - (found * 255).round()).abs().max() < 1e-3


def test_the_fingerprint_tells_configs_apart(trained):
    import copy

    model, _ = trained
    other = copy.deepcopy(model)
    other.config.vision_feature_layer = -2
    assert model_fingerprint(other) != model_fingerprint(model)
    other = copy.deepcopy(model)
    other.generation_config.repetition_penalty = 1.3
    assert model_fingerprint(other) != model_fingerprint(model)
    other = copy.deepcopy(model)
    other.generation_config.smoothguard = {"sigma": 0.3}
    assert model_fingerprint(other) == model_fingerprint(model)  # an attack is crafted once for all defences
