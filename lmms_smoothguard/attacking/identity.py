"""What a run of `smoothguard attack` is: all that its samples' records hang on, so that none is taken for another's."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_smoothguard import plugins
from lmms_smoothguard.attacks.settings import AttackSettings
from lmms_smoothguard.choice import Choice
from lmms_smoothguard.evaluation.questions import Questions
from lmms_smoothguard.judges.loading import LoadedJudge

if TYPE_CHECKING:
    from lmms_smoothguard.attacking.asked import AttackRun
    from lmms_smoothguard.subject import Subject

_PACKAGES = ("lmms-smoothguard", "torch", "transformers", "torchvision", "pillow")


def described(asked: AttackRun, subject: Subject, questions: Questions, judge: LoadedJudge | None) -> dict[str, Any]:
    """All that a sample's record hangs on, ready for JSON: no more and no less, for it decides whether a run may go on.

    No machine's paths are in it: of a path it has the last part.
    """
    return {
        "model": {
            "name": _last_part(asked.model),
            "fingerprint": subject.fingerprint,
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "vision_tower": None if subject.tower is None else subject.tower.identity(),
            **subject.processing(),
        },
        "data": {
            "source": _last_part(asked.data),
            "split": questions.split,
            "count": len(questions),
            "revision": questions.revision,
        },
        "attack": asked.attack.to_dict() | _pointed_at(asked.attack),
        "targeted": asked.targeted,
        "defense": _defense(asked.defense),
        "max_new_tokens": asked.max_new_tokens,
        "match": asked.match,
        "judge": None if judge is None else _judge(judge),
        "code": _code(asked, judge),
    }


def versions() -> dict[str, str | None]:
    """Of the packages that answers may hang on; a run may go on with others, but says what it began with."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in _PACKAGES}


def _pointed_at(settings: AttackSettings) -> dict[str, Any]:
    """By the content of its files whatever a setting only points at, for an attack whose class has `content`."""
    content = getattr(plugins.load("attacks", settings.name), "content", None)
    if content is None:
        return {}
    with plugins.blame("attacks", settings.name):
        return dict(content(settings))


def _defense(choice: Choice | None) -> dict[str, Any] | None:
    if choice is None:
        return None
    fields = choice.to_dict()
    return {name: _last_part(value) if name == "embedder" else value for name, value in fields.items()}


def _judge(judge: LoadedJudge) -> dict[str, str]:
    """Its name and version; a guard's directory may be in both."""
    place = judge.name.partition("/")[2].partition("?")[0]
    short = _last_part(place) if place else place
    return {"name": judge.name.replace(place, short, 1), "version": judge.version.replace(place, short, 1)}


def _code(asked: AttackRun, judge: LoadedJudge | None) -> dict[str, str | None]:
    """Whose code is behind the names, down to its source; None for our own."""
    config = None if asked.defense is None else asked.defense.config
    names: dict[plugins.Kind, Any] = {
        "attacks": asked.attack.name,
        "defenses": None if asked.defense is None else asked.defense.name,
        "aggregators": getattr(config, "aggregator", None),
        "embedders": getattr(config, "embedder", None),
        "judges": None if judge is None else judge.name.partition("/")[0],
    }
    return {kind: plugins.provenance(kind, name) for kind, name in names.items() if name in plugins.offers(kind)}


def _last_part(place: str) -> str:
    """A hub's id as it is; of a path its last part, so that no machine's paths are in a result."""
    path = Path(place).expanduser()
    return path.resolve().name if path.exists() else place
