"""A published robust vision tower in the place of a LLaVA's own: `load_vision_tower`."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from lmms_smoothguard.encoders.architecture import (
    OPTIONAL,
    Facts,
    check_architecture,
    check_tensors,
    model_facts,
    said_facts,
    shown_facts,
)
from lmms_smoothguard.encoders.installing import cast, find_clip_tower, install, see
from lmms_smoothguard.encoders.naming import canonical, read_checkpoint
from lmms_smoothguard.encoders.preprocessing import (
    Preprocessing,
    check_preprocessing,
    processor_preprocessing,
    source_preprocessing,
)
from lmms_smoothguard.encoders.sources import Source, find_source
from lmms_smoothguard.errors import ConfigError, did_you_mean
from lmms_smoothguard.evaluation.samples import sha256_of

log = logging.getLogger(__name__)
RESOLUTIONS = ("model", "source")


@dataclasses.dataclass(frozen=True)
class TowerProvenance:
    """Which tower a model sees with.

    source: a hub's id, a name of ours, or the last part of a path; format: whose names the file has, "transformers" or
    "open_clip"; sha256: of the weights file (of several shards: of their digests in order); revision: a hub's commit. left_out: tensors of the file that
    are no part of a LLaVA's tower, counted; kept: tensors of the model's own that the file has not; image_size: (height, width) that the model now
    sees where that was changed, else None; warnings: what could not be checked.
    """

    source: str
    format: str
    sha256: str
    revision: str | None = None
    left_out: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    def identity(self) -> dict[str, Any]:
        """What two runs with the same tower have in common."""
        plain = self.to_dict()
        return {name: plain[name] for name in ("source", "format", "sha256", "image_size")}


def load_vision_tower(model: Any, source: str, processor: Any = None, resolution: str = "model") -> TowerProvenance:
    """Replaces the weights of a LLaVA-type model's CLIP vision tower (LLaVA, LLaVA-NeXT, ...) by those of another tower.

    source: a hub id or directory of a CLIPModel, a CLIPVisionModel or an open_clip checkpoint; a safetensors file with the names
    of either; `tiny-fare`, `tiny-tecoa`. processor: the model's, to hold its preprocessing against the source's (None: a
    warning). resolution: "model" refuses a tower of another image size; "source" gives a LLaVA and its processor the tower's size, the way
    FARE and TeCoA of 224 pixels were published in LLaVA-1.5 of 336 (arXiv 2402.12336, section 4).

    Weights take the model's dtype and device. Raises ConfigError, and leaves model and processor as they were, for whatever
    does not fit: architecture, activation, tensors, preprocessing, values that are not finite, a model without such a tower.
    """
    _check_resolution(resolution)
    tower = find_clip_tower(model)
    found = find_source(source)
    own = {short: tower.state_dict()[name] for short, name in canonical(dict(tower.named_parameters())).items()}
    checkpoint = read_checkpoint(found.weights, found.name)
    said, shown, facts = said_facts(found), shown_facts(checkpoint.tensors), model_facts(tower.config)
    size = _new_size(model, found, said, shown, facts, processor) if resolution == "source" else None
    if size is not None:
        facts |= {"image_size": size, "patches": shown["patches"]}
    check_architecture(found, said, shown, facts)
    check_tensors(found, checkpoint.tensors, own, resized=size is not None)
    warnings = _unsaid(found, said) + _checked_preprocessing(found, processor, size)
    provenance = TowerProvenance(
        source=found.name,
        format="open_clip" if checkpoint.is_open_clip else "transformers",
        sha256=_digest(found),
        revision=found.revision,
        left_out=_counted(checkpoint.left_out),
        kept=tuple(sorted(OPTIONAL - set(checkpoint.tensors))),
        image_size=size,
        warnings=warnings,
    )
    install(tower, cast(checkpoint.tensors, own, found.name))
    if size is not None:
        see(model, tower, processor, size)
    for sentence in warnings:
        log.warning("%s", sentence)
    log.info("the vision tower is %s (%s, sha256 %s)", found.name, provenance.format, provenance.sha256[:16])
    return provenance


def check_tower(source: str | None, resolution: str = "model") -> None:
    """Raises ConfigError for a source (None: the model's own tower) that is not there, or a resolution that is none: before a
    model is loaded."""
    _check_resolution(resolution)
    if source is not None:
        find_source(source)
    elif resolution != "model":
        raise ConfigError(
            f"vision_tower_resolution is {resolution!r}, and there is no vision_tower; expected one, such as tiny-fare"
        )


def _check_resolution(resolution: str) -> None:
    if resolution not in RESOLUTIONS:
        raise ConfigError(f"vision_tower_resolution is {resolution!r}; {did_you_mean(str(resolution), RESOLUTIONS)}")


def _new_size(
    model: Any, source: Source, said: Facts, shown: Facts, own: Facts, processor: Any
) -> tuple[int, int] | None:
    """The (height, width) a LLaVA is to see from now on; None where that is its own already."""
    patches: tuple[int, int] = shown["patches"] if "patches" in shown else own["patches"]
    said_size: tuple[int, int] | None = said.get("image_size")
    if patches == own["patches"] and said_size in (None, own["image_size"]):
        return None
    kind = getattr(model.config, "model_type", "?")
    image_processor = getattr(processor, "image_processor", processor)
    if kind != "llava" or image_processor is None or not hasattr(image_processor, "crop_size"):
        what = "no image processor with a crop_size" if kind == "llava" else f"a {kind}"
        raise ConfigError(
            f"vision_tower_resolution is 'source' for a tower of {patches[0]} x {patches[1]} patches, and there is {what}; "
            "expected a LLaVA and its processor: tiles of other models are cut to the tower's own size"
        )
    rows, columns = own["patch_size"]
    size = said_size or (patches[0] * rows, patches[1] * columns)
    if size[0] != size[1] or (size[0] // rows, size[1] // columns) != patches:
        raise ConfigError(
            f"the vision tower {source.name!r} is for pictures of {size[0]} x {size[1]} by its config, and has {patches[0]} x "
            f"{patches[1]} patches of {rows} x {columns}; expected squares that agree"
        )
    return size


def _unsaid(source: Source, said: Facts) -> tuple[str, ...]:
    if {"num_attention_heads", "hidden_act"} <= set(said):
        return ()
    return (
        f"the file of the vision tower {source.name!r} does not say how many heads and which activation it has (OpenAI's weights "
        "need quick_gelu), so the model's are taken; give its directory, with the config, to have them checked",
    )


def _checked_preprocessing(source: Source, processor: Any, size: tuple[int, int] | None) -> tuple[str, ...]:
    """Warnings. Raises ConfigError where the two do not agree; `size` is what the model is to see from now on."""
    if (theirs := source_preprocessing(source)) is None:
        return (
            f"the vision tower {source.name!r} says nothing of its preprocessing, so it could not be held against the model's "
            "image processor; expected the same size, mean and std",
        )
    image_processor = getattr(processor, "image_processor", processor)
    if image_processor is None:
        return (f"there is no processor to hold the preprocessing of the vision tower {source.name!r} against",)
    ours: Preprocessing = processor_preprocessing(image_processor, "the model")
    if size is not None:
        resized = size[:1] if ours.resize == "shortest" else size
        ours = dataclasses.replace(ours, size=size, resize_to=None if ours.resize_to is None else resized)
    check_preprocessing(source.name, theirs, ours)
    return ()


def _digest(source: Source) -> str:
    digests = [sha256_of(path) for path in source.weights]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _counted(names: Iterable[str]) -> tuple[str, ...]:
    """`text_model.* (37 tensors)` for many with the same beginning, single ones as they are."""
    groups = Counter(re.split(r"\.", name, maxsplit=1)[0] for name in names)
    singles = {name.split(".")[0]: name for name in names}
    return tuple(
        singles[group] if count == 1 else f"{group}.* ({count} tensors)" for group, count in sorted(groups.items())
    )
