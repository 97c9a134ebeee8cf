"""Where a vision tower comes from: a hub id, a directory, a safetensors file, or the name of one that ships here."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lmms_smoothguard.errors import ConfigError

EMBEDDED_DIR = Path(__file__).parent.parent / "tiny"
EMBEDDED: Mapping[str, str] = {"tiny-fare": "fare", "tiny-tecoa": "tecoa"}
"""Towers of the embedded model that ship with the package, and their directories in `EMBEDDED_DIR`."""
CONFIG, OPEN_CLIP_CONFIG = "config.json", "open_clip_config.json"
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MODEL_TYPES = ("clip", "clip_vision_model")
EXPECTED = (
    "a hub id or directory with config.json and model.safetensors (CLIPModel, CLIPVisionModel), one with "
    "open_clip_config.json and open_clip_model.safetensors, or a .safetensors file"
)
CONVERT = (
    "convert it once, where you trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), "
    "'open_clip_model.safetensors' or 'model.safetensors'), with its config beside it"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A tower's files. name: as results have it, without a machine's path; weights: one safetensors file or all shards;
    config: config.json or open_clip_config.json as it is, None for a bare file; is_open_clip: which of the two (None: neither);
    preprocessing: the directory of a transformers image processor, None where there is none; revision: a hub's commit."""

    name: str
    weights: tuple[Path, ...]
    config: Mapping[str, Any] | None = None
    is_open_clip: bool | None = None
    preprocessing: Path | None = None
    revision: str | None = None


def find_source(source: str) -> Source:
    """Finds a tower's files; those of a hub are fetched, or taken from its cache.

    Raises ConfigError where there is nothing, or nothing in safetensors: pickled weights can run code and are not read.
    """
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f"vision_tower is {source!r}; expected {EXPECTED}")
    name = source.strip().removeprefix("hf-hub:")
    if name in EMBEDDED:
        return _embedded(name)
    path = Path(name).expanduser()
    if path.is_file():
        return _bare(path)
    if path.is_dir():
        made = path / "model"  # of a training's directory what it made
        trained = (made / CONFIG).is_file() and not (path / CONFIG).exists()
        return _found(_Directory(made if trained else path), path.resolve().name)
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in (".safetensors", *_PICKLES):
        raise ConfigError(f"vision_tower is {name!r}, which does not exist; expected {EXPECTED}")
    return _found(_Hub(name), name)


def _embedded(name: str) -> Source:
    directory = EMBEDDED_DIR / EMBEDDED[name]
    if not (directory / CONFIG).is_file():
        raise ConfigError(
            f"vision_tower is {name!r}, and this installation has no {CONFIG} in lmms_smoothguard/tiny/{EMBEDDED[name]}; expected "
            "a package that ships that tower. Install a newer one, or give the tower's directory"
        )
    return dataclasses.replace(_found(_Directory(directory), name), name=name)


def _bare(path: Path) -> Source:
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"vision_tower is {path.name!r}; expected weights in .safetensors, for a pickle can run code: {CONVERT}"
        )
    return Source(path.name, (path,))


class _Place(Protocol):
    """What files can be had from."""

    def get(self, name: str) -> Path | None: ...

    def listing(self) -> list[str]: ...


class _Directory:
    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, name: str) -> Path | None:
        path = self._root / name
        return path if path.is_file() else None

    def listing(self) -> list[str]:
        return sorted(path.name for path in self._root.iterdir())


class _Hub:
    """A repository of models on a hub; offline its cache alone."""

    def __init__(self, repository: str) -> None:
        self._repository = repository

    def get(self, name: str) -> Path | None:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self._repository, name))
        except LocalEntryNotFoundError as error:
            if constants.HF_HUB_OFFLINE:
                return None
            raise self._refusal(error) from error  # a hub that cannot be reached may have the file
        except EntryNotFoundError:
            return None
        except (HFValidationError, OSError, ValueError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ConfigError:
        said = str(error).strip().splitlines()
        return ConfigError(
            f"vision_tower is {self._repository!r}, which cannot be had from the hub: {said[0] if said else type(error).__name__}. "
            f"Expected {EXPECTED}"
        )

    def listing(self) -> list[str]:
        from huggingface_hub import constants, list_repo_files
        from huggingface_hub.errors import HTTPError

        if constants.HF_HUB_OFFLINE:
            return []
        try:
            return sorted(list_repo_files(self._repository))
        except (HTTPError, OSError, ValueError):
            return []  # only an error's text wants it


def _found(place: _Place, name: str) -> Source:
    config, open_clip = _json(place, CONFIG, name), _json(place, OPEN_CLIP_CONFIG, name)
    model_type = (config or {}).get("model_type")
    if config is not None and model_type in _MODEL_TYPES and (weights := _weights(place, name)):
        return Source(name, weights, config, False, _image_processor(place), _commit(weights[0]))
    if open_clip is not None:
        for file in _OPEN_CLIP_WEIGHTS:
            if (path := place.get(file)) is not None:
                return Source(name, (path,), open_clip, True, _image_processor(place), _commit(path))
    raise ConfigError(f"vision_tower is {name!r}: {_why_not(place, config, open_clip)}")


def _why_not(place: _Place, config: Mapping[str, Any] | None, open_clip: Mapping[str, Any] | None) -> str:
    there = place.listing()
    if pickles := [file for file in there if file.endswith(_PICKLES)]:
        return f"its weights are {', '.join(pickles)}; expected .safetensors, for a pickle can run code: {CONVERT}"
    if config is not None and open_clip is None and config.get("model_type") not in _MODEL_TYPES:
        return (
            f"its model_type is {config.get('model_type')!r}; expected {' or '.join(_MODEL_TYPES)}, that is {EXPECTED}"
        )
    if config is not None or open_clip is not None:
        return f"a config and no safetensors weights; expected {EXPECTED}. If they are pickled, {CONVERT}"
    found = f"it has {', '.join(there[:8])}" if there else f"no {CONFIG} and no {OPEN_CLIP_CONFIG} there"
    return f"{found}; expected {EXPECTED}"


def _weights(place: _Place, name: str) -> tuple[Path, ...]:
    """The weights of a transformers model, whole or in shards."""
    if (whole := place.get(_WEIGHTS)) is not None:
        return (whole,)
    index = _json(place, _INDEX, name)
    if index is None:
        return ()
    files = sorted(set(index.get("weight_map", {}).values()))
    shards = {file: place.get(file) for file in files if re.fullmatch(r"[\w.-]+\.safetensors", str(file))}
    if missing := [file for file in files if shards.get(file) is None]:
        raise ConfigError(
            f"vision_tower is {name!r}: {_INDEX} names {missing[0]!r}, which is not there; expected all shards"
        )
    return tuple(path for path in shards.values() if path is not None)


def _json(place: _Place, file: str, name: str) -> dict[str, Any] | None:
    path = place.get(file)
    if path is None:
        return None
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"vision_tower is {name!r}: {file} cannot be read ({error}); expected JSON") from error
    if not isinstance(read, dict):
        raise ConfigError(f"vision_tower is {name!r}: {file} is a {type(read).__name__}; expected a JSON object")
    return read


def _image_processor(place: _Place) -> Path | None:
    found = [path for path in map(place.get, _PREPROCESSING) if path is not None]
    return found[0].parent if found else None


def _commit(path: Path) -> str | None:
    """Of a file in a hub's cache, .../snapshots/<commit>/<file>."""
    return path.parent.name if path.parent.parent.name == "snapshots" else None
