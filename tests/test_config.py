from __future__ import annotations

import dataclasses
import json
import math

import pytest

from lmms_smoothguard import SmoothGuardConfig
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import Choice, choose
from lmms_smoothguard.config import parse_scalar
from lmms_smoothguard.errors import ConfigError


def test_paper_setting_is_the_published_one():
    paper = SmoothGuardConfig.paper()
    assert (paper.num_samples, paper.include_clean, paper.sigma, paper.noise_space) == (10, True, 0.1, "normalized")
    assert (paper.embedder, paper.aggregator) == ("roberta-base", "kmeans")


def test_survives_json():
    config = SmoothGuardConfig(sigma=0.2, noise_space="pixel", seed=None)
    choice = Choice("smoothguard", config)
    assert choose(json.loads(json.dumps(choice.to_dict()))) == choice


def test_a_config_says_which_defence_it_is_of():
    from hf_integration import FeatureSmoothingConfig

    assert choose(FeatureSmoothingConfig(sigma=0.3)) == choose({"defense": "feature_smoothing", "sigma": 0.3})
    assert choose(SmoothGuardConfig(sigma=0.3)) == choose({"defense": "smoothguard", "sigma": 0.3})
    with pytest.raises(ConfigError, match="FeatureSmoothingConfig"):
        choose(0.3)


@pytest.mark.parametrize("off", [None, False, {"defense": "none"}])
def test_off(off):
    assert choose(off) is None


def test_the_base_of_another_defence_gives_no_fields():
    @dataclasses.dataclass(frozen=True)
    class Blur:
        sigma: float = 3.0

    chosen = choose({"defense": "smoothguard", "num_samples": 4}, Choice("blur", Blur()))
    assert chosen == Choice("smoothguard", SmoothGuardConfig(num_samples=4))


def test_fields_replace_those_of_the_base():
    merged = choose({"sigma": 0.3}, choose(SmoothGuardConfig(num_samples=4)))
    assert merged == ("smoothguard", SmoothGuardConfig(num_samples=4, sigma=0.3))


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"sigma": -0.1}, "-0.1"),
        ({"sigma": math.nan}, "nan"),
        ({"sigma": math.inf}, "inf"),
        ({"sigma": 40}, "40"),
        ({"sigma": 6, "noise_space": "pixel"}, "pixel units"),
        ({"sigma": "0.1"}, "'0.1'"),
        ({"sigma": True}, "True"),
        ({"num_samples": 0}, "at least 1"),
        ({"num_samples": 2.5}, "2.5"),
        ({"noise_space": "pixels"}, "did you mean 'pixel'"),
        ({"num_sample": 3}, "did you mean 'num_samples'"),
        ({"seed": -1}, "-1"),
        ({"include_clean": 1}, "true or false"),
        ({"max_copies_per_batch": 0}, "at least 1"),
        ({"embedder": ""}, "unknown embedder"),
        ({"embedder": "lexcal"}, "did you mean 'lexical'"),
        ({"embedder": None}, "unknown embedder None"),
        ({"aggregator": "k-means"}, "did you mean 'kmeans'"),
        ({"level": "tokens"}, "did you mean 'token'"),
        ({"early_stop": "exakt"}, "'exakt'"),
        ({"early_stop": 0.5}, "between 0 and 0.5"),
        ({"early_stop": True}, "True"),
        ({"level": "token", "early_stop": "exact"}, "expected 'off'"),
        ({"level": "token", "max_copies_per_batch": 3}, "all 10 copies decode"),
        ({"defense": "smoothgard"}, "did you mean 'smoothguard'"),
    ],
)
def test_bad_values_are_named(fields, hint):
    with pytest.raises(ConfigError, match=hint.replace("(", r"\(")):
        choose(fields)


def test_not_a_description_at_all():
    with pytest.raises(ConfigError, match="expected True, False, a dict"):
        choose("yes")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        ("0.1", 0.1),
        ("3", 3),
        ("none", None),
        ("True", True),
        ("pixel", "pixel"),
        ("1/0", "1/0"),
        (5, 5),
    ],
)
def test_command_line_scalars(text, value):
    assert parse_scalar(text) == value


@pytest.mark.parametrize(
    ("fields", "hint"),
    [
        ({"name": "pdg"}, "did you mean 'pgd'"),
        ({"eps": 4}, "4/255"),
        ({"eps": -0.1}, "0 or more"),
        ({"name": "square", "eps": 0.5 / 255}, "one grey level"),
        ({"eps": "nan"}, "nan"),
        ({"norm": "linff"}, "did you mean 'linf'"),
        ({"steps": 0}, "at least 1"),
        ({"step_size": 0}, "positive"),
        ({"eot": -1}, "at least 0"),
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"target": "  "}, "text to be forced"),
        ({"target": ""}, "text to be forced"),
    ],
)
def test_bad_attack_settings_are_named(fields, hint):
    with pytest.raises(ConfigError, match=hint):
        AttackSettings.parse(fields)


def test_attack_settings_override_a_tasks_own():
    merged = AttackSettings.parse({"name": "pgd", "eps": "4/255", "steps": 40}, {"eps": "8/255"})
    assert merged.eps == pytest.approx(8 / 255)
    assert merged.steps == 40
