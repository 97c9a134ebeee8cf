"""Files that an attack's options name: where they are looked for, and pictures among them."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lmms_smoothguard.errors import AttackError
from lmms_smoothguard.files import whole_pictures


def find_file(path: str, option: str) -> Path:
    """A path relative to the current directory, or else to the installed tasks. Raises AttackError."""
    spec = importlib.util.find_spec("lmms_smoothguard.tasks")
    installed = spec.submodule_search_locations if spec is not None else None
    roots = [Path(), *map(Path, installed or ())]
    for root in roots:
        if (file := root / Path(path).expanduser()).is_file():
            return file
    raise AttackError(
        f"attack {option} is {path!r}, and there is no such file in {' or '.join(str(root.resolve()) for root in roots)}; "
        "expected a path relative to the current directory or to the installed tasks, or an absolute one"
    )


def load_picture(path: str, option: str) -> np.ndarray:
    """(height, width, 3) uint8 of the file that `find_file` finds. Raises AttackError for what is no picture."""
    file = find_file(path, option)
    return _read(file, option, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _read(file: Path, option: str, _changed: int) -> np.ndarray:
    try:
        with whole_pictures(), Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise AttackError(
            f"attack {option} is {str(file)!r}, which is no picture ({type(error).__name__}: {error}); expected a file that "
            "PIL opens, such as PNG or JPEG"
        ) from error
