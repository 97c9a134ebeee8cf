"""CompA on a miniature in its published layouts: which clip is asked about, in which order, and what bad copies say."""

from __future__ import annotations

import csv
import importlib
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("soundfile")

import sound_miniatures as miniatures

from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.harness import ledger
from lmms_smoothguard.harness.lmms_eval import compa_scores
from lmms_smoothguard.harness.lmms_eval.compa import SEED, SOURCE, documents
from lmms_smoothguard.sounds import sound_of
from lmms_smoothguard.tiny.sounds import language
from lmms_smoothguard.tiny.sounds.clips import RATE

HEADER = ["pair_caption", "reversed_pair_caption", "triplet_caption", "pair_file", "reversed_pair_file", "triplet_file"]
PARTS = ("pair", "reversed_pair", "triplet")


@pytest.fixture(scope="module")
def sounds():
    return miniatures.recordings(6)


def table(count):
    """Rows of three captions and of two in turn."""
    rows = []
    for n in range(count):
        first, second = n % 18, (n + 1) % 18
        row = {
            "pair_caption": language.caption((first, second)), "pair_file": f"{n}.wav",
            "reversed_pair_caption": language.caption((second, first)), "reversed_pair_file": f"{n}_rev.wav",
            "triplet_caption": "-", "triplet_file": "-",
        }  # fmt: skip
        if n % 2 == 0:
            row |= {"triplet_caption": language.caption((first,)), "triplet_file": f"{n}_trip.wav"}
        rows.append(row)
    return rows


