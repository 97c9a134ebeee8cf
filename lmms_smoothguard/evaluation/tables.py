"""Opens a folder of pictures or sounds, a file or a Hugging Face data set as one table, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lmms_smoothguard.errors import ConfigError, did_you_mean

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SOUNDS = (".flac", ".mp3", ".ogg", ".wav")
ATTACKS = "attacks.parquet"
"""The table that `smoothguard attack` leaves in its directory."""
_SAVED = ("state.json", "dataset_dict.json")


class Table(NamedTuple):
    """rows: a `datasets.Dataset` whose pictures and sounds stay undecoded; base: what relative paths in it start from."""

    rows: Any
    source: str
    split: str | None
    base: Path | None = None


def open_table(source: str, split: str | None) -> Table:
    """The table of a source. Raises ConfigError where there is none, or no such split."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / ATTACKS).is_file():
        path = path / ATTACKS
    if path.is_file():
        return _file(path, split)
    if path.is_dir():
        if any((path / name).is_file() for name in _SAVED):
            return _saved(path, split)
        pictures, sounds = _files_in(path, PICTURES), _files_in(path, SOUNDS)
        described = any(next(path.rglob(f"metadata{ending}"), None) for ending in FORMATS)
        if not pictures and not sounds and not any(next(path.rglob(f"*{ending}"), None) for ending in FORMATS):
            raise ConfigError(
                f"{path} has neither pictures ({', '.join(PICTURES)}) nor sounds ({', '.join(SOUNDS)}) nor tables "
                f"({', '.join(FORMATS)}) in it; expected some"
            )
        bare = (pictures or sounds) and not described
        return _folder(path, pictures, sounds, split) if bare else _loaded(source, path, split)
    return _loaded(source, None, split)


def refuse_inside(source: str, places: Mapping[str, Path]) -> None:
    """Raises ConfigError for a place, by its option, beneath a folder whose files are all read: what is written there would
    be taken for more questions the next time."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or any((folder / name).is_file() for name in (ATTACKS, *_SAVED)):
        return
    for option, place in places.items():
        if place.expanduser().resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{option} is {place}, inside the data {source}, where its files would be taken for more questions the next time; "
                "expected a directory elsewhere"
            )


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            "questions need the datasets library, which is not installed; pip install 'lmms-smoothguard[attack]'"
        ) from error
    return datasets


def _files_in(path: Path, endings: tuple[str, ...]) -> list[str]:
    inside = (file.relative_to(path) for file in path.rglob("*"))
    return sorted(
        name.as_posix()
        for name in inside
        if name.suffix.lower() in endings and not any(part.startswith(".") for part in name.parts)
    )


def _folder(path: Path, pictures: list[str], sounds: list[str], split: str | None) -> Table:
    if pictures and sounds:
        raise ConfigError(
            f"{path} has pictures and sounds in it, such as {pictures[0]} and {sounds[0]}; expected a folder of one kind, or a table "
            "that says which belong together"
        )
    if split is not None:
        raise ConfigError(
            f"split is {split!r}, and {path} is a folder of {'pictures' if pictures else 'sounds'}; expected no split"
        )
    rows = _library().Dataset.from_dict(
        {"id": pictures or sounds, "image" if pictures else "audio": pictures or sounds}
    )
    return Table(rows, str(path), None, path)


def _file(path: Path, split: str | None) -> Table:
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path} is no table; expected a file that ends with {', '.join(FORMATS)}")
    datasets = _library()
    try:
        rows = datasets.load_dataset(FORMATS[path.suffix.lower()], data_files={"file": _literal(path)}, split="file")
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {_cause(error)}; expected a whole table with rows in it") from error
    if split is not None:
        raise ConfigError(f"split is {split!r}, and {path} is one file; expected no split")
    return Table(_undecoded(rows), str(path), None, path.parent)


def _literal(path: Path) -> str:
    """A path in which nothing is a pattern: `datasets` takes brackets and stars for one."""
    import glob

    return glob.escape(str(path.resolve()))


def _saved(path: Path, split: str | None) -> Table:
    datasets = _library()
    try:
        loaded = datasets.load_from_disk(str(path))
    except (datasets.exceptions.DatasetsError, ValueError, OSError, IndexError) as error:  # IndexError: not a row in it
        raise ConfigError(f"{path} cannot be read: {_cause(error)}; expected a data set with rows in it") from error
    return _split_of(loaded, str(path), split, path)


def _loaded(source: str, path: Path | None, split: str | None) -> Table:
    """What `datasets.load_dataset` makes of a hub's id, or of a directory that is laid out like one."""
    datasets = _library()
    config, _, part = (split or "").rpartition(":")
    try:
        known = datasets.load_dataset_builder(
            source, config or None
        ).info.splits  # None where only a download would tell
        if part and known and part not in known:
            raise ConfigError(f"{source} has no split {part!r}; {did_you_mean(part, known)}")
        only = part if part and known else None
        loaded = datasets.load_dataset(source, config or None, split=only)
    except ConfigError:
        raise
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        if path is not None:
            raise ConfigError(
                f"{path} cannot be read: {_cause(error)}. Expected a folder of pictures or sounds, or a data set (--split config:split)"
            ) from error
        raise ConfigError(
            f"data is {source!r}, which is no file or directory here, and no data set that the hub gives: {_cause(error)}. "
            "Expected a folder of pictures or sounds, a parquet, json, jsonl or csv file, a data set's id (and --split config:split), or "
            "an lmms-eval task"
        ) from error
    if only:
        return Table(_undecoded(loaded), source, split, path)
    table = _split_of(loaded, source, part or None, path)
    return table._replace(split=f"{config}:{table.split}" if config else table.split)


def _split_of(loaded: Any, source: str, split: str | None, base: Path | None) -> Table:
    if not isinstance(loaded, Mapping):
        if split is not None:
            raise ConfigError(f"split is {split!r}, and {source} has none; expected no split")
        return Table(_undecoded(loaded), source, None, base)
    if split is None and len(loaded) > 1:
        raise ConfigError(f"{source} has the splits {', '.join(loaded)}; expected one of them (--split)")
    chosen = split or next(iter(loaded))
    if chosen not in loaded:
        raise ConfigError(f"{source} has no split {chosen!r}; {did_you_mean(chosen, loaded)}")
    return Table(_undecoded(loaded[chosen]), source, chosen, base)


def _undecoded(rows: Any) -> Any:
    """Columns of pictures and sounds as bytes and paths, so that a broken one is an error about its own question; and sounds are
    decoded without torchcodec."""
    datasets = _library()
    for name, feature in rows.features.items():
        for kind in (datasets.Image, datasets.Audio):
            if isinstance(feature, kind):
                rows = rows.cast_column(name, kind(decode=False))
            elif isinstance(getattr(feature, "feature", None), kind):
                rows = rows.cast_column(name, datasets.List(kind(decode=False)))
    return rows


def _cause(error: BaseException) -> str:
    inner = error.__cause__ or error
    return " ".join(f"{type(inner).__name__}: {inner}".split())[:300].rstrip(".")
