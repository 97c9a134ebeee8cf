"""The machine and the package versions a result belongs to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "transformers", "lmms-eval", "scikit-learn", "lmms-smoothguard")


def machine() -> dict[str, str | int | float | None]:
    """Processor, its cores, and Python's version: `Record.environment`."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    return {"processor": processor, "cores": os.cpu_count(), "python": platform.python_version()}


def versions() -> dict[str, str | None]:
    """The versions of `PACKAGES`, None for one that is not installed: `Record.versions`."""
    return {name: _version(name) for name in PACKAGES}


def environment() -> dict[str, Any]:
    """Machine and versions in one."""
    return {**machine(), **versions()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None  # figures without a harness need no lmms-eval
