"""What the page shows of one attacked sample: clean, adversarial, their difference magnified, and a noisy copy."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lmms_smoothguard.attacks.cache import AttackCache, Entry
from lmms_smoothguard.config import SmoothGuardConfig
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.runs import Sample
from lmms_smoothguard.report.documents import document_of

Kind = Literal["clean", "adversarial", "difference", "noisy"]


class Exhibit(NamedTuple):
    """picture: uint8 (height, width, 3); clip: a WAV file's bytes, of what is heard rather than seen."""

    picture: np.ndarray
    clip: bytes | None = None


@dataclass(frozen=True)
class Exhibits:
    """One of each kind. The difference is adversarial minus clean, `magnified` times; the noisy one is noisy copy 1 of the
    adversarial input as the model was given it, but for its rounding to what a file holds. change: in words, how large."""

    by_kind: Mapping[Kind, Exhibit]
    magnified: int
    change: str


class Gallery(ABC):
    """Makes the exhibits of a run's samples from its attack cache; nothing is crafted or answered again."""

    medium: str
    """What the messages call it."""

    def __init__(self, cache: Path, task: str, model: Path, config: SmoothGuardConfig) -> None:
        """`config`: the defence that the run used; `model`: the directory of the model that it defended."""
        self._cache, self._task, self._model, self._config = AttackCache(cache), task, model, config

    @abstractmethod
    def of(self, sample: Sample) -> Exhibits:
        """Raises SmoothGuardError when the log names nothing adversarial, or the cache no longer has it."""

    @functools.cached_property
    def processor(self) -> Any:
        """The model's own."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self._model)

    @functools.cached_property
    def model_config(self) -> Any:
        """The model's own."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self._model)

    def document(self, sample: Sample) -> Mapping[str, Any]:
        """What the sample was asked about, with its picture or clip."""
        return document_of(self._task, sample, with_media=True)

    def entry(self, sample: Sample) -> Entry:
        """What the attack made for the sample."""
        where = f"{self._task}[{sample.question_id}]"
        key = sample.info.get("attack_key")
        if not key:
            raise SmoothGuardError(f"the log of {where} has no attack_key; it is of an older version, so run it again")
        entry = self._cache.get(key)
        if entry is None:
            raise SmoothGuardError(
                f"the adversarial {self.medium} of {where} is not in {self._cache.root} (entry {key}); run the demo again, which "
                "crafts what is missing"
            )
        return entry

    def check(self, sample: Sample, largest: float) -> None:
        """Raises SmoothGuardError where the largest change, on a scale of 1, is not what the log says."""
        if abs(largest - sample.info["attack_linf"]) > 1e-5:
            raise SmoothGuardError(
                f"the adversarial {self.medium} of {self._task}[{sample.question_id}] is {largest:.5f} from the clean one, but its "
                f"log says {sample.info['attack_linf']:.5f}; expected the {self.medium} of that very run, so run it again"
            )
