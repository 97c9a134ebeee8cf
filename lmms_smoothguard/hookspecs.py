"""What a third party may add. Every hook returns `{name: "module:attribute"}`: nothing is imported until it is used.

Register a plugin under the entry-point group `lmms_smoothguard.plugins`; the built-ins come in the same way
(`lmms_smoothguard.builtin`).
"""

from __future__ import annotations

from collections.abc import Mapping

import pluggy

PROJECT = "lmms_smoothguard"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Specs:
    """The hooks."""

    @hookspec
    def smoothguard_defenses(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Instances of `lmms_smoothguard.defenses.Defense`: a config dataclass and a function `(request, config)`."""

    @hookspec
    def smoothguard_attacks(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Subclasses of `lmms_smoothguard.attacks.base.Attack`."""

    @hookspec
    def smoothguard_judges(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Factories `(argument: str) -> judge`, a judge having `judge(question: str, answer: str) -> Judgement`.

        `argument` is what follows the name and a slash, "" if nothing does. See `lmms_smoothguard.judges` for batches.
        """

    @hookspec
    def smoothguard_embedders(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Factories `(context: EmbedderContext) -> embed`, `embed(texts) -> array (len(texts), width)`."""

    @hookspec
    def smoothguard_aggregators(self) -> Mapping[str, str]:  # type: ignore[empty-body]
        """Functions `(points: Points) -> Clusters`, see `lmms_smoothguard.aggregation.clustering`."""
