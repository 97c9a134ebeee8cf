"""The report page: numbers from the logs, pictures from the cache, text that stays text."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from handmade_runs import HOSTILE, HOSTILE_IMAGE, hostile_answers, write_runs
from PIL import Image

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.detection import detection
from lmms_smoothguard.evaluation.rates import rate
from lmms_smoothguard.evaluation.records import write_run
from lmms_smoothguard.evaluation.runs import Sample, load_samples
from lmms_smoothguard.report import documents as documents_module
from lmms_smoothguard.report.demo import DEMO, run_report
from lmms_smoothguard.report.experiments import summarize
from lmms_smoothguard.report.groups import groups_of
from lmms_smoothguard.report.page import logged_defense, selection
from lmms_smoothguard.report.tables import HEADINGS, table_rows


class Page(HTMLParser):
    """Tags with their attributes, the text of every table cell, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.text = [], [], ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.cells[-1] += data

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def read(directory):
    return Page(run_report(directory).read_text(encoding="utf-8"))


def test_the_page_has_the_terminals_table_and_the_logs_numbers(tmp_path):
    page = read(write_runs(tmp_path))
    asked = [dataclasses.replace(experiment, limit=12) for experiment in DEMO]
    records = [summarize(one, tmp_path / one.name, tmp_path / "cache").record for one in asked]
    assert page.cells == [*HEADINGS, *(cell for row in table_rows(records) for cell in row)]
    found = records[1].tasks["shapes_pope_pgd"].figures["detection_auroc"]
    # 12 clean samples with suspicion 0; of 12 attacked ones the lost 1, 6 and 11 have it too, the other 9 have 1.
    assert found.value == pytest.approx(9 / 12 + 0.5 * 3 / 12)
    assert found.groups == 4  # three questions a scene
    assert f"{found.value:.3f}" in page.text
    assert f"{found.low:.3f}–{found.high:.3f}" in page.text


def test_the_pictures_are_those_of_the_run(tmp_path):
    page = read(write_runs(tmp_path))
    images = [decode(attributes["src"]) for attributes in page.of("img")]
    step, chosen = selection(load_samples(tmp_path / "smoothguard", "shapes_pope_pgd"))
    assert (step, chosen) == (2, [0, 2, 4, 6, 8, 10, 1, 11])
    assert len(images) == 4 * len(chosen)
    for number, (clean, adversarial, difference, noisy) in zip(
        chosen, (images[i : i + 4] for i in range(0, len(images), 4)), strict=True
    ):
        document = list(documents_module.documents("shapes_pope", True).values())[number]
        assert np.array_equal(clean, np.asarray(Image.open(io.BytesIO(document["image"]["bytes"])).convert("RGB")))
        change = adversarial.astype(int) - clean
        assert np.abs(change).max() == 4
        assert np.array_equal(difference, 128 + 31 * change)
        assert 30 < (noisy.astype(int) - adversarial).std() < 51  # sigma 0.2 of 255, less what is clipped
    assert all(attributes["alt"] for attributes in page.of("img"))


