"""Answers of copies, each given once: a content-addressed cache, and what fills it.

An entry belongs to one request (model, prompt, pixels, generation settings) under one noise (sigma, space, seed) and has the
token ids of its copies by number. Copies count from 1, as the defence's do; the clean request is an entry without noise.
Another model, picture or setting is another key, so nothing of another run is ever taken for this one's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lmms_smoothguard.attacks.cache import content_key
from lmms_smoothguard.defenses.copies import Copies, answer_batch
from lmms_smoothguard.defenses.replies import Replies
from lmms_smoothguard.defenses.request import Request
from lmms_smoothguard.errors import SmoothGuardError, UndefendableError
from lmms_smoothguard.files import replace_file
from lmms_smoothguard.fingerprint import model_fingerprint
from lmms_smoothguard.inputs.carried import CLIPS
from lmms_smoothguard.inputs.fitting import all_known
from lmms_smoothguard.inputs.media import Media
from lmms_smoothguard.inputs.statistics import pixel_statistics
from lmms_smoothguard.sweeps.noises import PICTURES, UNITS, Noise

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every key: raise it when the same settings would give other answers."""

Ids = tuple[int, ...]
"""An answer's tokens, without padding and end-of-sequence."""


class AnswerCache:
    """A directory of entries. Raises SmoothGuardError at once if it cannot be written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise SmoothGuardError(
                f"the answer cache {root} cannot be written to ({error.strerror}); give another directory with --cache"
            ) from error

    def path(self, key: str) -> Path:
        """Where an entry lies."""
        return self.root / key[:2] / f"{key}.json"

    def get(self, key: str) -> dict[int, Ids]:
        """Answers by copy number; empty when there are none. A damaged entry is reported and counts as none."""
        path = self.path(key)
        try:
            stored = json.loads(path.read_bytes())
            if stored["digest"] != _digest(key, stored["answers"]):
                raise ValueError("its answers are not those that were written")
            return {int(number): tuple(map(int, ids)) for number, ids in stored["answers"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            log.warning("the cached answers %s are damaged (%s) and are given again", path, error)
            return {}

    def put(self, key: str, answers: Mapping[int, Ids]) -> None:
        """Stores an entry in one go."""
        listed = {str(number): list(answers[number]) for number in sorted(answers)}
        try:
            replace_file(self.path(key), json.dumps({"digest": _digest(key, listed), "answers": listed}).encode())
        except OSError as error:
            raise SmoothGuardError(
                f"the answer cache cannot write {self.path(key)}: {error.strerror}; free space or give another --cache"
            ) from error


def _digest(key: str, answers: Any) -> str:
    return hashlib.sha256((key + json.dumps(answers, sort_keys=True)).encode()).hexdigest()


class Answerer:
    """Answers copies of requests to one model, undefended, each once; `answered` counts those that were not cached."""

    def __init__(self, model: Any, processor: Any, cache: AnswerCache, largest: int | None = None) -> None:
        """largest: copies in one batch at most; None: all that are missing, fewer after running out of memory."""
        self._model, self._cache, self._largest = model, cache, largest
        self._tokenizer = getattr(processor, "tokenizer", None)
        self._image_processor = getattr(processor, "image_processor", processor)
        self._fingerprint = model_fingerprint(model)
        self.answered = 0

    def clean(self, arguments: Mapping[str, Any]) -> Ids:
        """The answer to the request as it is. `arguments`: keyword arguments of `generate`, one row."""
        key = self._key(arguments, None)
        known = self._cache.get(key)
        if 0 not in known:
            request = self._request(arguments)
            replies = Replies(request, 1)
            replies.add(request.generate(**arguments), 1)
            known[0] = replies.candidates(0)[0]
            self.answered += 1
            self._cache.put(key, known)
        return known[0]

    def noisy(self, arguments: Mapping[str, Any], noise: Noise, count: int) -> list[Ids]:
        """The answers of noisy copies 1 to `count`; only those that are not cached are given, in one batch.

        Raises UndefendableError for a request that the defence could not act on either.
        """
        media = _noisable(self._request(arguments), noise)
        key = self._key(arguments, noise)
        known = self._cache.get(key)
        missing = [number for number in range(1, count + 1) if number not in known]
        if missing:
            known |= self._answer(arguments, noise, media, missing)
            self.answered += len(missing)
            self._cache.put(key, known)
        return [known[number] for number in range(1, count + 1)]

    def texts(self, answers: Sequence[Ids]) -> list[str]:
        """What a vote compares: the answers decoded, or as token ids where the tokenizer does not know them all."""
        if self._tokenizer is None or not all_known(self._tokenizer, answers):
            return [" ".join(map(str, answer)) for answer in answers]
        return list(self._tokenizer.batch_decode([list(a) for a in answers], skip_special_tokens=True))

    def _answer(
        self, arguments: Mapping[str, Any], noise: Noise, media: Media, numbers: Sequence[int]
    ) -> dict[int, Ids]:
        request = self._request(arguments)
        request.check_supported()
        copies, replies = Copies(request, noise.config, media), Replies(request, 1)
        size = self._largest or len(numbers)
        while left := numbers[replies.copies :]:
            if not answer_batch(request, replies, copies, left[:size]):
                self._largest = size = min(size, len(left)) // 2  # what does not fit now will not fit later
        return dict(zip(numbers, replies.candidates(0), strict=True))

    def _request(self, arguments: Mapping[str, Any]) -> Request:
        plain = functools.partial(self._model.generate, smoothguard=False)
        return Request(self._model, plain, arguments, self._tokenizer, self._image_processor)

    def _key(self, arguments: Mapping[str, Any], noise: Noise | None) -> str:
        tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        return content_key(
            format=FORMAT,
            kind="answers of copies",
            model=self._fingerprint,
            settings={k: repr(v) for k, v in arguments.items() if k not in tensors and k != CLIPS},
            noise=None if noise is None else {**noise._asdict(), "statistics": self._statistics(noise)},
            **{f"input {name}": _array(tensor) for name, tensor in tensors.items()},
        )

    def _statistics(self, noise: Noise) -> list[list[float]] | None:
        """The mean and std that give pixel noise its scale."""
        if noise.space != "pixel":
            return None
        mean, std, _ = self._pixel_statistics
        return [mean.tolist(), std.tolist()]

    @functools.cached_property
    def _pixel_statistics(self) -> Any:
        return pixel_statistics(self._model, self._image_processor)


def _noisable(request: Request, noise: Noise) -> Media:
    """The request's media. Raises UndefendableError where such noise has no place, or only on some of them."""
    media = request.media()
    if media is None or (media.images if noise.space in PICTURES else media.sounds) is None:
        what = "image" if noise.space in PICTURES else "sound"
        raise UndefendableError(f"the request has no {what}; a sweep over noise in {UNITS[noise.space]} needs one")
    if None not in media:
        raise UndefendableError("the request has pictures and sounds; expected one of them, whose noise a sweep varies")

    return media


def _array(tensor: torch.Tensor) -> Any:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
