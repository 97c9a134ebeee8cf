"""The library behind purifiers, which is an extra."""

from __future__ import annotations

import importlib
from typing import Any

from lmms_smoothguard.errors import ConfigError


def diffusers(wanted_for: str) -> Any:
    """The package diffusers. Raises ConfigError with the install command where it is missing."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise ConfigError(f"{wanted_for} needs diffusers ({error}); pip install 'lmms-smoothguard[booster]'") from error