def decode(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_text_of_strangers_stays_text(tmp_path, monkeypatch):
    write_runs(tmp_path, answers=hostile_answers, warnings=[HOSTILE], num_samples=20)
    stored = {key: {**row, "question": HOSTILE_IMAGE} for key, row in documents_module.documents("shapes_pope", True).items()}  # fmt: skip
    for log in tmp_path.rglob("*.jsonl"):
        lines = [json.loads(line) | {"input": HOSTILE_IMAGE} for line in log.read_text().splitlines()]
        log.write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(documents_module, "documents", lambda *_: MappingProxyType(stored))
    for experiment in DEMO:
        run = summarize(experiment, tmp_path / experiment.name, tmp_path / "cache", {HOSTILE: HOSTILE_IMAGE})
        write_run(tmp_path, *run)
    page = read(tmp_path)
    assert not page.of("script")
    assert all(attributes["src"].startswith("data:image/png;base64,") for attributes in page.of("img"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE_IMAGE) > 10
    assert page.text.count(HOSTILE) > 10
    assert "{{ 7 * 7 }}" in page.text
    policy = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"]


def test_the_noisy_picture_is_what_the_model_was_given(tmp_path, monkeypatch):
    """Copy 1 as generate got it, in lmms-eval, against copy 1 as the page draws it again from the log."""
    pytest.importorskip("lmms_eval")
    from test_lmms_eval import evaluate

    from lmms_smoothguard.noise import NoiseSource
    from lmms_smoothguard.report.pictures import PictureGallery
    from lmms_smoothguard.tiny.model import MODEL_DIR

    given, draw = [], NoiseSource.copy

    def spied(self, number):
        copy = draw(self, number)
        if number == 1:
            given.append(copy)
        return copy

    monkeypatch.setattr(NoiseSource, "copy", spied)
    found = evaluate(
        ["shapes_pope_pgd"], limit=1, attack_steps=2, sigma=0.3, noise_space="pixel", num_samples=3, seed=5
    )
    row = found["samples"]["shapes_pope_pgd"][0]
    sample = Sample("0", row["target"], "", row["token_counts"][0])
    config = config_of(tmp_path, "sigma=0.3,noise_space=pixel,num_samples=3,seed=5")
    pictures = PictureGallery(tmp_path / "cache" / "attacks", "shapes_pope_pgd", MODEL_DIR, config).of(sample)
    assert len(given) == 2  # the run's and the page's
    assert given[0].equal(given[1])
    assert np.array_equal(
        pictures.by_kind["noisy"].picture, ((given[0][0] + 1) / 2 * 255).round().byte().permute(1, 2, 0).numpy()
    )


def config_of(directory, settings):
    (directory / "1_results.json").write_text(json.dumps({"config": {"model_args": f"pretrained=a=b,{settings}"}}))
    return logged_defense(directory)


def test_settings_come_from_the_run(tmp_path):
    config = config_of(tmp_path, "sigma=0.3,noise_space=pixel,seed=5")
    assert (config.sigma, config.noise_space, config.seed, config.num_samples) == (0.3, "pixel", 5, 10)
    with pytest.raises(SmoothGuardError, match="another run"):
        config_of(tmp_path, "defense=none")
    with pytest.raises(SmoothGuardError, match="no results file"):
        logged_defense(tmp_path / "nowhere")


def test_every_kth_sample_then_the_first_that_were_lost():
    def sample(number, answer):
        return Sample(str(number), "yes", answer, {"clean_answer": "No" if number == 7 else " Yes."})

    answers = {5: "No", 6: "No", 7: "No", 8: "No", 9: "No", 11: "No"}
    samples = [sample(number, answers.get(number, "yes")) for number in range(13)]
    step, chosen = selection(samples, shown=3, lost=3)
    assert step == 4
    assert chosen == [0, 4, 8, 5, 6, 9]  # 7 was wrong when clean, 8 is there already, 11 is one too many
    assert selection(samples[:2], shown=6) == (1, [0, 1])


def test_groups_are_lettered_from_the_winning_one():
    texts, labels = ["no", "Yes.", " yes", "maybe", "perhaps", "maybe so"], [0, 1, 1, 2, 2, 2]
    info = {"candidates": texts, "labels": labels, "suspicion": 1.0}
    answers, groups = groups_of(Sample("0", "yes", "Yes", info))
    assert [answer.letter for answer in answers] == ["C", "A", "A", "B", "B", "B"]
    assert [(group.letter, group.size) for group in groups] == [("A", 2), ("B", 3), ("C", 1)]
    assert [(answer.copy, answer.is_noisy) for answer in answers][:2] == [(0, False), (1, True)]
    answers, _ = groups_of(Sample("0", "yes", "Yes", info | {"suspicion": None}))
    assert [(answer.copy, answer.is_noisy) for answer in answers][:2] == [(1, True), (2, True)]
    with pytest.raises(SmoothGuardError, match="none of its candidates"):
        groups_of(Sample("0", "yes", "elsewhere", info))
    with pytest.raises(SmoothGuardError, match="expected a defended run"):
        groups_of(Sample("0", "yes", "Yes", {}))


def spoil(directory, field, value):
    for log in directory.rglob("*.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        for row in rows:
            if field in row:
                row[field] = value
            elif field in row["token_counts"][0]:
                row["token_counts"][0][field] = value
        log.write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("attack_key", None, "older version, so run it again"),
        ("attack_key", "ab" * 32, "crafts what is missing"),
        ("attack_linf", 0.01, "from the clean one, but its log says 0.01000"),
        ("input", "Is there anybody out there?", "the data have changed since the run"),
    ],
)
def test_logs_that_do_not_fit_are_refused(tmp_path, field, value, hint):
    write_runs(tmp_path, count=2)
    spoil(tmp_path, field, value)
    with pytest.raises(SmoothGuardError, match=hint):
        run_report(tmp_path)


def test_a_directory_without_runs_is_an_error_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lmms_smoothguard", "report", str(tmp_path / "empty")],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no run named plain and none named smoothguard" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "empty").exists()


def test_the_template_is_in_the_package_data():
    import tomllib

    root = Path(__file__).parent.parent
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "page.html.j2" in data["lmms_smoothguard.report"]
    assert (root / "lmms_smoothguard" / "report" / "page.html.j2").exists()


def test_a_perfect_detectors_curve_goes_through_the_upper_left_corner():
    """SVG counts y downwards: nothing found is below, everything found is above."""
    from lmms_smoothguard.report.charts import PLOT, roc_chart

    clean, attacked = [0.0, 0.1], [0.8, 0.9]
    figures = {
        "clean": {"suspected": rate([False, False]).figure()},
        "attacked": {
            "suspected": rate([True, True]).figure(),
            "detection_auroc": detection(clean, attacked).figure(),
        },
    }
    chart = roc_chart(clean, attacked, figures)
    places = [(point["x"], point["y"]) for point in chart["points"]]
    assert (places[0], places[-1]) == ((0, PLOT), (PLOT, 0))
    assert (0, 0) in places
    assert (chart["suspected"]["x"], chart["suspected"]["y"]) == (0, 0)
