"""Questions about pictures and sounds from anywhere: a folder, a parquet / JSON / CSV file, a Hugging Face data set.

    questions = load_questions("pictures/", question="What is shown?")
    questions = load_questions("clips/", question="What do you hear?")
    questions = load_questions("lmms-lab/POPE", split="Full:adversarial", limit=100)

Everything is read and checked once, before anything is asked; a picture or a sound is decoded again whenever its question is
taken out, so that a large set does not have to fit into memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

from PIL import Image

from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.columns import Columns, answers_of, as_text, items_of, picture_of
from lmms_smoothguard.evaluation.media import checked, some
from lmms_smoothguard.evaluation.tables import open_table
from lmms_smoothguard.sounds import Sound, sound_of


@dataclass(frozen=True)
class Question:
    """images: RGB, in the order of the prompt; sounds: likewise, at the rates of their files, one channel each; either may be
    empty, not both; label: the right answer; target: what an attack wants said; group: what it shares with questions that
    depend on it, such as its picture's scene; accepted: where several answers are right all of them, the label being the most
    frequent one."""

    id: str
    images: tuple[Image.Image, ...]
    text: str
    label: str | None = None
    target: str | None = None
    group: str | None = None
    accepted: tuple[str, ...] = ()
    sounds: tuple[Sound, ...] = ()

    @property
    def right(self) -> tuple[str, ...]:
        """Every right answer; none where that is not known."""
        return self.accepted or (() if self.label is None else (self.label,))


class Words(NamedTuple):
    """A question without its pictures and sounds."""

    id: str
    text: str
    label: str | None = None
    target: str | None = None
    group: str | None = None
    accepted: tuple[str, ...] = ()


class Questions(Sequence[Question]):
    """Checked questions, in order.

    source, split: what was loaded; digests: one a question, of its words, pixels and samples; revision: of all of them together, in
    order; max_new_tokens: how long an answer may be, where the source says so.
    """

    def __init__(
        self,
        words: Iterable[Words],
        pictures: Callable[[int], Sequence[Any]],
        *,
        sounds: Callable[[int], Sequence[Sound]] | None = None,
        source: str,
        split: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        """pictures: the pictures of the n-th question, PIL images or what raises OSError or ValueError when it is read; sounds: its
        sounds likewise, None where no question has any.

        Raises ConfigError for no questions, empty ones, missing or duplicate ids, and pictures and sounds that are missing or
        cannot be read. Warns of sounds that look clipped.
        """
        self.source, self.split, self.max_new_tokens = source, split, max_new_tokens
        self._words, self._pictures, self._clips = tuple(words), pictures, sounds
        self._check_words()
        self.digests, self._heard = checked(self._words, self._images, None if sounds is None else self._sounds, source)
        self.revision = hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._words)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        words = self._words[number]
        return Question(words.id, self._images(number), *words[1:], sounds=self._sounds(number))

    def __iter__(self) -> Iterator[Question]:
        return (self[number] for number in range(len(self)))

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all questions."""
        return tuple(words.id for words in self._words)

    @property
    def words(self) -> tuple[Words, ...]:
        """All questions without their pictures and sounds."""
        return self._words

    @property
    def heard(self) -> bool:
        """Whether there are sounds in any of them."""
        return bool(self._heard)

    def refuse_sounds(self, command: str) -> None:
        """Raises ConfigError where questions have sounds, for a command that is made for pictures."""
        if self._heard:
            raise ConfigError(
                f"{self.source} has questions about sounds: {some(self._heard)}; expected pictures alone, for {command} is made for "
                "them. `smoothguard attack` takes sounds"
            )

    def _images(self, number: int) -> tuple[Image.Image, ...]:
        return tuple(_rgb(image) for image in self._pictures(number))

    def _sounds(self, number: int) -> tuple[Sound, ...]:
        return () if self._clips is None else tuple(self._clips(number))

    def _check_words(self) -> None:
        if not self._words:
            raise ConfigError(f"{self.source} has no questions{_of(self.split)}; expected at least one")
        bare = [f"row {number}" for number, words in enumerate(self._words) if not words.id.strip()]
        if bare:
            raise ConfigError(
                f"{self.source} has no id in {some(bare)}; expected one in each. Mend them, or name another id column, or none "
                "for row numbers (--column id=none)"
            )
        twice = sorted(name for name, count in Counter(self.ids).items() if count > 1)
        if twice:
            raise ConfigError(
                f"{self.source} has duplicate ids: {some(twice)}; expected each once. Name another id column, or none for "
                "row numbers (--column id=none)"
            )
        empty = [words.id for words in self._words if not words.text.strip()]
        if empty:
            raise ConfigError(f"{self.source} has empty questions: {some(empty)}; expected a text to ask for each")


