"""Questions from folders, tables, data sets and tasks: what is found, what is refused and in which words."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageFile

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.questions import load_questions
from lmms_smoothguard.evaluation.tables import refuse_inside
from lmms_smoothguard.harness.questions import find_questions

datasets = pytest.importorskip("datasets")
ASK = "What is shown?"


@pytest.fixture(autouse=True)
def own_arrow_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture
def folder(tmp_path, images):
    """Three pictures at two depths, and what is none."""
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for name, image in zip(("b.png", "sub/a.PNG", "[1].bmp"), images, strict=False):
        image.save(root / name, "BMP" if name.endswith("bmp") else "PNG")
    (root / ".hidden.png").write_bytes(b"no picture")
    (root / "notes.txt").write_text("no picture")
    return root


@pytest.fixture
def table(tmp_path, images):
    """Writes rows of columns as a file of any kind; pictures as files beside it where it holds no bytes."""
    for number, image in enumerate(images[:3]):
        image.save(tmp_path / f"{number}.png")

    def write(name, features=None, **columns):
        made = datasets.Dataset.from_dict(columns, features=features)
        path = tmp_path / name
        {"parquet": made.to_parquet, "jsonl": made.to_json, "csv": made.to_csv}[path.suffix[1:]](path)
        return str(path)

    return write


def pixels(question):
    return [np.asarray(image).tolist() for image in question.images]


def test_a_folder_is_asked_one_question_about_every_picture_in_it(folder, images):
    found = load_questions(str(folder), question=ASK)
    assert found.ids == ("[1].bmp", "b.png", "sub/a.PNG")
    assert [question.text for question in found] == [ASK] * 3
    assert pixels(found[1]) == [np.asarray(images[0]).tolist()]
    assert load_questions(str(folder), question="Describe", limit=2).ids == ("[1].bmp", "b.png")


def test_the_revision_is_of_what_is_asked_not_of_how_it_is_stored(folder, images):
    before = load_questions(str(folder), question=ASK)
    images[0].save(folder / "b.png", "PNG", compress_level=0)
    assert load_questions(str(folder), question=ASK).revision == before.revision
    assert load_questions(str(folder), question=ASK + " ").revision != before.revision
    changed = np.array(images[0])
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(folder / "b.png")
    after = load_questions(str(folder), question=ASK)
    assert [a == b for a, b in zip(after.digests, before.digests, strict=True)] == [True, False, True]
    assert after.revision != before.revision


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_tables_name_their_columns_as_people_do(table, images, kind):
    path = table(
        f"t.{kind}", question_id=[7, 8], prompt=["One?", "Two?"], caption=["yes", None], image=["0.png", "1.png"],
        image_source=["a", "b"], target=["x", "y"], text=["not", "these"],
    )  # fmt: skip
    found = load_questions(path)
    assert [(q.id, q.text, q.label, q.target, q.group) for q in found] == [
        ("7", "One?", "yes", "x", "a"),
        ("8", "Two?", None, "y", "b"),
    ]
    assert pixels(found[1]) == [np.asarray(images[1]).tolist()]
    other = load_questions(path, question="text", columns={"label": None, "id": "image_source", "group": None})
    assert [(q.id, q.text, q.label, q.group) for q in other] == [("a", "not", None, None), ("b", "these", None, None)]


def test_a_hugging_face_data_set_on_disk(tmp_path, images):
    features = datasets.Features({
        "images": datasets.List(datasets.Image()),
        "question": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "answers": datasets.List(datasets.Value("string")),
    })  # fmt: skip
    rows = {"images": [images[:2], images[2:3]], "question": ["A?", "B?"], "label": [1, 0], "answers": [["a"], ["b"]]}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(tmp_path / "one")
    found = load_questions(str(tmp_path / "one"))
    assert [(len(q.images), q.label, q.id) for q in found] == [(2, "dog", "0"), (1, "cat", "1")]
    assert pixels(found[0]) == [np.asarray(image).tolist() for image in images[:2]]
    with pytest.raises(ConfigError, match=r"'answers' holds \['a'\]"):
        load_questions(str(tmp_path / "one"), columns={"group": "answers"})
    several = load_questions(str(tmp_path / "one"), columns={"label": "answers"})
    assert [(q.label, q.accepted, q.right) for q in several] == [("a", (), ("a",)), ("b", (), ("b",))]

    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "two")
    assert load_questions(str(tmp_path / "two"), split="test").split == "test"
    with pytest.raises(ConfigError, match="splits train, test"):
        load_questions(str(tmp_path / "two"))
    with pytest.raises(ConfigError, match=r"no split 'tset'; did you mean 'test'\?"):
        load_questions(str(tmp_path / "two"), split="tset")


def test_a_directory_laid_out_like_a_hub_s_with_config_and_split(tmp_path, images):
    made = datasets.Dataset.from_dict({"image": images[:2], "question": ["A?", "B?"]}).cast_column(
        "image", datasets.Image()
    )
    made.to_parquet(tmp_path / "hub/a.parquet")
    made.select([1]).to_parquet(tmp_path / "hub/b.parquet")
    files = "".join(f"  - split: {s}\n    path: {f}.parquet\n" for s, f in (("dev", "a"), ("test", "b")))
    (tmp_path / "hub/README.md").write_text(
        f"---\nconfigs:\n- config_name: Full\n  data_files:\n{files}- config_name: Small\n  data_files: b.parquet\n---\n"
    )
    found = load_questions(str(tmp_path / "hub"), split="Full:test")
    assert (len(found), found[0].text, found.split) == (1, "B?", "Full:test")
    with pytest.raises(ConfigError, match=r"no split 'train'; known: dev, test"):
        load_questions(str(tmp_path / "hub"), split="Full:train")
    with pytest.raises(ConfigError, match="Small"):
        load_questions(str(tmp_path / "hub"), split="test")


def test_pictures_are_upright_and_have_three_channels(tmp_path, images):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    sideways = images[0].crop((0, 0, 64, 32))
    (tmp_path / "p").mkdir()
    sideways.save(tmp_path / "p/a.png", exif=exif)
    images[1].convert("P").save(tmp_path / "p/b.png")
    found = load_questions(str(tmp_path / "p"), question=ASK)
    assert [question.images[0].size for question in found] == [(32, 64), (64, 64)]
    assert [question.images[0].mode for question in found] == ["RGB", "RGB"]


@pytest.mark.parametrize("filled_up", [False, True])
def test_all_broken_pictures_are_named_before_anything_is_asked(tmp_path, table, monkeypatch, filled_up):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", filled_up)  # lmms-eval's import does
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    files = ["0.png", "broken.png", "gone.png", "deep.png", "https://x.y/z.png", None] + ["gone.png"] * 8
    path = table("t.jsonl", id=list(range(14)), image=files, question=["?"] * 14)
    with pytest.raises(ConfigError) as refused:
        load_questions(path)
    said = str(refused.value)
    assert "13 pictures" in said and "and 3 more" in said
    for part in ("1 (", "2 (", "3 (mode I;16", "4 (https://x.y/z.png is an address", "5 (no picture"):
        assert part in said
    assert "0 (" not in said.replace("10 (", "")


REFUSED = {
    "no question": ({"image": ["0.png"], "words": ["?"]}, {}, "has no question.*It has image, words"),
    "no pictures": ({"question": ["?"], "photo": ["0.png"]}, {}, "no column of pictures.*It has question, photo"),
    "a misspelt column": ({"image": ["0.png"], "question": ["?"]}, {"columns": {"label": "anser"}}, "no column 'anser'"),
    "a misspelt part": ({"image": ["0.png"], "question": ["?"]}, {"columns": {"lable": "x"}}, "did you mean 'label'"),
    "a column as question": ({"image": ["0.png"], "question": ["?"]}, {"question": "questoin"}, "did you mean 'question'"),
    "duplicate ids": (
        {"id": ["x", "y", "x"], "image": ["0.png"] * 3, "question": ["?"] * 3}, {}, "duplicate ids: x; expected each once",
    ),
    "an empty id": ({"id": ["x", "", " "], "image": ["0.png"] * 3, "question": ["?"] * 3}, {}, "no id in row 1, row 2; expected"),
    "a missing id": ({"id": ["x", None], "image": ["0.png"] * 2, "question": ["?"] * 2}, {}, "no id in row 1; .*--column id=none"),
    "an empty question": ({"image": ["0.png"] * 2, "question": ["?", " "]}, {}, "empty questions: 1;"),
    "an empty text": ({"image": ["0.png"]}, {"question": " "}, "question is ' '"),
    "a split of a file": ({"image": ["0.png"], "question": ["?"]}, {"split": "test"}, "is one file"),
    "no limit": ({"image": ["0.png"], "question": ["?"]}, {"limit": 0}, "limit is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name(table, case):
    columns, options, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        load_questions(table("t.jsonl", **columns), **options)


def test_sources_that_are_none(tmp_path, table):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"neither pictures .* nor tables"):
        load_questions(str(empty), question=ASK)
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"t.txt is no table; expected .*\.parquet"):
        load_questions(str(tmp_path / "t.txt"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match=r"torn.parquet cannot be read"):
        load_questions(str(tmp_path / "torn.parquet"))
    datasets.Dataset.from_dict({"image": [], "question": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(ConfigError, match="expected a data set with rows in it"):
        load_questions(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="expected a whole table with rows in it"):
        load_questions(table("none.parquet", image=[], question=[]))
    with pytest.raises(ConfigError, match=r"'nobody/nothing', which is no file or directory here"):
        find_questions("nobody/nothing")


def test_a_task_of_lmms_eval_as_its_own_functions_give_it():
    pytest.importorskip("lmms_eval")
    found = find_questions("shapes_pope_pgd", limit=3)
    rows = load_questions("tasks/shapes/data/pope.parquet", limit=3)
    assert [(q.id, q.text, q.label, q.group) for q in found] == [(q.id, q.text, q.label, q.group) for q in rows]
    assert [pixels(q) for q in found] == [pixels(q) for q in rows]
    assert found.max_new_tokens == 8 and found.split == "test"
    with pytest.raises(ConfigError, match=r"is a group of .*shapes_pope"):
        find_questions("smoothguard_tiny")
    with pytest.raises(ConfigError, match="has its own split"):
        find_questions("shapes_pope", split="train")


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Makes a miniature of a task, and has lmms-eval know it."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks import TaskManager
    from miniatures import write_task

    from lmms_smoothguard.harness.lmms_eval import discovery
    from lmms_smoothguard.harness.lmms_eval import questions as tasks

    def make(name, count, change=lambda rows: rows):
        made = write_task(tmp_path, name, count, change)
        places = [str(tmp_path), str(discovery.tasks_path())]
        manager = TaskManager("ERROR", include_path=places, include_defaults=False)
        monkeypatch.setattr(tasks, "_manager_of", lambda name: manager)
        return made

    return make


def test_a_task_with_two_questions_under_one_id_goes_by_row_numbers(task, caplog):
    """As MME has them. Its first row alone has an id to itself, and is called the same."""

    def shared(rows):
        return [row | {"question_id": f"scene{number // 2}.png"} for number, row in enumerate(rows)]

    name = task("pope_pgd", 4, shared)
    assert find_questions(name).ids == ("0", "1", "2", "3")
    assert "question_id of its own" in caplog.text
    assert find_questions(name, limit=1).ids == ("0",)


@pytest.mark.parametrize("name", ["textvqa_val_pgd", "vqav2_val_pgd"])
def test_of_a_task_s_ten_answers_every_one_is_right_and_the_most_frequent_is_led_away_from(task, name):
    found = find_questions(task(name, 2))
    other = "unanswerable" if "text" in name else "maybe"
    assert [(q.label, q.accepted) for q in found] == [("yes", ("yes", other)), ("no", ("no", other))]


def test_a_task_that_names_a_field_that_is_not_there(task):
    """Upstream's TextVQA has `doc_to_target: answer`, which lmms-eval takes for the answer "answer"."""
    found = find_questions(task("textvqa_val", 1))
    assert [(q.label, q.right) for q in found] == [(None, ())]
    ours = task("textvqa_val_pgd", 1, lambda rows: [{k: v for k, v in row.items() if k != "answers"} for row in rows])
    with pytest.raises(ConfigError, match="no field 'answers', the right answer by its task"):
        find_questions(ours)


def test_a_place_among_the_questions(tmp_path, folder):
    refuse_inside(str(folder), {"out": tmp_path / "elsewhere", "cache": tmp_path})
    (tmp_path / "link").symlink_to(folder)
    for source, place in [
        (folder, folder),
        (folder, tmp_path / "link" / "x"),
        (tmp_path / "link", folder / "sub" / "x"),
    ]:
        with pytest.raises(ConfigError, match=r"out is .*, inside the data"):
            refuse_inside(str(source), {"out": place})
    (folder / "attacks.parquet").write_bytes(b"")  # of an earlier run nothing else is read
    refuse_inside(str(folder), {"out": folder / "again"})


def test_questions_of_a_json_list(tmp_path, table):
    table("unused.csv", x=[1])
    (tmp_path / "t.json").write_text(json.dumps([{"id": "a", "images": ["0.png", "1.png"], "query": "Same?"}]))
    (found,) = load_questions(str(tmp_path / "t.json"))
    assert (found.id, found.text, len(found.images)) == ("a", "Same?", 2)
