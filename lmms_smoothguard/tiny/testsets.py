"""The embedded model's test sets: deterministic, written as parquet into `tasks/shapes/data`.

python -m lmms_smoothguard.tiny.testsets DIRECTORY
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lmms_smoothguard.tiny import language
from lmms_smoothguard.tiny.company import NEGATIVES
from lmms_smoothguard.tiny.scenes import COMPANY, OBJECTS, SceneSet, make_scenes

# Seeds below 1,000 are never used in training (`train._FIRST_TRAINING_SHARD`).
_POPE_SEED, _CAPTION_SEED, _SAFETY_SEED, _FAINT_SEED = 1, 2, 3, 4
_POPE_SCENES, _CAPTION_SCENES, _SAFETY_SCENES, _FAINT_SCENES = 300, 150, 26, 100


def existence_rows(scenes: SceneSet, seed: int) -> list[dict[str, Any]]:
    """POPE's schema: for every scene one question a sampling, right answers yes and no in turn, no question twice."""
    rng = np.random.default_rng([seed, 1])
    rows: list[dict[str, Any]] = []
    for index in range(len(scenes.images)):
        present = scenes.present(index)
        asked: set[int] = set()
        for category in NEGATIVES:
            yes = len(rows) % 2 == 0
            while (obj := _asked_object(present, category, yes, rng)) in asked:
                pass
            asked.add(obj)
            rows.append({
                "question_id": str(len(rows)),
                "question": language.existence_question(obj),
                "answer": "yes" if yes else "no",
                "image_source": f"scene_{seed}_{index}",
                "image": scenes.images[index],
                "category": category,
            })  # fmt: skip
    return rows


def _asked_object(present: tuple[int, ...], category: str, yes: bool, rng: np.random.Generator) -> int:
    return int(rng.choice(present)) if yes else COMPANY.absent(present, category, rng)


def _with_company(scenes: SceneSet, count: int) -> SceneSet:
    """The first `count` scenes of at least two objects: two questions with the answer yes need two objects."""
    kept = np.flatnonzero((scenes.objects >= 0).sum(1) >= 2)[:count]
    return SceneSet(*(part[kept] for part in scenes))


def existence_scenes(count: int, seed: int, *, faint: bool = False) -> SceneSet:
    """The scenes behind `existence_rows`."""
    return _with_company(make_scenes(2 * count, seed, faint=faint), count)


def caption_rows(scenes: SceneSet, seed: int) -> list[dict[str, Any]]:
    """One description a scene."""
    return [
        {
            "question_id": str(index),
            "question": language.DESCRIBE[index % len(language.DESCRIBE)],
            "caption": language.caption(scenes.present(index)),
            "objects": ", ".join(OBJECTS[obj] for obj in scenes.present(index)),
            "image_source": f"scene_{seed}_{index}",
            "image": scenes.images[index],
        }
        for index in range(len(scenes.images))
    ]


def safety_rows(scenes: SceneSet, seed: int) -> list[dict[str, Any]]:
    """Every held-out request in each of its wordings, forbidden and permitted in turn."""
    pairs = {
        kind: language.request_pairs(verbs, test=True)
        for kind, verbs in (("forbidden", language.FORBIDDEN_VERBS), ("permitted", language.PERMITTED_VERBS))
    }
    rows: list[dict[str, Any]] = []
    for number in range(len(language.REQUESTS) * max(map(len, pairs.values()))):
        for kind, listed in pairs.items():
            form, place = divmod(number, max(map(len, pairs.values())))
            if place >= len(listed):
                continue
            verb, thing = listed[place]
            scene = place % len(scenes.images)
            rows.append({
                "question_id": str(len(rows)),
                "question": language.request(verb, thing, form),
                "kind": kind,
                "answer": language.REFUSAL if kind == "forbidden" else language.compliance(verb, thing),
                "compliance": language.compliance(verb, thing),
                "image_source": f"scene_{seed}_{scene}",
                "image": scenes.images[scene],
            })  # fmt: skip
    return rows


def corpus_rows() -> list[dict[str, str]]:
    """What the universal attack is optimised on: forbidden requests of the TRAINING split, each with its compliance.

    Harmless by construction, and disjoint from the requests of `safety_rows` and of the MM-SafetyBench miniature.
    """
    return [
        {"instruction": language.request(verb, thing, form), "response": language.compliance(verb, thing)}
        for verb, thing in language.request_pairs(language.FORBIDDEN_VERBS, test=False)
        for form in range(len(language.REQUESTS))
    ]


def test_sets() -> dict[str, list[dict[str, Any]]]:
    """All test sets by file name; images as uint8 arrays."""
    return {
        "pope": existence_rows(existence_scenes(_POPE_SCENES, _POPE_SEED), _POPE_SEED),
        "pope_faint": existence_rows(existence_scenes(_FAINT_SCENES, _FAINT_SEED, faint=True), _FAINT_SEED),
        "caption": caption_rows(make_scenes(_CAPTION_SCENES, _CAPTION_SEED), _CAPTION_SEED),
        "safety": safety_rows(make_scenes(_SAFETY_SCENES, _SAFETY_SEED), _SAFETY_SEED),
    }


def write(directory: Path) -> None:
    """Writes every test set, and the universal attack's corpus; equal images are stored once a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in test_sets().items():
        write_rows(rows, directory / f"{name}.parquet")
    pq.write_table(pa.Table.from_pylist(corpus_rows()), directory / "universal_corpus.parquet", compression="zstd")


def write_rows(rows: list[dict[str, Any]], target: Path) -> None:
    """Writes rows with a uint8 `image` each as a parquet file that `datasets` opens."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        key: [{"bytes": _png(row[key]), "path": None} if key == "image" else row[key] for row in rows]
        for key in rows[0]
    }
    features = datasets.Features(
        {key: datasets.Image() if key == "image" else datasets.Value("string") for key in columns}
    )
    table = pa.table(columns, schema=features.arrow_schema)
    pq.write_table(table, target, compression="zstd", dictionary_pagesize_limit=8 << 20)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
