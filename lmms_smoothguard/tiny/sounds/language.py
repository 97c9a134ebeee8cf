"""Everything said about a recording: existence questions, captions in order of time, counts, orders and choices."""

from __future__ import annotations

from collections.abc import Sequence

from lmms_smoothguard.tiny.language import with_article
from lmms_smoothguard.tiny.sounds.clips import OBJECTS

DESCRIBE = ("Describe the recording.", "What can be heard?")
COUNT = "How many sounds are there?"
NUMBERS = ("One", "Two", "Three", "Four")


def existence_question(obj: int) -> str:
    """POPE's question about one sound."""
    return f"Is there {with_article(OBJECTS[obj])} in the recording?"


def order_question(first: int, second: int) -> str:
    """Whether one sound comes before another."""
    return f"Does {with_article(OBJECTS[first])} come before {with_article(OBJECTS[second])}?"


def caption(objects: Sequence[int]) -> str:
    """The one right sentence about a clip; sounds in order of time."""
    text = ", then ".join(with_article(OBJECTS[obj]) for obj in objects)
    return text[0].upper() + text[1:] + "."


def choice_question(captions: Sequence[str]) -> str:
    """Which of some captions is right; the answer is its number."""
    listed = "\n".join(f"{number}. {text}" for number, text in enumerate(captions, start=1))
    return f"Which of these captions fits the recording best?\n{listed}\nAnswer with its number."