def load_questions(
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    question: str | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> Questions:
    """Questions from a folder of pictures or sounds, a parquet / JSON / CSV file, or a Hugging Face data set (id or directory).

    split: "test", or "config:test" for a data set of several configs; limit: the first so many; question: the text asked
    about every picture or sound, or the column that has the questions; columns: names of columns for `id`, `images`, `sounds`,
    `question`, `label`, `target`, `group` and `accepted`, None for none; without a name sensible ones are found. A folder's ids
    are the paths within it. Sounds of several channels are mixed down, to the mean of them. Raises ConfigError for whatever
    cannot be meant or read; nothing is left out in silence.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"limit is {limit!r}; expected a whole number of at least 1")
    if question is not None and not question.strip():
        raise ConfigError(f"question is {question!r}; expected a text to ask, or a column's name")
    table = open_table(str(source), split)
    chosen = Columns.find(table.rows.column_names, table.rows.features, question, columns or {}, table.source)
    rows = table.rows.select(range(min(limit or len(table.rows), len(table.rows))))
    bare = rows.remove_columns(chosen.media)  # reading words must not read pictures

    def words(number: int, row: Mapping[str, Any]) -> Words:
        def field(name: str | None) -> str | None:
            return None if name is None else as_text(row[name], rows.features[name], name)

        cell = None if chosen.label is None else row[chosen.label]
        several = isinstance(cell, list)
        label, accepted = labelled(answers_of(cell)) if several else (field(chosen.label) or None, ())
        if chosen.accepted is not None:
            label, accepted = labelled(answers_of(row[chosen.accepted]), label)
        target, group = (field(name) or None for name in (chosen.target, chosen.group))
        name = str(number) if chosen.id is None else field(chosen.id)
        text = chosen.text if chosen.question is None else field(chosen.question)
        return Words(name or "", text or "", label, target, group, accepted)

    media, mixed = rows.select_columns(chosen.media), len(chosen.media) > 1

    def images(number: int) -> list[Any]:
        return [picture_of(item, table.base) for item in items_of(media[number], chosen.images, may_lack=mixed)]

    def sounds(number: int) -> list[Sound]:
        return [sound_of(item, table.base) for item in items_of(media[number], chosen.sounds, may_lack=mixed)]

    asked = [words(number, row) for number, row in enumerate(bare)] if bare.column_names else _alone(len(rows), words)
    heard = None if chosen.sounds is None else sounds
    return Questions(asked, images, sounds=heard, source=table.source, split=table.split)


def labelled(answers: Sequence[str], label: str | None = None) -> tuple[str | None, tuple[str, ...]]:
    """The label of a question with these right answers, the most frequent one where none is given, and all of them; without
    the second where there is only one."""
    if label is None and answers:
        label = Counter(answers).most_common(1)[0][0]
    every = tuple(dict.fromkeys([*answers, *([] if label is None else [label])]))
    return label, every if len(every) > 1 else ()


def _alone(count: int, words: Callable[[int, Mapping[str, Any]], Words]) -> list[Words]:
    return [words(number, {}) for number in range(count)]


def _rgb(image: Image.Image) -> Image.Image:
    """As every processor will see it: upright, three channels of 8 bits."""
    from PIL import ImageOps

    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}, more than 8 bits a channel")
    return ImageOps.exif_transpose(image).convert("RGB")


def _of(split: str | None) -> str:
    return "" if split is None else f" in split {split!r}"
