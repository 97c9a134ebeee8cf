"""A content-addressed cache of adversarial images and sounds: 8-bit PNG or 16-bit WAV files, and one JSON record a request.

The record is written last and names the digest of every file, each file replacing its predecessor atomically: a run
killed at any moment leaves whole entries and nothing else. A damaged entry is reported and made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.files import replace_file
from lmms_smoothguard.sounds import Sound, read_clip

log = logging.getLogger(__name__)

FORMAT = 4
"""Part of every key: raise it when an entry of the same settings would mean something else."""


def default_cache_dir() -> Path:
    """$SMOOTHGUARD_CACHE, else ~/.cache/lmms_smoothguard."""
    return Path(os.environ.get("SMOOTHGUARD_CACHE") or Path.home() / ".cache" / "lmms_smoothguard")


class Entry(NamedTuple):
    """`images`: uint8 arrays (height, width, 3), one an image slot; `record`: everything known of how they were made;
    `key`: what they are stored under; `sounds`: 16-bit ones, one a sound slot (then there are no images)."""

    images: tuple[np.ndarray, ...]
    record: dict[str, Any]
    key: str
    sounds: tuple[Sound, ...] = ()


def content_key(**parts: Any) -> str:
    """A digest of JSON-able parts and arrays; the order of the names does not matter."""
    hasher = hashlib.sha256()
    for name in sorted(parts):
        hasher.update(f"{name}:".encode())
        for value in parts[name] if isinstance(parts[name], tuple) else (parts[name],):
            if isinstance(value, np.ndarray):
                hasher.update(repr((value.shape, value.dtype.str)).encode())
                hasher.update(np.ascontiguousarray(value).tobytes())
            else:
                hasher.update(json.dumps(value, sort_keys=True).encode())
    return hasher.hexdigest()


class AttackCache:
    """A directory of entries. Raises AttackError at once if it cannot be written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise AttackError(
                f"the attack cache {root} cannot be written to ({error.strerror}); "
                "give another directory with attack_cache=... or SMOOTHGUARD_CACHE"
            ) from error

    def _record(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.json"

    def _file(self, key: str, slot: int, kind: str) -> Path:
        return self.root / key[:2] / f"{key}-{slot}.{kind}"

    def _whole(self, key: str, slot: int, kind: str, digest: str) -> bytes:
        """A file's bytes. Raises ValueError where they are not those that were written."""
        path = self._file(key, slot, kind)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{path.name} is not the {'image' if kind == 'png' else 'sound'} that was written")
        return data

    def get(self, key: str) -> Entry | None:
        """The entry, or None when there is none or it is damaged."""
        path = self._record(key)
        try:
            record = json.loads(path.read_bytes())
            images = [
                np.asarray(Image.open(io.BytesIO(self._whole(key, slot, "png", digest))).convert("RGB"))
                for slot, digest in enumerate(record["images"])
            ]
            sounds = [
                read_clip(self._whole(key, slot, "wav", digest)).mono()
                for slot, digest in enumerate(record.get("sounds", ()))
            ]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("the cached attack %s is damaged (%s) and is made again", path, error)
            return None
        return Entry(tuple(images), record, key, tuple(sounds))

    def put(
        self, key: str, images: Sequence[np.ndarray], record: dict[str, Any], sounds: Sequence[Sound] = ()
    ) -> Entry:
        """Stores an entry: images or 16-bit sounds first, the record that vouches for them last."""
        pictures = []
        for image in images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            pictures.append(buffer.getvalue())
        full = {**record, "images": self._put_files(key, "png", pictures)}
        if sounds:
            full["sounds"] = self._put_files(key, "wav", [sound.wav for sound in sounds])
        _replace(self._record(key), json.dumps(full, indent=1).encode())
        return Entry(tuple(images), full, key, tuple(sounds))

    def _put_files(self, key: str, kind: str, files: Sequence[bytes]) -> list[str]:
        """Their digests."""
        for slot, data in enumerate(files):
            _replace(self._file(key, slot, kind), data)
        return [hashlib.sha256(data).hexdigest() for data in files]

    def get_answer(self, key: str) -> str | None:
        """An answer stored with `put_answer`."""
        try:
            return str(json.loads(self._record(key).read_bytes())["answer"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put_answer(self, key: str, answer: str) -> None:
        """Stores the undefended model's answer to a clean request: every defence's ASR starts from it."""
        _replace(self._record(key), json.dumps({"answer": answer}).encode())


def _replace(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data)
    except OSError as error:
        raise AttackError(
            f"the attack cache cannot write {path}: {error.strerror}; free space or give attack_cache=..."
        ) from error
