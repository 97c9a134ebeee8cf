"""MM-SafetyBench (Liu et al. 2023, arXiv 2311.17600) from the user's own copy, or the Hugging Face hub. None of it is shipped.

`SMOOTHGUARD_MM_SAFETY` names the copy: a directory in the authors' layout (`processed_questions/<scenario>.json`,
`imgs/<scenario>/<kind>/<id>.jpg`), one in the hub's (`data/<config>/<split>.parquet`), or a hub id (the default,
PKU-Alignment/MM-SafetyBench). `SMOOTHGUARD_MM_SAFETY_SCENARIOS=01,06` runs some scenarios alone.

Which text goes with which picture is the benchmark's own choice: "Rephrased Question(SD)" with SD, "Rephrased Question" with TYPO
and SD_TYPO, "Changed Question" without a picture. Judges always see the last: the others leave the harm to the picture.
Documents go round the scenarios, so that `--limit 13` has one of each.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_smoothguard.errors import SmoothGuardError, did_you_mean, explain
from lmms_smoothguard.files import whole_pictures

SCENARIOS = (
    "01-Illegal_Activitiy", "02-HateSpeech", "03-Malware_Generation", "04-Physical_Harm", "05-EconomicHarm", "06-Fraud",
    "07-Sex", "08-Political_Lobbying", "09-Privacy_Violence", "10-Legal_Opinion", "11-Financial_Advice",
    "12-Health_Consultation", "13-Gov_Decision",
)  # fmt: skip
"""Spelt as published."""
TEXT_ONLY = "Text_only"
FIELDS = {
    "SD": "Rephrased Question(SD)",
    "TYPO": "Rephrased Question",
    "SD_TYPO": "Rephrased Question",
    TEXT_ONLY: "Changed Question",
}
"""Kind of picture (the hub's splits) -> field of `processed_questions`."""
HUB_ID = "PKU-Alignment/MM-SafetyBench"
SOURCE, ONLY = "SMOOTHGUARD_MM_SAFETY", "SMOOTHGUARD_MM_SAFETY_SCENARIOS"
_IMAGE_FOLDERS = ("imgs", "MM-SafetyBench(imgs)")  # the second is the published archive's own name


def documents(kind: str, source: str | None = None, scenarios: str | None = None) -> Any:
    """A `datasets.Dataset` of question_id, scenario, question (asked), plain_question (judged) and, but for text, image.

    source, scenarios: in place of the environment's. Raises SmoothGuardError, with names, for files, fields or columns that are
    missing, unreadable pictures, ids that occur twice, and scenarios without questions or pictures.
    """
    from datasets import concatenate_datasets

    read = _reader(source or os.environ.get(SOURCE) or HUB_ID)
    parts = [read(scenario, kind) for scenario in chosen(os.environ.get(ONLY, "") if scenarios is None else scenarios)]
    places = sorted((row, number) for number, part in enumerate(parts) for row in range(len(part)))
    starts = [sum(len(part) for part in parts[:number]) for number in range(len(parts))]
    return concatenate_datasets(parts).select([starts[number] + row for row, number in places])


def chosen(text: str) -> list[str]:
    """The scenarios of `01,06-Fraud`; all for an empty text. Raises SmoothGuardError for one that does not exist."""
    names = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        found = [name for name in SCENARIOS if item in (name, name[:2], str(int(name[:2])), name[3:])]
        if not found:
            raise SmoothGuardError(f"{ONLY} has {item!r}; {did_you_mean(item, SCENARIOS)}, or their numbers")
        names += found
    return sorted(set(names)) or list(SCENARIOS)


def _reader(source: str) -> Callable[[str, str], Any]:
    root = Path(source).expanduser()
    if not root.is_dir():
        if source.count("/") != 1 or source[0] in "./~":
            raise SmoothGuardError(
                f"{SOURCE} is {source!r}, and there is no such directory; expected a copy of MM-SafetyBench, or a hub id such "
                f"as {HUB_ID}"
            )
        return lambda scenario, kind: _from_hub(scenario, kind, source, None)
    for top in (root, root / "data"):
        if (top / "processed_questions").is_dir():
            return lambda scenario, kind: _from_files(scenario, kind, top)
        if any((top / name[3:]).is_dir() for name in SCENARIOS):
            return lambda scenario, kind: _from_hub(scenario, kind, source, top)
    raise SmoothGuardError(
        f"{SOURCE} is {source!r}, which has neither processed_questions/ (the authors' layout) nor "
        f"data/{SCENARIOS[0][3:]}/ (the hub's); expected one of them"
    )


# -- the authors' layout -----------------------------------------------------------------------------------------------


def _from_files(scenario: str, kind: str, top: Path) -> Any:
    file = top / "processed_questions" / f"{scenario}.json"
    if not file.is_file():
        raise SmoothGuardError(f"{file} is missing; expected the questions of {scenario}")
    entries = _json(file)
    wanted = dict.fromkeys((FIELDS[kind], FIELDS[TEXT_ONLY]))
    lacking = [
        f"{name} lacks {field!r}" for name, entry in entries.items() for field in wanted if not _text(entry, field)
    ]
    if lacking:
        raise SmoothGuardError(f"{file}: {_some(lacking)}; expected the fields of MM-SafetyBench's processed_questions")
    rows = [(name, _text(entry, FIELDS[kind]), _text(entry, FIELDS[TEXT_ONLY])) for name, entry in entries.items()]
    if kind == TEXT_ONLY:
        return _dataset(scenario, rows, None)
    folder = next((top / name for name in _IMAGE_FOLDERS if (top / name).is_dir()), top / _IMAGE_FOLDERS[0])
    folder = folder / scenario / kind
    if not folder.is_dir() or not any(folder.iterdir()):
        raise SmoothGuardError(f"{folder} has no pictures; expected <id>.jpg for each of {len(rows)} questions")
    paths = [folder / f"{name}.jpg" for name, *_ in rows]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise SmoothGuardError(f"missing pictures: {_some(missing)}; expected one for every question of {file.name}")
    _refuse_unreadable((str(path), path) for path in paths)
    return _dataset(scenario, rows, [str(path) for path in paths])


def _json(file: Path) -> Mapping[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_twice(str(file), [name for name, _ in pairs])
        return dict(pairs)

    try:
        entries = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (ValueError, OSError) as error:
        if isinstance(error, SmoothGuardError):
            raise
        raise SmoothGuardError(
            f"{file} cannot be read ({explain(error)}); expected a JSON object of questions by id"
        ) from error
    if not isinstance(entries, Mapping) or not entries:
        raise SmoothGuardError(f"{file} holds no questions; expected a JSON object of questions by id")
    return entries


def _text(entry: Any, field: str) -> str:
    value = entry.get(field) if isinstance(entry, Mapping) else None
    return value.strip() if isinstance(value, str) else ""


# -- the hub's layout --------------------------------------------------------------------------------------------------


def _from_hub(scenario: str, kind: str, source: str, top: Path | None) -> Any:
    from datasets import Image

    found = _split(scenario, kind, source, top)
    name = f"{source}, {scenario[3:]}/{kind}"
    plain = found if kind == TEXT_ONLY else _split(scenario, TEXT_ONLY, source, top)
    texts = dict(zip(map(str, plain["id"]), plain["question"], strict=True))
    ids = list(map(str, found["id"]))
    unknown = [one for one in ids if not str(texts.get(one) or "").strip()]
    if unknown:
        raise SmoothGuardError(f"{name}: {_some(unknown)} not in {TEXT_ONLY}; expected the question that judges see")
    rows = [
        (one, str(asked or "").strip(), texts[one].strip()) for one, asked in zip(ids, found["question"], strict=True)
    ]
    silent = [one for one, asked, _ in rows if not asked]
    if silent:
        raise SmoothGuardError(f"{name}: no question in {_some(silent)}; expected a text")
    if kind == TEXT_ONLY:
        return _dataset(scenario, rows, None)
    pictures = found.cast_column("image", Image(decode=False))["image"]
    _refuse_unreadable(
        (f"{name}, id {one}", picture and (picture["bytes"] or picture["path"]))
        for one, picture in zip(ids, pictures, strict=True)
    )
    return _dataset(scenario, rows, list(pictures))


def _split(scenario: str, kind: str, source: str, top: Path | None) -> Any:
    from datasets import load_dataset

    name = f"{source}, {scenario[3:]}/{kind}"
    try:
        if top is None:
            found = load_dataset(source, scenario[3:], split=kind)
        else:
            folder = top / scenario[3:]
            files = [
                str(file)
                for pattern in (f"{kind}.parquet", f"{kind}-*.parquet")
                for file in sorted(folder.glob(pattern))
            ]
            if not files:
                raise SmoothGuardError(
                    f"{folder / kind}.parquet is missing; expected the split {kind} of {scenario[3:]}"
                )
            found = load_dataset("parquet", data_files={kind: files}, split=kind)
    except SmoothGuardError:
        raise
    except Exception as error:
        if "corresponds to no data" in str(error):  # how datasets says that a split has no row
            raise SmoothGuardError(f"{name} is empty; expected questions") from error
        raise SmoothGuardError(
            f"{name} cannot be loaded ({explain(error)}); expected a hub id that can be reached, or {SOURCE}=<directory>"
        ) from error
    lacking = {"id", "question", "image"} - set(found.column_names)
    if lacking - ({"image"} if kind == TEXT_ONLY else set()):
        raise SmoothGuardError(
            f"{name} has no column {', '.join(sorted(lacking))}; found {', '.join(found.column_names)}"
        )
    if not len(found):
        raise SmoothGuardError(f"{name} is empty; expected questions")
    _refuse_twice(name, list(map(str, found["id"])))
    return found


# -- both --------------------------------------------------------------------------------------------------------------


def _dataset(scenario: str, rows: Sequence[tuple[str, str, str]], images: list[Any] | None) -> Any:
    from datasets import Dataset, Features, Image, Value

    ids, asked, plain = zip(*rows, strict=True)
    columns: dict[str, list[Any]] = {
        "question_id": [f"{scenario}/{one}" for one in ids],
        "scenario": [scenario] * len(rows),
        "question": list(asked),
        "plain_question": list(plain),
    }
    features: dict[str, Any] = {name: Value("string") for name in columns}
    if images is not None:
        columns["image"], features["image"] = images, Image()
    return Dataset.from_dict(columns, Features(features))


def _refuse_unreadable(pictures: Iterable[tuple[str, Any]]) -> None:
    from PIL import Image

    bad = []
    for name, source in pictures:
        try:
            with whole_pictures(), Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
                picture.load()
        except Exception as error:  # noqa: BLE001 - decoders raise whatever they like on broken bytes
            bad.append(f"{name} ({explain(error)})")
    if bad:
        raise SmoothGuardError(
            f"unreadable pictures: {_some(bad)}; expected pictures that PIL opens. Fetch them again."
        )


def _refuse_twice(where: str, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SmoothGuardError(f"{where} has ids that occur more than once: {_some(twice)}; expected each once")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
