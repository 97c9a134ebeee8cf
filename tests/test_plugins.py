from __future__ import annotations

import importlib.metadata
import logging

import pytest

from lmms_smoothguard import plugins
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.hookspecs import hookimpl


def entry(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, plugins.GROUP)


class Good:
    @hookimpl
    def smoothguard_embedders(self):
        return {"mine": "lmms_smoothguard.aggregation.embedders:lexical"}


class Thief:
    @hookimpl
    def smoothguard_embedders(self):
        return {"lexical": "nowhere:nothing", "other": "nowhere:nothing"}


class Raises:
    @hookimpl
    def smoothguard_embedders(self):
        raise RuntimeError("no luck")


class Misnamed:
    @hookimpl
    def smoothguard_embeders(self):
        return {}


good, thief, raises, misnamed = Good(), Thief(), Raises(), Misnamed()


def test_builtins_come_through_the_hooks():
    assert set(plugins.offers("aggregators")) == {"kmeans", "silhouette", "vote", "medoid"}
    for kind in ("defenses", "attacks", "judges", "embedders", "aggregators"):
        for name in plugins.offers(kind):
            found = plugins.load(kind, name)
            assert callable(found.defend if kind == "defenses" else found)


def test_a_plugin_adds_a_name():
    manager = plugins.build_manager([entry("good", f"{__name__}:good")])
    assert plugins.offers("embedders", manager)["mine"].owner == "good:good"


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("no_such_module:x", "ModuleNotFoundError"),
        (f"{__name__}:absent", "AttributeError"),
        (f"{__name__}:misnamed", "embeders"),
    ],
)
def test_a_broken_plugin_is_a_warning_and_the_rest_works(caplog, value, complaint):
    with caplog.at_level(logging.WARNING):
        manager = plugins.build_manager([entry("broken", value), entry("good", f"{__name__}:good")])
    assert "broken" in caplog.text
    assert complaint in caplog.text
    assert {"mine", "lexical"} <= set(plugins.offers("embedders", manager))


def test_a_plugin_that_raises_when_asked_is_a_warning(caplog):
    manager = plugins.build_manager([entry("raises", f"{__name__}:raises")])
    assert "lexical" in plugins.offers("embedders", manager)
    assert "no luck" in caplog.text


def test_the_first_of_two_equal_names_wins(caplog):
    manager = plugins.build_manager([entry("thief", f"{__name__}:thief")])
    found = plugins.offers("embedders", manager)
    assert found["lexical"].owner == "lmms_smoothguard"
    assert found["other"].owner == "thief:thief"
    assert "'lexical' of thief" in caplog.text


def test_unknown_and_unloadable_names():
    with pytest.raises(ConfigError, match="did you mean 'kmeans'"):
        plugins.load("aggregators", "kmean")
    manager = plugins.build_manager([entry("thief", f"{__name__}:thief")])
    with pytest.raises(ConfigError, match=r"thief.*cannot be loaded"):
        plugins.load("embedders", "other", manager)


def test_provenance_changes_with_the_code(tmp_path, monkeypatch):
    """A cached attack is not taken for one of the same name by other code."""
    module = tmp_path / "somebodys_attack.py"
    module.write_text("class Mine: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = plugins.Offer("somebodys_attack:Mine", "somebody:x")
    monkeypatch.setattr(plugins, "offers", lambda kind: {"mine": mine, "pgd": plugins.Offer("x:y", plugins.PROJECT)})
    before = plugins.provenance("attacks", "mine")
    assert "somebody:x" in before
    module.write_text("class Mine: changed = True\n")
    assert plugins.provenance("attacks", "mine") != before
    assert plugins.provenance("attacks", "pgd") is None
