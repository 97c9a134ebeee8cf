"""Whether what a sweep varies is of the media that its questions have."""

from __future__ import annotations

from lmms_smoothguard.attacks import media
from lmms_smoothguard.errors import ConfigError
from lmms_smoothguard.evaluation.questions import Questions
from lmms_smoothguard.sweeps.grid import Grid
from lmms_smoothguard.sweeps.noises import PICTURES, SOUNDS

_BUDGETS = {
    media.PICTURES: "--eps 4/255",
    media.SOUNDS: "--eps 0.001 (amplitude, full scale 1) or --eps 40dB (below each sound)",
}
_SPACES = {media.PICTURES: PICTURES, media.SOUNDS: SOUNDS}
_EXPECTED = {
    media.PICTURES: "--noise-space pixel or normalized",
    media.SOUNDS: "--noise-space amplitude (full scale 1) or snr (dB)",
}


def check_media(grid: Grid, questions: Questions) -> None:
    """Raises ConfigError for noise and budgets that say nothing about the pictures or sounds of a question, in the words of the
    command line: no model has to be loaded for that."""
    attacks = [condition.attack for condition in grid.conditions if condition.attack is not None]
    spaces = dict.fromkeys(space for space, _ in grid.noises())
    if not attacks and not spaces:
        return
    # Without sounds all questions are alike, and reading their pictures would tell nothing.
    for question in questions if questions.heard else questions[:1]:
        if question.images and question.sounds:
            raise ConfigError(
                f"question {question.id!r} has pictures and sounds; expected one of them, whose noise a sweep varies. Leave one out, "
                "such as with --column images=none"
            )
        medium = media.SOUNDS if question.sounds else media.PICTURES
        for space in spaces:
            if space not in _SPACES[medium]:
                raise ConfigError(
                    f"--noise-space is {space}, and question {question.id!r} has {medium.name}; expected {_EXPECTED[medium]}"
                )
        for attack in attacks:
            attack.check_medium(medium, _BUDGETS)
