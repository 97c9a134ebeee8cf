"""Miniatures of benchmarks: the embedded scenes in the schema of each hub data set, and tasks that read them.

A derived task overrides only where the data come from, so that documents, prompts, scoring and attack are the real ones.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from lmms_smoothguard.harness.lmms_eval.discovery import tasks_path
from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.scenes import SceneSet, make_scenes
from lmms_smoothguard.tiny.testsets import existence_rows, existence_scenes

SEED = 700
STRING, INTEGER, IMAGE = datasets.Value("string"), datasets.Value("int64"), datasets.Image()
Rows = list[dict[str, Any]]


def png(image: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def questions(count: int) -> tuple[SceneSet, list[dict[str, Any]]]:
    """`count` scenes with one question each, right answers yes and no in turn."""
    scenes = existence_scenes(2 * count, SEED)
    rows = [row for row in existence_rows(scenes, SEED) if row["category"] == "adversarial"][:count]
    return scenes, rows


def pope(count: int) -> Rows:
    return [{**row, "id": str(n), "image": png(row["image"])} for n, row in enumerate(questions(count)[1])]


def vqav2(count: int) -> Rows:
    return [
        {
            "question_type": "is there a",
            "multiple_choice_answer": row["answer"],
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": n + 1}
                for n, text in enumerate([row["answer"]] * 8 + ["maybe"] * 2)
            ],
            "image_id": 1000 + number,
            "answer_type": "yes/no",
            "question_id": 1000000 + number,
            "question": row["question"],
            "image": png(row["image"]),
        }
        for number, row in enumerate(questions(count)[1])
    ]


def textvqa(count: int) -> Rows:
    return [
        {
            "image_id": f"scene{number}",
            "question_id": 34602 + number,
            "question": row["question"].lower(),
            "question_tokens": row["question"].lower().split(),
            "image": png(row["image"]),
            "image_width": 64,
            "image_height": 64,
            "answers": [row["answer"]] * 9 + ["unanswerable"],
            "image_classes": ["Shape"],
            "set_name": "val",
            "ocr_tokens": [],
        }
        for number, row in enumerate(questions(count)[1])
    ]


def coco(count: int) -> Rows:
    scenes = make_scenes(count, SEED)
    return [
        {
            "question_id": f"COCO_val2014_{1000 + number:012d}.jpg",
            "image": png(scenes.images[number]),
            "question": "Please carefully observe the image and come up with a caption for the image",
            "answer": [language.caption(scenes.present(number)), "Some shapes.", "Shapes on a plain ground."],
            "id": number,
            "license": 1,
            "file_name": f"COCO_val2014_{1000 + number:012d}.jpg",
            "coco_url": "",
            "height": 64,
            "width": 64,
            "date_captured": "2013-11-14 16:28:13",
        }
        for number in range(count)
    ]


def llava_bench(count: int) -> Rows:
    scenes = make_scenes(count, SEED)
    return [
        {
            "question_id": str(number),
            "question": language.DESCRIBE[number % 2],
            "image_id": f"{number:03d}.jpg",
            "category": ("conv", "detail", "complex")[number % 3],
            "image": png(scenes.images[number]),
            "caption": language.caption(scenes.present(number)),
            "gpt_answer": language.caption(scenes.present(number)),
            "gpt_answer_id": str(number),
        }
        for number in range(count)
    ]


def ai2d(count: int) -> Rows:
    return [
        {
            "question": row["question"],
            "options": ["yes", "no"],
            "answer": "0" if row["answer"] == "yes" else "1",
            "image": png(row["image"]),
        }
        for row in questions(count)[1]
    ]


def chartqa(count: int) -> Rows:
    return [
        {
            "type": ("human_test", "augmented_test")[number % 2],
            "question": row["question"],
            "answer": row["answer"],
            "image": png(row["image"]),
        }
        for number, row in enumerate(questions(count)[1])
    ]


def scienceqa(count: int) -> Rows:
    """Every second question has no image, as half of ScienceQA has none."""
    return [
        {
            "image": None if number % 2 else png(row["image"]),
            "question": row["question"],
            "choices": ["yes", "no"],
            "answer": 0 if row["answer"] == "yes" else 1,
            "hint": "",
            "task": "closed choice",
            "grade": "grade2",
            "subject": "natural science",
        }
        for number, row in enumerate(questions(count)[1])
    ]


def muirbench(count: int) -> Rows:
    """Two images a question."""
    scenes, rows = questions(count)
    return [
        {
            "idx": f"mini_{number}",
            "task": "Counting",
            "image_relation": "Independent",
            "image_type": "Drawings",
            "question": row["question"],
            "options": ["yes", "no"],
            "answer": "A" if row["answer"] == "yes" else "B",
            "image_list": [png(row["image"]), png(scenes.images[-1 - number])],
        }
        for number, row in enumerate(rows)
    ]


_LISTS = {
    "answers": [STRING], "options": [STRING], "choices": [STRING], "ocr_tokens": [STRING], "question_tokens": [STRING],
    "image_classes": [STRING], "image_list": [IMAGE],
}  # fmt: skip
_VQAV2_ANSWERS = [{"answer": STRING, "answer_confidence": STRING, "answer_id": INTEGER}]


def features_of(row: Mapping[str, Any]) -> datasets.Features:
    """The hub's types, told by a row's values."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name == "image":
            found[name] = IMAGE
        elif isinstance(value, list):
            nested = value and isinstance(value[0], dict) and "answer_id" in value[0]
            found[name] = _VQAV2_ANSWERS if nested else _LISTS.get(name, [STRING])
        else:
            found[name] = INTEGER if isinstance(value, int) else STRING
    return datasets.Features(found)


