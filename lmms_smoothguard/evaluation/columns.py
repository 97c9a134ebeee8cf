"""Which column of a table is what, and what stands in its cells."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lmms_smoothguard.errors import ConfigError, did_you_mean
from lmms_smoothguard.files import whole_pictures

NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("question_id", "id", "qid", "sample_id", "uid"),
    "images": ("images", "image", "picture", "pictures", "image_path", "file_name"),
    "sounds": ("audio", "audios", "sound", "sounds", "audio_path"),
    "question": ("question", "prompt", "text", "query", "instruction"),
    "label": ("answer", "label", "caption"),
    "target": ("target",),
    "group": ("group", "image_source", "image_id", "audio_source", "audio_id"),
    "accepted": ("accepted",),
}
"""What columns are called, the likeliest first."""
_OF_FOLDERS = ({"id", "image"}, {"id", "audio"})


@dataclass(frozen=True)
class Columns:
    """The column of each part of a question, None for none, but one of pictures or sounds there is; `text` is asked of every
    picture and sound where `question` is None.

    Columns are found by their usual names where they hold one value a row, `accepted` where it holds lists, pictures and
    sounds in either case; a label's column that the user names may hold lists too: then each text in one is a right answer.
    """

    images: str | None = None
    sounds: str | None = None
    id: str | None = None
    question: str | None = None
    label: str | None = None
    target: str | None = None
    group: str | None = None
    accepted: str | None = None
    text: str | None = None

    @property
    def media(self) -> list[str]:
        """The columns that hold pictures and sounds."""
        return [name for name in (self.images, self.sounds) if name is not None]

    @classmethod
    def find(
        cls,
        names: Sequence[str],
        features: Mapping[str, Any],
        question: str | None,
        given: Mapping[str, str | None],
        source: str,
    ) -> Columns:
        """Columns by what the user says, else by their usual names. Raises ConfigError, with the columns there are."""
        for part, name in given.items():
            if part not in NAMES:
                raise ConfigError(f"unknown part of a question {part!r}; {did_you_mean(part, NAMES)}")
            if name is not None and name not in names:
                raise ConfigError(f"{source} has no column {name!r} for {part}; {did_you_mean(name, names)}")
        found: dict[str, str | None] = {
            part: given[part]
            if part in given
            else next((n for n in usual if n in names and _fits(part, features[n])), None)
            for part, usual in NAMES.items()
        }
        if found["images"] == "file_name" and found["sounds"] is not None and "images" not in given:
            found["images"] = None  # the sounds' own names
        text = None
        if question is not None:
            found["question"] = question if question in names else None
            text = None if question in names else question
            # A folder has no column but the medium; elsewhere one word is a column's name gone wrong, not a question.
            if text is not None and len(text.split()) == 1 and set(names) not in _OF_FOLDERS:
                raise ConfigError(
                    f"question is {question!r}, and {source} has no such column; {did_you_mean(question, names)}. Expected "
                    "one of them, or a text to ask"
                )
        if found["images"] is None and found["sounds"] is None:
            raise ConfigError(
                f"{source} has no column of pictures; expected image or images, or columns={{'images': ...}}; nor one of sounds: "
                f"audio, or columns={{'sounds': ...}}. It has {', '.join(names)}"
            )
        if found["question"] is None and text is None:
            raise ConfigError(
                f"{source} has no question; expected a text to ask about every picture (--question '...'), or a column of "
                f"them such as question. It has {', '.join(names)}"
            )
        return cls(text=text, **found)  # type: ignore[arg-type]


def _fits(part: str, feature: Any) -> bool:
    """Whether a column of such cells is meant without being named: a list of captions is not meant as right answers."""
    return part in ("images", "sounds") or _scalar(feature) is not (part == "accepted")


def _scalar(feature: Any) -> bool:
    """Whether cells hold one value."""
    return hasattr(feature, "dtype") and not isinstance(feature, list | dict) and feature.dtype not in ("list", "dict")


def as_text(value: Any, feature: Any, name: str) -> str | None:
    """A cell as text; a class by its name. Raises ConfigError for a list or a mapping."""
    if value is None or value != value:  # CSV's empty cells are NaN
        return None
    if isinstance(value, list | dict):
        raise ConfigError(f"column {name!r} holds {value!r:.60}; expected one text or number a question")
    if hasattr(feature, "int2str") and isinstance(value, int):
        return str(feature.int2str(value))
    return str(value)


def answers_of(value: Any) -> tuple[str, ...]:
    """The texts of a cell: one, or a list of them, bare or (as VQAv2's) in mappings with an `answer`; empty ones are none."""
    items = value if isinstance(value, list | tuple) else [value]
    items = [item["answer"] if isinstance(item, Mapping) and "answer" in item else item for item in items]
    return tuple(str(item) for item in items if isinstance(item, str | int | float) and str(item).strip())


def items_of(row: Mapping[str, Any], name: str | None, *, may_lack: bool) -> list[Any]:
    """What a row's column of media holds, none without a column; `may_lack`: an empty cell is none either, not a missing one."""
    if name is None:
        return []
    value = row[name]
    if may_lack and _is_empty(value):
        return []
    return value if isinstance(value, list) else [value]


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
        return not any(value.values())
    return value is None or value == "" or value != value  # CSV's empty cells are NaN


def picture_of(value: Any, base: Path | None) -> Image.Image:
    """The picture that a cell holds: bytes, a path (from `base`, where it is relative), or both as `datasets` keeps them.

    Raises OSError or ValueError where there is none that can be read.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        image = Image.open(io.BytesIO(value))
    elif isinstance(value, str) and value:
        if "://" in value:
            raise ValueError(f"{value} is an address; expected a file here")
        image = Image.open(Path(value) if base is None else base / value)
    else:
        raise ValueError("no picture" if not value else f"{value!r:.60} is no picture")
    with whole_pictures():
        image.load()
    return image
