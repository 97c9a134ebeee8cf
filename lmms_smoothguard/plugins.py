"""Finds plugins. One that is broken is a warning that names its distribution, never a crash.

pluggy's own entry-point loader stops at the first broken plugin and drops the second of two equal names in silence,
so the entry points are loaded one by one here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pluggy

from lmms_smoothguard import builtin
from lmms_smoothguard.errors import ConfigError, did_you_mean
from lmms_smoothguard.hookspecs import PROJECT, Specs

log = logging.getLogger(__name__)

GROUP = f"{PROJECT}.plugins"
Kind = Literal["defenses", "attacks", "judges", "embedders", "aggregators"]


class Offer(NamedTuple):
    """Where a name leads ("module:attribute") and who offers it."""

    target: str
    owner: str


def build_manager(entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> pluggy.PluginManager:
    """A manager with the built-ins and every plugin that could be loaded, in the order they were found."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Specs)
    manager.register(builtin, PROJECT)
    found = importlib.metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    for entry in found:
        owner = entry.dist.name if entry.dist is not None else entry.name
        name = f"{owner}:{entry.name}"
        if manager.has_plugin(name):
            log.warning("plugin %r of %s is registered twice; the first is kept", entry.name, owner)
            continue
        try:
            manager.register(entry.load(), name)
            manager.check_pending()
        except Exception as error:  # noqa: BLE001 - a plugin is somebody else's code and may raise anything
            if manager.has_plugin(name):
                manager.unregister(name=name)
            log.warning("plugin %r of %s is left out: %s: %s", entry.name, owner, type(error).__name__, error)
    return manager


@functools.cache
def _manager() -> pluggy.PluginManager:
    return build_manager()


def offers(kind: Kind, manager: pluggy.PluginManager | None = None) -> dict[str, Offer]:
    """Everything of one kind by name; of two equal names the first registered wins, with a warning.

    Without a `manager`: what is installed, found once a process.
    """
    return _collect(kind, manager) if manager is not None else dict(_installed(kind))


@functools.cache
def _installed(kind: Kind) -> dict[str, Offer]:
    return _collect(kind, _manager())


def _collect(kind: Kind, manager: pluggy.PluginManager) -> dict[str, Offer]:
    found: dict[str, Offer] = {}
    for implementation in getattr(manager.hook, f"smoothguard_{kind}").get_hookimpls():
        owner = implementation.plugin_name
        try:
            items = {str(name): str(target) for name, target in implementation.function().items()}
        except Exception as error:  # noqa: BLE001
            log.warning("plugin %s offers no %s: %s: %s", owner, kind, type(error).__name__, error)
            continue
        for name, target in items.items():
            if name in found:
                log.warning("%s %r of %s is left out: %s has that name", kind[:-1], name, owner, found[name].owner)
            else:
                found[name] = Offer(target, owner)
    return found


def load(kind: Kind, name: str, manager: pluggy.PluginManager | None = None) -> Any:
    """The object behind a name. Raises ConfigError for an unknown name or one whose owner cannot be imported."""
    known = offers(kind, manager)
    if name not in known:
        raise ConfigError(f"unknown {SINGULAR[kind]} {name!r}; {did_you_mean(name, known)}")
    module, _, attribute = known[name].target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(
            f"{SINGULAR[kind]} {name!r} of {known[name].owner} cannot be loaded from {known[name].target}: "
            f"{type(error).__name__}: {error}"
        ) from error


def provenance(kind: Kind, name: str) -> str | None:
    """Whose code is behind a name, down to its source; None for the built-ins, whose changes we account for ourselves."""
    offer = offers(kind)[name]
    if offer.owner == PROJECT:
        return None
    module = importlib.import_module(offer.target.partition(":")[0])
    source = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
    return f"{offer.owner} {offer.target} {digest}"


@contextlib.contextmanager
def blame(kind: Kind, name: str) -> Iterator[None]:
    """Notes on whatever is raised inside whose code it was, where that is not ours."""
    try:
        yield
    except Exception as error:
        owner = offers(kind)[name].owner if name in offers(kind) else PROJECT
        if owner != PROJECT:
            error.add_note(f"raised by {SINGULAR[kind]} {name!r} of {owner}")
        raise


SINGULAR = {
    "defenses": "defence",
    "attacks": "attack",
    "judges": "judge",
    "embedders": "embedder",
    "aggregators": "aggregator",
}
