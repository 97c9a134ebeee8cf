"""When two answers are one, and when an answer says a text: the same everywhere a rate is counted."""

from __future__ import annotations

from lmms_smoothguard.aggregation.verdict import normalize_answer


def same_answer(answer: str, other: str) -> bool:
    """Equal but for case, white space and a closing full stop."""
    return normalize_answer(answer) == normalize_answer(other)


def says(answer: str, text: str) -> bool:
    """Whether the words of `text` stand in the answer, one after the other and whole: "I know" does not say "no".

    Case and punctuation count for nothing. A text in another script than ASCII, which may have no spaces between words, or one
    of punctuation alone, is looked for as it is.
    """
    wanted = _words(text)
    if not wanted or not wanted.isascii():
        return text.strip().casefold() in answer.casefold()
    return f" {wanted} " in f" {_words(answer)} "


def _words(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())