MAKERS: dict[str, tuple[Callable[[int], Rows], str]] = {
    "coco2014_cap_val_pgd": (coco, "coco"),
    "coco2017_cap_val_pgd": (coco, "coco"),
    "llava_in_the_wild_pgd": (llava_bench, "llava_bench"),
    "textvqa_val_pgd": (textvqa, "vqa"),
    "vqav2_val_pgd": (vqav2, "vqa"),
} | {
    f"pope_{attack}{suffix}": (pope, "pope")
    for attack in ("pgd", "apgd", "eot")
    for suffix in ("", "_popular", "_random")
}
"""Our tasks on hub data: what makes their miniatures, and the folder of their YAML files."""

UPSTREAM: dict[str, tuple[Callable[[int], Rows], str]] = {
    "ai2d": (ai2d, "ai2d/ai2d.yaml"),
    "chartqa": (chartqa, "chartqa/chartqa.yaml"),
    "muirbench": (muirbench, "muirbench/muirbench.yaml"),
    "scienceqa": (scienceqa, "scienceqa/scienceqa.yaml"),
    "textvqa_val": (textvqa, "textvqa/textvqa_val.yaml"),
}
"""Upstream's own tasks, none of which knows of attacks."""


def our_yaml(task: str) -> Path:
    return tasks_path() / MAKERS[task][1] / f"{task}.yaml"


def upstream_yaml(task: str) -> Path:
    import lmms_eval.tasks

    return Path(lmms_eval.tasks.__file__).parent / UPSTREAM[task][1]


def write_task(directory: Path, task: str, count: int, change: Callable[[Rows], Rows] = lambda rows: rows) -> str:
    """Writes a miniature of a task, ours or upstream's, and a task that reads it; returns that task's name.

    Ours keep their names, which the derived YAML takes over; upstream's are called `mini_<name>`.
    """
    from lmms_eval.utils import load_yaml_config

    ours = task in MAKERS
    source = our_yaml(task) if ours else upstream_yaml(task)
    split = load_yaml_config(str(source), mode="simple")["test_split"].strip()
    rows = change((MAKERS if ours else UPSTREAM)[task][0](count))
    file = directory / f"{task}.parquet"
    write_rows(file, rows)
    name = task if ours else f"mini_{task}"
    (directory / f"{name}.yaml").write_text(
        f"include: {source}\ntask: {name}\ndataset_path: parquet\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n    {split}: {file}\n"
    )
    return name


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    features = features_of(rows[0])
    datasets.Dataset.from_list([dict(row) for row in rows], features=features).to_parquet(str(file))


def run(
    directory: Path,
    tasks: Sequence[str],
    *,
    force_simple: bool = False,
    limit: int | None = None,
    cli_args: Any = None,
    model: str = "smoothguard_llava",
    **model_args: Any,
):
    """Evaluates tasks written into a directory with the embedded model, as lmms-eval's command line does."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from lmms_smoothguard.tiny.model import MODEL_DIR

    arguments = {
        "pretrained": MODEL_DIR,
        **({"defense": "none"} if model.startswith("smoothguard_") else {}),
        **model_args,
    }
    return simple_evaluate(
        model=model, model_args=",".join(f"{key}={value}" for key, value in arguments.items()),
        tasks=list(tasks), batch_size=1, bootstrap_iters=0, limit=limit, force_simple=force_simple, cli_args=cli_args,
        task_manager=TaskManager(
            "ERROR", include_path=[str(directory), str(tasks_path())], include_defaults=False, model_name=model
        ),  # without reading upstream's thousand YAML files
    )  # fmt: skip


def figures_of(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """A task's figures by metric, whatever the filter's name."""
    return {name.partition(",")[0]: value for name, value in results["results"][task].items()}
