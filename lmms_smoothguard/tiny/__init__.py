"""The embedded default: generated scenes, a small trained LLaVA and what stands around it, their training and their test sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_HOME = Path(__file__).parent
PLACES: Mapping[str, Path] = {
    f"tiny-{name}": _HOME / name for name in ("llava", "audio", "guard", "clip", "fare", "tecoa")
}
"""The directories of the models that ship with the package, by name."""


def place(pretrained: str) -> str:
    """What `from_pretrained` takes for a model's name: an embedded one's directory, a directory, else as it is (a hub id)."""
    if pretrained in PLACES:
        return str(PLACES[pretrained])
    path = Path(pretrained).expanduser()
    return str(path) if path.is_dir() else pretrained
