"""The entry point of group `lmms_eval.models`.

It runs whenever lmms-eval's model list is imported, so it stays free of torch; and one exception here would drop every
plugin that comes after, so it raises none.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from lmms_smoothguard.harness.lmms_eval import discovery
from lmms_smoothguard.harness.lmms_eval.bases import ALIASES, BASES, BLACK_BOXES, PREFIX

log = logging.getLogger(__name__)

_WRAPPERS = "lmms_smoothguard.harness.lmms_eval.wrappers"


def manifests() -> list[Any]:
    """A manifest for every base that this lmms-eval has; makes our tasks findable on the way."""
    try:
        discovery.install()
        return _manifests()
    except Exception as error:  # noqa: BLE001
        log.warning("lmms-smoothguard could not register with lmms-eval: %s: %s", type(error).__name__, error)
        return []


def _manifests() -> list[Any]:
    from lmms_eval.models.registry_v2 import ModelManifest

    tables = sys.modules["lmms_eval.models"]  # still being imported, but its tables stand
    simple, chat = tables.AVAILABLE_SIMPLE_MODELS, tables.AVAILABLE_CHAT_TEMPLATE_MODELS
    found = []
    for base in (*BASES, *BLACK_BOXES):
        paths = {}
        if base in simple:
            paths["simple_class_path"] = f"{_WRAPPERS}.simple__{base}"
        if base in chat:
            paths["chat_class_path"] = f"{_WRAPPERS}.chat__{base}"
        if not paths:
            continue
        manifest = ModelManifest(model_id=PREFIX + base, aliases=ALIASES.get(base, ()), **paths)
        found.append(manifest)
        for name in (manifest.model_id, *manifest.aliases):  # `lmms-eval models` reads these tables alone
            for table, key in ((simple, "simple_class_path"), (chat, "chat_class_path")):
                if key in paths:
                    table.setdefault(name, paths[key])
    return found
