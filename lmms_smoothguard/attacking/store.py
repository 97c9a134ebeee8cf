"""The directory of a run: settings, one record a sample, its images and sounds. Whole files or none, whenever the run is killed.

DIR/settings.json           what the run is; a run with other settings is refused
DIR/samples/<id>.json       everything known of a sample; written after its images and sounds, with their digests
DIR/images/<id>.png         adversarial images (`<id>+1.png`, ... where a question has several), without the ending of an id like `x.jpg`
DIR/sounds/<id>.wav         adversarial sounds, 16-bit PCM at the model's rate (likewise)
DIR/attacks.parquet, summary.json, README.md     made from the records at the end
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lmms_smoothguard.attacking.names import file_names, image_name, media_names, sound_name
from lmms_smoothguard.errors import AttackError, ConfigError
from lmms_smoothguard.sounds import Sound

log = logging.getLogger(__name__)

MADE_BY = "smoothguard attack"
FORMAT = 2
"""Of records: raise it when a record of the same settings would mean something else."""
_SETTINGS = "settings.json"


class Store:
    """made_by: the command whose directory it is. Raises ConfigError for a directory that is not ours, AttackError for one that
    cannot be written to."""

    def __init__(self, root: Path, made_by: str = MADE_BY) -> None:
        self.root, self._made_by = root, made_by
        self._names: dict[str, str] = {}
        self._media: dict[str, str] = {}
        if root.exists() and not root.is_dir():
            raise ConfigError(f"out is {root}, a file; expected a directory, or a name for a new one")
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe = root / f".{os.getpid()}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise AttackError(f"{root} cannot be written to ({error.strerror}); expected another --out") from error
        if self._settings() is None and any(not path.name.startswith(".") for path in root.iterdir()):
            raise ConfigError(
                f"out is {root}, which has files in it but no {_SETTINGS} of an earlier run; expected an empty or a new "
                "directory, so that nothing of yours is overwritten"
            )

    def open(self, settings: Mapping[str, Any], ids: Sequence[str], versions: Mapping[str, Any]) -> None:
        """Makes this the run's directory, or makes sure that it is. Raises ConfigError that names what differs."""
        self._names, self._media = file_names(ids), media_names(ids)
        known = self._settings()
        if known is None:
            whole = {"made_by": self._made_by, "format": FORMAT, "settings": settings, "versions": versions}
            self.write(_SETTINGS, json.dumps(whole, indent=1).encode())
            return
        asked = json.loads(json.dumps({"format": FORMAT, **settings}))
        if differing := list(_differences({"format": known.get("format"), **known["settings"]}, asked)):
            raise ConfigError(
                f"{self.root} holds a run with other settings: {'; '.join(differing)}. Expected the same ones to go on with it, "
                "or another --out"
            )

    def _settings(self) -> dict[str, Any] | None:
        path = self.root / _SETTINGS
        try:
            stored = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}); expected an earlier run's, or another --out"
            ) from error
        if not isinstance(stored, dict) or stored.get("made_by") != self._made_by:
            raise ConfigError(f"{path} is not of `{self._made_by}`; expected an empty or a new directory (--out)")
        return stored

    # -- samples -------------------------------------------------------------------------------------------------------

    def put_images(self, name: str, images: Sequence[np.ndarray]) -> list[dict[str, str]]:
        """Writes a sample's images and says where they are, with their digests."""
        written = []
        for slot, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            written.append(self._put(f"images/{image_name(self._media[name], slot)}", buffer.getvalue()))
        return written

    def put_sounds(self, name: str, sounds: Sequence[Sound]) -> list[dict[str, str]]:
        """Writes a sample's sounds as 16-bit PCM, and says where they are, with their digests."""
        return [
            self._put(f"sounds/{sound_name(self._media[name], slot)}", sound.wav) for slot, sound in enumerate(sounds)
        ]

    def _put(self, file: str, data: bytes) -> dict[str, str]:
        self.write(file, data)
        return {"file": file, "sha256": hashlib.sha256(data).hexdigest()}

    def images(self, record: Mapping[str, Any]) -> list[bytes]:
        """The image files of a record. Raises OSError or ValueError where they are not the ones it vouches for."""
        return [self._file(image, "image") for image in record["images"]]

    def sounds(self, record: Mapping[str, Any]) -> list[bytes]:
        """Its sound files, likewise; none of a record from before there were any."""
        return [self._file(sound, "sound") for sound in record.get("sounds", ())]

    def _file(self, listed: Mapping[str, str], kind: str) -> bytes:
        data = (self.root / listed["file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != listed["sha256"]:
            raise ValueError(f"{listed['file']} is not the {kind} that was written")
        return data

    def put(self, record: Mapping[str, Any]) -> None:
        """Writes a sample's record: from here on it is done."""
        self.write(self._record(record["id"]), json.dumps(record, indent=1).encode())

    def get(self, name: str, digest: str) -> dict[str, Any] | None:
        """A sample's record; None where it is not done yet, or damaged, which is said and mended."""
        path = self.root / self._record(name)
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            if record["id"] != name or record["digest"] != digest:
                raise ValueError("it is of another sample")
            self.images(record)
            self.sounds(record)
        except FileNotFoundError:
            if path.exists():
                log.warning("%s has lost an image or a sound and is made again", path)
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged (%s) and is made again", path, error)
            return None
        return record

    def _record(self, name: str) -> str:
        return f"samples/{self._names[name]}.json"

    def write(self, name: str, data: bytes) -> None:
        """Writes a file of the directory in one go. Raises AttackError where it cannot."""
        path = self.root / name
        scratch = path.with_name(f".{hashlib.sha256(name.encode()).hexdigest()[:16]}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_bytes(data)
            os.replace(scratch, path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise AttackError(
                f"{path} cannot be written: {error.strerror}; free space or mend its rights, and start the same command again: "
                "what is done is kept"
            ) from error

    def sweep_up(self) -> None:
        """Removes what killed processes left half written. Nobody may be writing."""
        for scratch in self.root.rglob(".*.tmp"):
            scratch.unlink(missing_ok=True)


def _differences(there: Any, asked: Any, place: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in dict.fromkeys([*there, *asked]):
            yield from _differences(there.get(key), asked.get(key), f"{place}.{key}" if place else str(key))
    elif there != asked:
        yield f"{place} is {there!r} there and {asked!r} here"
