"""What an attack is asked to do, layer by layer; starts, restarts, momentum; gradients that cannot be used."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lmms_smoothguard.attacks.base import IteratedAttack, value_and_gradients
from lmms_smoothguard.attacks.media import PICTURES
from lmms_smoothguard.attacks.objective import AnswerLoss, Threat
from lmms_smoothguard.attacks.pgd import PGD, PGDOptions
from lmms_smoothguard.attacks.precision import exact_logits
from lmms_smoothguard.attacks.rendering import Renderer
from lmms_smoothguard.attacks.settings import AttackSettings, options_of
from lmms_smoothguard.errors import AttackError, ConfigError
from lmms_smoothguard.tiny.model import MODEL_DIR

CLEAN = (torch.arange(3 * 3 * 8 * 8, dtype=torch.float32).view(3, 3, 8, 8) % 256 / 255,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WildOptions:
    size: float = 0.1
    place: str = "center"


class Wild(PGD):
    """An attack from elsewhere, with a budget and options of its own."""

    options = WildOptions
    defaults = {"eps": 1.0, "steps": 7}  # noqa: RUF012


class Greedy(PGD):
    options = dataclasses.make_dataclass("Own", [("steps", int, 3)], frozen=True)


@pytest.fixture
def wild(monkeypatch):
    from lmms_smoothguard import plugins

    offers, load = plugins.offers, plugins.load
    found = {"wild": Wild, "greedy": Greedy}
    monkeypatch.setattr(
        plugins,
        "offers",
        lambda kind, *rest: offers(kind, *rest) | {name: plugins.Offer(f"tests:{name}", "tests") for name in found},
    )
    monkeypatch.setattr(plugins, "load", lambda kind, name, *rest: found.get(name) or load(kind, name, *rest))


# -- settings ----------------------------------------------------------------------------------------------------------


def test_options_are_written_beside_the_common_settings():
    settings = AttackSettings.parse({"name": "pgd", "momentum": "0.9", "eps": "8/255"})
    assert settings.options == PGDOptions(momentum=0.9)
    assert settings.to_dict()["momentum"] == 0.9
    assert "options" not in settings.to_dict()
    assert AttackSettings.parse(settings.to_dict()) == settings


def test_an_attacks_own_defaults_come_with_its_name(wild):
    assert AttackSettings.parse("wild").eps == 1.0
    assert AttackSettings.parse("wild").options == WildOptions()
    # A task's budget was meant for the attack it names; what the user says themselves stays.
    task = {"name": "pgd", "eps": "4/255", "steps": 40, "momentum": 0.5, "norm": "l2"}
    merged = AttackSettings.parse(task, {"name": "wild", "steps": 9, "size": "1/4"})
    assert (merged.eps, merged.steps, merged.norm, merged.options.size) == (1.0, 9, "l2", 0.25)
    assert "momentum" not in merged.to_dict()
    back = AttackSettings.parse({"name": "wild", "size": 0.3, "seed": 4}, {"name": "pgd"})
    assert (back.options, back.seed) == (PGDOptions(), 4)


@pytest.mark.parametrize(
    ("layers", "hint"),
    [
        (({"name": "pgd", "momentun": 1},), "did you mean 'momentum'"),
        (({"name": "pgd"}, {"size": 0.2}), "unknown attack setting 'size' of pgd"),
        (({"name": "pgd", "momentum": 2},), "momentum is 2; expected a number from 0 to 1"),
        (({"name": "pgd", "momentum": True},), "momentum is True"),
        (({"restarts": 0},), "restarts is 0; expected a whole number of at least 1"),
        ((7,), "attack is 7"),
        (("greedy",), "option 'steps', a name of the common settings"),
    ],
)
def test_what_an_attack_does_not_know_is_named(wild, layers, hint):
    with pytest.raises(ConfigError, match=hint):
        AttackSettings.parse(*layers)


def test_options_of_another_attack_are_refused(wild):
    with pytest.raises(ConfigError, match="options of attack 'pgd'"):
        AttackSettings(name="pgd", options=WildOptions())
    with pytest.raises(ConfigError, match="unknown attack 'pdg'; did you mean 'pgd'"):
        options_of("pdg")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_budget_below_one_grey_level_is_refused_because_rounding_would_undo_it(norm):
    with pytest.raises(ConfigError, match=r"eps is 0\.003, less than one grey level"):
        AttackSettings.parse({"name": "square", "norm": norm, "eps": 0.003})
    either = AttackSettings.parse({"norm": norm, "eps": 0.003})  # enough for a sound
    with pytest.raises(ConfigError, match=r"eps is 0\.003, less than one grey level"):
        either.check_medium(PICTURES)
    with pytest.raises(ConfigError, match=r"eps is 3e-05, less than one step of 16-bit PCM.*expected 1/32768 or more"):
        AttackSettings.parse({"norm": norm, "eps": 3e-5})
    assert [AttackSettings.parse({"norm": norm, "eps": eps}).eps for eps in (0, "1/255")] == [0, 1 / 255]


def test_more_than_full_scale_is_said_in_the_terms_of_what_the_attack_changes():
    with pytest.raises(
        ConfigError, match=r"eps is 2, more than full scale; .*amplitude, full scale 1, such as 0\.0005.*2/255"
    ):
        AttackSettings.parse({"eps": "2"})
    with pytest.raises(ConfigError, match=r"whole range of a pixel; grey levels are written as 2/255$"):
        AttackSettings.parse({"name": "square", "eps": "2"})


def test_a_budget_in_decibels_may_be_written_as_an_eps():
    asked = AttackSettings.parse({"norm": "l2", "snr": 40})
    for text in ("40dB", " 40 db", "40.0dB"):
        assert AttackSettings.parse({"eps": text}) == asked
    assert AttackSettings.parse({"eps": "4/255", "norm": "linf"}, {"eps": "40dB"}) == asked  # over a task's own
    assert AttackSettings.parse({"eps": "40dB"}, {"eps": "0.5"}).to_dict()["eps"] == 0.5
    for layer, hint in (
        ({"eps": "40dB", "norm": "linf"}, "snr is 40, of L2 norms, and norm 'linf'"),
        ({"eps": "40dB", "snr": 30}, "eps is '40dB' and snr 30; expected one of them"),
        ({"eps": "loud dB"}, "eps is 'loud dB'"),
        ({"eps": "loudB"}, "eps is 'loudB'"),
        ({"name": "patch", "eps": "40dB"}, "snr is 40, a budget of sounds, and attack 'patch' changes pictures"),
    ):
        with pytest.raises(ConfigError, match=hint):
            AttackSettings.parse(layer)


def test_model_args_may_set_an_option_of_the_attack_that_a_task_names():
    from lmms_smoothguard.harness.options import take_options

    options = take_options({"attack_momentum": "0.5"})
    assert options.attack_on({"attack": {"name": "pgd", "eps": "2/255"}}).settings.options.momentum == 0.5
    with pytest.raises(ConfigError, match="did you mean 'attack_momentum'"):
        take_options({"attack_momentun": "0.5"})


# -- restarts and momentum ---------------------------------------------------------------------------------------------


class Still(IteratedAttack):
    """Stays where it starts."""

    options = PGDOptions

    def step(self, number, current, gradients):
        return current


def brightness(slots):
    return slots[0].flatten(1).sum(1)


def test_of_several_restarts_each_row_keeps_its_best():
    one = Still(AttackSettings(steps=1)).run(brightness, CLEAN)[0]
    four = Still(AttackSettings(steps=1, restarts=4)).run(brightness, CLEAN)[0]
    assert (brightness((four,)) >= brightness((one,))).all()
    assert (brightness((four,)) > brightness((one,))).any()  # four starts are not the same one
    lone = Still(AttackSettings(steps=1, restarts=4)).run(brightness, (CLEAN[0][1:2],))[0]
    assert torch.equal(lone[0], four[1])  # whatever the batch
    seen = []
    Still(AttackSettings(steps=2, restarts=4)).run(brightness, CLEAN, lambda number, value: seen.append(value))
    assert [value.shape for value in seen] == [(3,), (3,)]
    assert (seen[0] >= brightness((four,)) - 1).all()  # the best of the four, before it is rounded


def test_momentum_keeps_going_where_the_gradient_turns():
    """On a slope whose sign flips every step, plain steps go to and fro; a velocity remembers the first direction."""
    gradients = [1.0, -0.5, 1.0, -0.5, 1.0, -0.5, 1.0, -0.5]

    class Flipping(torch.autograd.Function):
        @staticmethod
        def forward(context, pictures, number):
            context.slope = gradients[number]
            return pictures.flatten(1).sum(1)

        @staticmethod
        def backward(context, towards):
            return towards.view(-1, 1, 1, 1).expand(-1, 3, 8, 8) * context.slope, None

    def travelled(momentum):
        count = iter(range(len(gradients)))
        settings = AttackSettings.parse(
            {"momentum": momentum, "eps": 8 / 255, "steps": 8, "step_size": 1 / 255, "random_start": False}
        )
        clean = (torch.full((1, 3, 8, 8), 0.5),)
        search = PGD(settings).search(
            lambda slots: Flipping.apply(slots[0], next(count)), clean, clean, lambda *_: None
        )
        return float((search[0] - clean[0]).mean() * 255)

    assert travelled(0.0) == pytest.approx(0.0, abs=1e-3)
    # Each gradient counts as its sign (divided by its mean absolute value): 1, -1 + m, ... stays >= 0 for m = 1.
    assert travelled(1.0) == pytest.approx(1 + 0 + 1 + 0 + 1 + 0 + 0.5 + 0, abs=1e-3)


def test_restarts_of_a_real_request_never_end_lower(trained, images, batch):
    model, processor = trained
    inputs = dict(batch(0))
    answer = [5, 6]
    prompt = {k: v for k, v in inputs.items() if k != "pixel_values"}
    picture = torch.tensor(np.asarray(images[0])).permute(2, 0, 1)[None] / 255
    renderer = Renderer(processor.image_processor, model.device, torch.float32)
    threat = Threat(model, processor, renderer, (picture,), [prompt], [answer])
    values = []
    for restarts in (1, 3):
        attack = PGD(AttackSettings(steps=4, restarts=restarts, eps=2 / 255))
        loss = attack.objective(threat)
        found = attack.run(loss, (picture,))
        with torch.no_grad():
            values.append(float(loss(found)))
            tripled = loss((picture.repeat(3, 1, 1, 1),))
        assert torch.allclose(tripled, tripled[:1].expand(3))  # a batch of restarts has each row's own loss
    assert values[1] >= values[0]


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "hint"),
    [
        (lambda slots: slots[0].detach().flatten(1).sum(1), "no gradient reaches the pixels.*attack=square"),
        (lambda slots: (slots[0] * 0).flatten(1).sum(1), "zero everywhere.*attack=square"),
        (lambda slots: (slots[0] - slots[0]).sqrt().flatten(1).sum(1), "not finite.*bfloat16 or float32"),
    ],
)
def test_a_gradient_that_cannot_be_used_is_refused(objective, hint):
    with pytest.raises(AttackError, match=hint):
        value_and_gradients(objective, CLEAN, first=True)


def test_other_errors_of_a_model_are_its_own():
    def broken(slots):
        raise RuntimeError("out of cheese")

    with pytest.raises(RuntimeError, match="out of cheese"):
        value_and_gradients(broken, CLEAN)


def test_bf16_gradients_point_where_those_of_fp32_do(trained, images, batch):
    """Logits in float32 take the steps out of the loss, which searches compare; the model before them is the deployed one."""
    from transformers import AutoModelForImageTextToText

    model, processor = trained
    half = AutoModelForImageTextToText.from_pretrained(MODEL_DIR, dtype=torch.bfloat16).eval()
    inputs = dict(batch(0))
    answer = model.generate(**inputs, max_new_tokens=2)[0, -2:].tolist()
    prompt = {k: v for k, v in inputs.items() if k != "pixel_values"}
    picture = torch.tensor(np.asarray(images[0])).permute(2, 0, 1)[None] / 255

    def look(model, nearby=(picture,)):
        renderer = Renderer(processor.image_processor, model.device, model.dtype)
        loss = AnswerLoss(Threat(model, processor, renderer, (picture,), [prompt], [answer]), "margin")
        return value_and_gradients(loss, nearby)

    value, (truth,) = look(model)
    coarse, _ = look(half)
    with exact_logits(half):
        fine, (gradient,) = look(half)
    assert abs(float(fine - value)) <= abs(float(coarse - value)) + 1e-3
    assert float(coarse * 128) % 1 == 0  # what bfloat16 logits can say: steps
    assert float(fine * 128) % 1 != 0
    assert gradient.dtype == torch.float32
    assert float(torch.cosine_similarity(gradient.flatten(), truth.flatten(), dim=0)) > 0.99
    assert (
        half.lm_head(torch.ones(1, half.lm_head.in_features, dtype=torch.bfloat16)).dtype == torch.bfloat16
    )  # put back


# -- what an adaptive attacker knows -----------------------------------------------------------------------------------


def test_no_defence_shows_an_attacker_its_seed(trained, tmp_path, images, batch, monkeypatch):
    from lmms_smoothguard import plugins
    from lmms_smoothguard.attacks.cache import AttackCache
    from lmms_smoothguard.attacks.craft import Crafter, Job
    from lmms_smoothguard.choice import choose
    from lmms_smoothguard.noise import Randomness, draw_noise

    model, processor = trained
    job = Job(AttackSettings(steps=1, eot=1), (images[0],), dict(batch(0)), (5,))
    seen, load = [], plugins.load

    def defended_by(randomness):
        spied = load("defenses", "smoothguard")._replace(randomness=randomness)
        monkeypatch.setattr(plugins, "load", lambda kind, *rest: spied if kind == "defenses" else load(kind, *rest))
        defense = choose({"sigma": 0.2, "seed": 77})
        return Crafter(model, processor, AttackCache(tmp_path), defense, quiet=True)

    def peeking(draw, config):
        seen.append(config)
        return draw_noise(draw, config)

    defended_by(Randomness(("sigma", "noise_space"), peeking)).craft([job])
    assert [(config.seed, config.sigma) for config in seen] == [(None, 0.2)]
    with pytest.raises(AttackError, match="hangs on its seed"):
        defended_by(Randomness(("sigma", "seed"), peeking)).craft([job])
