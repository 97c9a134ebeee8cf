"""The coverage table: what is committed is what this transformers has, and (slow) what a new probe of every type finds."""

from __future__ import annotations

import json

import pytest
import transformers
from tiny_models import COVERED
from tiny_models.sounds import KINDS

import coverage_table as table

STORED = json.loads(table.RESULT.read_text())


def test_the_table_is_of_every_type_and_of_none_twice():
    if STORED["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {STORED['transformers']}")
    assert list(STORED["types"]) == list(table.types())
    assert set(table.NOT_BUILT) == {kind for kind, row in STORED["types"].items() if row["verdict"] == "not built"}
    assert set(table.types()) - set(table.NOT_BUILT) <= set(COVERED)


def test_enough_is_defended_and_nothing_in_silence():
    verdicts = [row["verdict"] for row in STORED["types"].values()]
    assert verdicts.count("green") >= 80
    assert "wrong" not in verdicts
    for kind, row in STORED["types"].items():
        said = [row["checks"][name] for name in ("one", "several", "batch")] if "checks" in row else []
        assert not any("undefended" in text and not text.startswith(("refused", "- ", "as calls")) for text in said), (
            kind
        )


def test_sounds_are_defended_wherever_they_are_built():
    kinds = [
        kind.name for kind in KINDS if STORED["types"].get(kind.name, {}).get("verdict", "not built") != "not built"
    ]
    assert len(kinds) >= 8
    for kind in kinds:
        checks = STORED["types"][kind]["checks"]
        assert STORED["types"][kind]["layout"] == "clips" and checks["one"] == checks["noise"] == "yes", kind
        assert not any("nothing was tested" in found for found in checks.values()), kind


def test_the_page_is_the_results():
    assert table.PAGE.read_text() == table.page(STORED)


def test_the_readme_says_how_many():
    verdicts = [row["verdict"] for row in STORED["types"].values()]
    said = f"[{verdicts.count('green')} of the {len(verdicts)} types](docs/coverage.md)"
    assert said in (table.ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("checks", "green", "found"),
    [
        ({"one": "yes", "several": "yes", "batch": "yes"}, True, "green"),
        ({"one": "refused: a", "several": "- fails upstream", "batch": "refused: a"}, False, "refused"),
        ({"one": "yes", "several": "refused: a", "batch": "yes"}, False, "partly"),
        ({"one": "yes", "several": "yes", "batch": "WRONG: x"}, False, "wrong"),
        ({"one": "yes", "several": "yes", "batch": "yes", "attack": "WRONG: x"}, False, "partly"),
    ],
)
def test_verdicts(checks, green, found):
    assert table.verdict({"checks": checks, "green": green}) == found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [kind for kind in table.types() if kind not in table.NOT_BUILT])
def test_a_new_probe_finds_the_same(kind):
    (row,) = table.probed([kind])
    assert table.verdict(row) == STORED["types"][kind]["verdict"], row["checks"]