def write(root, rows, sounds, clips="CompA_order_files", name="CompA_order_benchmark.csv", header=HEADER):
    (root / clips).mkdir(parents=True, exist_ok=True)
    with (root / name).open("w", newline="") as opened:
        writer = csv.DictWriter(opened, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for number, row in enumerate(rows):
        for place, part in enumerate(PARTS):
            if row.get(f"{part}_file") not in (None, "", "-"):
                (root / clips / row[f"{part}_file"]).write_bytes(sounds[(number + place) % len(sounds)].wav)
    return root


@pytest.fixture
def copy(tmp_path, sounds):
    return write(tmp_path / "compa", table(4), sounds)


# -- documents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clips", ["CompA_order_files", "audio", "."])
def test_the_answer_is_the_number_of_the_clips_own_caption(tmp_path, sounds, clips):
    rows = table(40)
    write(tmp_path, rows, sounds, clips)
    found = documents("order", str(tmp_path))
    assert found["question_id"] == [str(n) for n in range(1, 41)]
    places, parts = Counter(), Counter()
    for row, doc in zip(rows, found, strict=True):
        (part,) = (part for part in PARTS if row[f"{part}_file"] == doc["clip"])
        assert doc["choices"][int(doc["answer"]) - 1] == row[f"{part}_caption"]
        assert sorted(doc["choices"]) == sorted(row[f"{p}_caption"] for p in PARTS if row[f"{p}_caption"] != "-")
        assert doc["audio_path"] == str(tmp_path / clips / doc["clip"]).replace("/./", "/")
        places[doc["answer"]] += 1
        parts[part] += 1
    assert len(places) == len(parts) == 3 and min(places["1"], places["2"], parts["pair"], parts["reversed_pair"]) > 5


def test_a_rows_draw_depends_on_the_seed_and_its_place_alone(tmp_path, sounds, monkeypatch):
    rows = table(12)
    write(tmp_path / "all", rows, sounds)
    write(tmp_path / "some", rows[:5], sounds)
    whole = [{k: v for k, v in doc.items() if k != "audio_path"} for doc in documents("order", str(tmp_path / "all"))]
    part = [{k: v for k, v in doc.items() if k != "audio_path"} for doc in documents("order", str(tmp_path / "some"))]
    assert part == whole[:5]
    monkeypatch.setenv(SOURCE, str(tmp_path / "all"))
    monkeypatch.setenv(SEED, "3")
    other = documents("order")
    assert [doc["answer"] for doc in whole] != other["answer"]
    assert other["answer"] == documents("order", seed=3)["answer"]


def test_rows_of_fewer_than_two_captions_are_left_out_and_counted(tmp_path, sounds, caplog):
    rows = table(5)
    rows[1] |= {"reversed_pair_caption": "-", "reversed_pair_file": "-"}
    rows[2] |= {"reversed_pair_caption": "", "reversed_pair_file": ""}  # two are left
    rows[3] |= {"pair_file": "-"}  # a caption without a clip is none
    found = documents("order", str(write(tmp_path, rows, sounds)))
    assert found["question_id"] == ["1", "3", "5"]
    assert "2 of 5 rows have fewer than two captions with a clip each, and are left out: 2, 4" in caplog.text
    assert [len(choices) for choices in found["choices"]] == [3, 2, 3]


def test_the_published_layout_of_the_attributes(tmp_path, sounds):
    """A folder of its own, no third caption, and columns of files twice: the first names what the clips were made from."""
    rows = [
        {
            **row, "pair_file": f"made_from_{n}", "reversed_pair_file": f"also_{n}",
            "pair_file.1": row["pair_file"], "reversed_pair_file.1": row["reversed_pair_file"],
        }
        for n, row in enumerate(table(3))
    ]  # fmt: skip
    header = [
        "pair_caption",
        "reversed_pair_caption",
        "pair_file",
        "reversed_pair_file",
        "pair_file.1",
        "reversed_pair_file.1",
    ]
    folder = tmp_path / "CompA Attribute"
    folder.mkdir()
    write(folder, [{k: v for k, v in row.items() if k in header} for row in rows], sounds, "CompA_attribute_files", "Compa-Attribute.csv", header)  # fmt: skip
    for row in table(3):
        for part in PARTS[:2]:
            (folder / "CompA_attribute_files" / row[f"{part}_file"]).write_bytes(sounds[0].wav)
    write(tmp_path, table(3), sounds)  # the order's beside it
    (folder / "._Compa-Attribute.csv").write_bytes(b"\0")  # as macOS packs it
    found = documents("attribute", str(tmp_path))
    assert len(found) == 3
    assert {len(choices) for choices in found["choices"]} == {2}
    assert all("_attribute_files" in path for path in found["audio_path"])
    assert all("_order_files" in path for path in documents("order", str(tmp_path))["audio_path"])


# -- bad copies --------------------------------------------------------------------------------------------------------


def _without(copy, names):
    for name in names:
        (copy / "CompA_order_files" / name).unlink()


def _rewrite(copy, text):
    (copy / "CompA_order_benchmark.csv").write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda copy: _without(copy, ["0.wav", "3_rev.wav"]), r"missing clips: 0\.wav, 3_rev\.wav; expected every one"),
        (lambda copy: (copy / "CompA_order_files" / "0.wav").write_bytes(b"RIFF"), None),
        (lambda copy: _rewrite(copy, "pair_caption,pair_file\na,b\n"), "no column reversed_pair_caption, reversed_pair_file; found"),
        (lambda copy: _rewrite(copy, ",".join(HEADER[:5]) + "\n"), "no column triplet_file"),
        (lambda copy: _rewrite(copy, ",".join(HEADER) + "\na,b,-,0.wav\n"), "rows of other lengths than its header's 6: 1"),
        (lambda copy: _rewrite(copy, ",".join(HEADER) + "\n"), "none of the 0 rows"),
        (lambda copy: _rewrite(copy, ",".join(HEADER) + "\na,-,-,0.wav,-,-\n"), "none of the 1 rows .* has two captions"),
        (lambda copy: _rewrite(copy, ""), "found none"),
        (lambda copy: (copy / "CompA_order_benchmark.csv").write_bytes(b"\xff\xfe\x00"), "cannot be read .*in UTF-8"),
        (lambda copy: (copy / "CompA_order_benchmark.csv").rename(copy / "other.csv"), "no CSV with 'order' in its name.* It has other.csv"),
        (lambda copy: (copy / "order2.csv").write_text("x"), r"more than one CSV is called 'order': CompA_order_benchmark\.csv, order2\.csv"),
    ],
)  # fmt: skip
def test_a_bad_copy_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(SmoothGuardError, match=message):
        for seed in range(30):  # until the broken clip is drawn
            documents("order", str(copy), seed)


def test_a_broken_clip_is_named_with_its_reason(copy):
    for file in (copy / "CompA_order_files").iterdir():
        file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(SmoothGuardError, match=r"unreadable clips: .*0.*cut off.*Fetch them again"):
        documents("order", str(copy))


