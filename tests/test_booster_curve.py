"""The benchmark of cost: what is measured anew, and what its table says. No time is asserted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import booster_curve
from curve import curve_figure, curve_markdown
from lmms_smoothguard.errors import ConfigError


@pytest.fixture
def measured(monkeypatch):
    """What was asked of the model, instead of asking it."""
    asked = []
    weights = {"psm": "w0", "small": "w1"}

    def right(subject, rows, images, config):
        asked.append((config.booster, config.sigma, config.num_samples))
        return [True] * 9 + [False]

    monkeypatch.setattr(booster_curve, "crafted", lambda subject, rows, eps, cache: [row["image"] for row in rows])
    monkeypatch.setattr(booster_curve, "_right", right)
    monkeypatch.setattr(booster_curve, "_over_plain", lambda subject, row, config: 2.0 * config.num_samples)
    monkeypatch.setattr(booster_curve, "_parameters", lambda booster: 0 if booster is None else 700_000)
    monkeypatch.setattr(booster_curve, "load_booster", lambda source, tower: SimpleNamespace(digest=weights[source]))
    return SimpleNamespace(asked=asked, weights=weights)


def run(out, **settings):
    defaults = {"samples": "2,8", "sigmas": "0.1,0.3", "main": (0.3, 8), "limit": 10, "cache": out.parent, "out": out}
    booster_curve.run(booster=["small=small"], **{**defaults, **settings})
    return json.loads(out.read_text())


def test_a_star_is_measured_once_and_a_retrained_booster_anew(tmp_path, measured):
    out = tmp_path / "curve.json"
    points = run(out)["points"]
    assert {(p["booster"], p["sigma"], p["num_samples"]) for p in points} == {
        (name, *setting) for name in ("none", "psm") for setting in ((0.3, 2), (0.3, 8), (0.1, 8))
    } | {("small", 0.3, 8), ("small", 0.1, 8)}  # fmt: skip
    assert set(measured.asked) == {
        (None if p["booster"] == "none" else p["booster"], p["sigma"], p["num_samples"]) for p in points
    }
    measured.asked.clear()
    assert run(out)["points"] == points
    assert measured.asked == []

    measured.weights["small"] = "w2"
    again = run(out)["points"]
    assert {booster for booster, _, _ in measured.asked} == {"small"}
    assert [p["weights"] for p in again if p["booster"] == "small"] == ["w2", "w2"]
    assert len(again) == len(points)


def test_points_of_other_settings_are_refused(tmp_path, measured):
    out = tmp_path / "curve.json"
    run(out)
    with pytest.raises(ConfigError, match="another --out"):
        run(out, limit=11)


def test_the_table_and_the_figure_have_every_point(tmp_path, measured):
    result = run(tmp_path / "curve.json")
    head, _, *lines = curve_markdown(result).splitlines()
    assert len(lines) == len(result["points"])
    cells = dict(zip(head.strip("| ").split(" | "), lines[1].strip("| ").split(" | "), strict=True))
    assert (cells["booster"], cells["parameters"], cells["sigma"], cells["n0"]) == ("no booster", "-", "0.3", "8")
    assert cells["cost, bare passes"] == "16.0"
    assert cells["accuracy, faint objects"] == "90.0 (59.6-98.2)"  # Wilson, 9 of 10
    drawn = [len(line.get_xdata()) for axis in curve_figure(result).axes for line in axis.get_lines()]
    assert sorted(drawn) == [1, 1] + 10 * [2]  # attacked and faint: n0 (small has one) and sigma, of three boosters
