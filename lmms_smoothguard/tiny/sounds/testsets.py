"""The embedded audio model's test sets: deterministic, written as parquet into `tasks/sounds/data`.

python -m lmms_smoothguard.tiny.sounds.testsets DIRECTORY

Digits in them are spoken by voices that training never hears. They need eSpeak NG to be written, not to be read.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lmms_smoothguard.tiny import language as images
from lmms_smoothguard.tiny.company import NEGATIVES
from lmms_smoothguard.tiny.sounds import language
from lmms_smoothguard.tiny.sounds.clips import COMPANY, OBJECTS, RATE, Clip, make_clips

# Seeds below 1,000 are never used in training (`train.TRAINING_SEED`).
_POPE_SEED, _CAPTION_SEED, _SAFETY_SEED, _FAINT_SEED = 1, 2, 3, 4
_POPE_CLIPS, _CAPTION_CLIPS, _SAFETY_CLIPS, _FAINT_CLIPS = 140, 100, 26, 50


def existence_rows(clips: list[Clip], seed: int) -> list[dict[str, Any]]:
    """POPE's schema: for every clip one question a sampling, right answers yes and no in turn, no question twice."""
    rng = np.random.default_rng([seed, 1])
    rows: list[dict[str, Any]] = []
    for index, clip in enumerate(clips):
        asked: set[int] = set()
        for category in NEGATIVES:
            yes = len(rows) % 2 == 0
            while (obj := _asked(clip.objects, category, yes, rng)) in asked:
                pass
            asked.add(obj)
            question = language.existence_question(obj)
            rows.append(_row(len(rows), question, seed, index, clip, answer="yes" if yes else "no", category=category))
    return rows


def _asked(present: tuple[int, ...], category: str, yes: bool, rng: np.random.Generator) -> int:
    return int(rng.choice(present)) if yes else COMPANY.absent(present, category, rng)


def _row(number: int, question: str, seed: int, index: int, clip: Clip, **fields: str) -> dict[str, Any]:
    source = {"audio_source": f"clip_{seed}_{index}", "audio": clip.sound}
    return {"question_id": str(number), "question": question, **fields, **source}


def existence_clips(count: int, seed: int, *, faint: bool = False) -> list[Clip]:
    """Clips of at least two sounds: two questions with the answer yes need two."""
    return [clip for clip in make_clips(2 * count, seed, faint=faint, test=True) if len(clip.objects) > 1][:count]


def caption_rows(clips: list[Clip], seed: int) -> list[dict[str, Any]]:
    """One description a clip, and how many sounds it has."""
    return [
        _row(
            index, language.DESCRIBE[index % len(language.DESCRIBE)], seed, index, clip,
            caption=language.caption(clip.objects), count=language.NUMBERS[len(clip.objects) - 1],
            objects=", ".join(OBJECTS[obj] for obj in clip.objects),
        )
        for index, clip in enumerate(clips)
    ]  # fmt: skip


def safety_rows(clips: list[Clip], seed: int) -> list[dict[str, Any]]:
    """Every held-out request once, forbidden and permitted in turn, their wordings one after the other."""
    forbidden = images.request_pairs(images.FORBIDDEN_VERBS, test=True)
    permitted = images.request_pairs(images.PERMITTED_VERBS, test=True)
    rows: list[dict[str, Any]] = []
    for place, pair in enumerate(zip(forbidden, permitted, strict=False)):
        for kind, (verb, thing) in zip(("forbidden", "permitted"), pair, strict=True):
            complied = images.compliance(verb, thing)
            index = place % len(clips)
            rows.append(
                _row(
                    len(rows), images.request(verb, thing, place), seed, index, clips[index], kind=kind,
                    answer=images.REFUSAL if kind == "forbidden" else complied, compliance=complied,
                )
            )  # fmt: skip
    return rows


def test_sets() -> dict[str, list[dict[str, Any]]]:
    """All test sets by file name; sounds as int16 arrays."""
    faint = existence_clips(_FAINT_CLIPS, _FAINT_SEED, faint=True)
    return {
        "pope": existence_rows(existence_clips(_POPE_CLIPS, _POPE_SEED), _POPE_SEED),
        "pope_faint": existence_rows(faint, _FAINT_SEED),
        "caption": caption_rows(make_clips(_CAPTION_CLIPS, _CAPTION_SEED, test=True), _CAPTION_SEED),
        "safety": safety_rows(make_clips(_SAFETY_CLIPS, _SAFETY_SEED, test=True), _SAFETY_SEED),
    }


def write(directory: Path) -> None:
    """Writes every test set, sounds as 16-bit FLAC; equal sounds are stored once a file. The column says that it is not to be
    decoded, which `datasets` does with torchcodec alone: `sounds.sound_of` reads it."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in test_sets().items():
        columns = {
            key: [{"bytes": flac(row[key]), "path": None} if key == "audio" else row[key] for row in rows]
            for key in rows[0]
        }
        features = datasets.Features(
            {key: datasets.Audio(RATE, decode=False) if key == "audio" else datasets.Value("string") for key in columns}
        )
        table = pa.table(columns, schema=features.arrow_schema)
        pq.write_table(table, directory / f"{name}.parquet", compression="zstd", dictionary_pagesize_limit=16 << 20)


def flac(sound: np.ndarray) -> bytes:
    """An int16 sound as a file."""
    import soundfile

    written = io.BytesIO()
    soundfile.write(written, sound, RATE, format="FLAC", subtype="PCM_16")
    return written.getvalue()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
