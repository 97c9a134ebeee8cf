"""The tensors of a CLIP vision tower, whoever named them: transformers (any 5.x) or open_clip."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from lmms_smoothguard.errors import ConfigError

Tensors = dict[str, torch.Tensor]
"""By canonical name: that of `CLIPVisionModel` without `vision_model.`."""
_ANCHOR, _OPEN_CLIP_ANCHOR = "embeddings.class_embedding", "class_embedding"
_BUFFERS = ("embeddings.position_ids",)
_OPEN_CLIP = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"))
        for kind in ("weight", "bias")
    },
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PROJECTIONS = {"visual_projection.weight", "proj"}


class Checkpoint(NamedTuple):
    """tensors: of the vision tower; left_out: names of the file that are no part of it; is_open_clip: whose names they were."""

    tensors: Tensors
    left_out: tuple[str, ...]
    is_open_clip: bool


def read_checkpoint(files: Iterable[Path], name: str) -> Checkpoint:
    """The vision tower in safetensors files, on the CPU. `name`: for errors.

    Raises ConfigError for a torn file, one without a CLIP vision tower, and tensors nobody knows among the tower's.
    """
    from safetensors import SafetensorError, safe_open

    where: dict[str, Path] = {}
    tensors: Tensors = {}
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                where |= dict.fromkeys(opened.keys(), file)
        prefix, is_open_clip = _prefix(where, name)
        left_out = [key for key in where if not key.startswith(prefix)]
        for file in dict.fromkeys(where.values()):
            with safe_open(file, "pt") as opened:
                for key in (key for key in opened.keys() if key.startswith(prefix)):  # noqa: SIM118 (no mapping)
                    short = key.removeprefix(prefix)
                    if short in _PROJECTIONS:
                        left_out.append(key)
                    elif short not in _BUFFERS:
                        tensors[short] = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"vision_tower is {name!r}, which cannot be read ({error}); expected safetensors") from error
    return Checkpoint(_renamed(tensors, name) if is_open_clip else tensors, tuple(sorted(left_out)), is_open_clip)


def canonical(names: Iterable[str]) -> dict[str, str]:
    """The names of a CLIPVisionModel's own tensors by their canonical ones: transformers up to 5.17 has `vision_model.`"""
    return {name.removeprefix("vision_model."): name for name in names}


def _prefix(names: Mapping[str, Path], source: str) -> tuple[str, bool]:
    """What stands before the tower's names in this file, and whether they are open_clip's."""
    for anchor, is_open_clip in ((_ANCHOR, False), (_OPEN_CLIP_ANCHOR, True)):
        found = [name.removesuffix(anchor) for name in names if name == anchor or name.endswith(f".{anchor}")]
        if len(found) > 1:
            raise ConfigError(
                f"vision_tower is {source!r}, which has {len(found)} vision towers ({', '.join(found)}); expected one"
            )
        if found:
            return found[0], is_open_clip
    some = ", ".join(sorted(names)[:4]) or "nothing"
    timm = " A tower of timm (visual.trunk) is not CLIP's." if any(".trunk." in f".{name}" for name in names) else ""
    raise ConfigError(
        f"vision_tower is {source!r}, which has no CLIP vision tower: no {_ANCHOR} (transformers) and no visual.{_OPEN_CLIP_ANCHOR} "
        f"or {_OPEN_CLIP_ANCHOR} (open_clip) among {some} ...{timm} Expected a ViT of CLIP's"
    )


def _renamed(tensors: Tensors, source: str) -> Tensors:
    """open_clip's names to canonical ones; its queries, keys and values are one matrix."""
    made: Tensors = {}
    unknown = []
    for name, tensor in tensors.items():
        block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
        if name in _OPEN_CLIP:
            made[_OPEN_CLIP[name]] = tensor
        elif block is None:
            unknown.append(name)
        elif block[2] in ("attn.in_proj_weight", "attn.in_proj_bias") and len(tensor) % 3 == 0:
            kind = block[2].rpartition("_")[2]
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                made[f"encoder.layers.{block[1]}.self_attn.{part}_proj.{kind}"] = chunk
        elif (ours := _OPEN_CLIP_BLOCK.get(block[2].rpartition(".")[0])) is not None:
            made[f"encoder.layers.{block[1]}.{ours}.{block[2].rpartition('.')[2]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ConfigError(
            f"vision_tower is {source!r}, whose {', '.join(sorted(unknown)[:4])} ({len(unknown)} in all) no CLIPVisionModel has; "
            "expected a plain CLIP ViT, without layer scale, attentional pooling or other extras"
        )
    return made