def test_all_that_is_missing_is_named_up_to_ten(tmp_path, sounds):
    write(tmp_path, table(9), sounds)
    for file in (tmp_path / "CompA_order_files").iterdir():
        file.unlink()
    with pytest.raises(SmoothGuardError, match=r"missing clips: 0\.wav, 0_rev\.wav, .* and 13 more"):
        documents("order", str(tmp_path))


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv(SOURCE, raising=False)
    with pytest.raises(SmoothGuardError, match="SMOOTHGUARD_COMPA is not set; expected a directory"):
        documents("order")
    with pytest.raises(SmoothGuardError, match="there is no such directory"):
        documents("order", str(tmp_path / "nowhere"))
    with pytest.raises(SmoothGuardError, match="SMOOTHGUARD_COMPA_SEED is 'x'; expected a whole number"):
        documents("order", str(tmp_path), "x")
    utils = importlib.import_module("lmms_smoothguard.tasks.compa.utils")
    monkeypatch.setenv(SOURCE, str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="CompA: SMOOTHGUARD_COMPA is"):
        utils.attribute_documents(None)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right", "unreadable"),
    [("2", True, 0), ("2.", True, 0), ("The answer is 2, not 1.", True, 0), ("02", True, 0), ("1", False, 0), ("3", False, 1),
     ("", False, 1), ("Two", False, 1), ("12", False, 1)],
)  # fmt: skip
def test_an_answer_is_the_first_number_it_says(answer, right, unreadable):
    found = compa_scores.choice_scores({"answer": "2", "choices": ["a", "b"]}, answer)
    assert found["compa_accuracy"] is right and found["compa_unreadable"] == unreadable


def test_rates_have_their_intervals():
    outcomes = [True] * 3 + [False]
    assert compa_scores.accuracy(outcomes) == 0.75
    assert compa_scores.accuracy_low(outcomes) == pytest.approx(0.3006, abs=1e-4)
    assert compa_scores.accuracy_high(outcomes) == pytest.approx(0.9544, abs=1e-4)


def test_an_attacked_sample_that_was_left_out_has_no_score():
    utils = importlib.import_module("lmms_smoothguard.tasks.compa.utils")
    doc = {"question_id": "left out", "answer": "1", "choices": ["a", "b"]}
    ledger.record("by_hand", doc, ledger.Note("", "empty clean answer"))
    assert utils.attacked_results(doc, ["1"]) == {}
    ledger.record("by_hand", doc, ledger.Note("1."))
    found = utils.attacked_results(doc, ["2"])
    assert found["asr"]["clean_right"] and not found["asr"]["right"] and found["compa_accuracy"] is False


# -- through lmms-eval -------------------------------------------------------------------------------------------------


def test_both_tasks_clean_and_attacked_through_lmms_eval(tmp_path, sounds, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "copy", table(2), sounds)
    write(tmp_path / "copy" / "attribute", table(2), sounds, "audio", "benchmark.csv")
    monkeypatch.setenv(SOURCE, str(tmp_path / "copy"))
    model = miniatures.save_model(tmp_path / "model")
    calls = miniatures.heard(monkeypatch)
    tasks = ["compa_order", "compa_attribute", "compa_order_pgd", "compa_attribute_pgd"]
    found = miniatures.run(model, None, tasks, defense="none", attack_steps=2)
    for kind in ("order", "attribute"):
        figures = found["results"][f"compa_{kind}"]
        assert figures["compa_accuracy_count,none"] == 2
        assert (
            figures["compa_accuracy_low,none"] <= figures["compa_accuracy,none"] <= figures["compa_accuracy_high,none"]
        )
        docs = documents(kind)
        for sample in found["samples"][f"compa_{kind}"]:
            asked = next(part for part in sample["arguments"] if isinstance(part, str) and "caption" in part)
            doc = docs[sample["doc_id"]]
            assert asked == language.choice_question(doc["choices"])  # which the embedded model is taught
            assert sample["target"] == doc["answer"]
            assert any(np.array_equal(clip, sound_of(doc["audio_path"]).at(RATE).samples) for clip in calls)
        attacked = found["results"][f"compa_{kind}_pgd"]
        assert {"asr_count,none", "recovery,none", "attack_left_out,none", "compa_accuracy,none"} <= set(attacked)
        assert all(0 < info["attack_linf"] <= 0.001 + 1e-6 for info in miniatures.infos(found, f"compa_{kind}_pgd"))
