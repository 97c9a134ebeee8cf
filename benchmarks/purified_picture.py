"""Draws docs/purified.png: two ordinary scenes and a faint one, attacked, noisy as a pass sees them, and purified.

python benchmarks/purified_picture.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from booster_curve import crafted
from lmms_smoothguard.boosting.booster import load_booster
from lmms_smoothguard.smoothing.towers import find_tower
from lmms_smoothguard.subject import EMBEDDED, Subject
from lmms_smoothguard.sweeps.canvas import panels, save, style
from lmms_smoothguard.tiny.testsets import test_sets

_EPS, _SIGMA = 8, 0.3
_HEADS = ("clean", f"attacked, {_EPS}/255", "one noisy pass", "purified")


def main() -> None:
    """Crafts three pictures, which takes seconds, and draws them."""
    subject, sets = Subject(EMBEDDED), test_sets()
    rows = [sets["pope"][0], sets["pope"][6], sets["pope_faint"][0]]
    booster = load_booster("psm", find_tower(subject.model))
    figure, axes = _canvas(len(rows))
    for row, attacked, line in zip(
        rows, crafted(subject, rows, _EPS, Path("runs/results/cache/attacks")), axes, strict=True
    ):
        pixels = torch.from_numpy(attacked).permute(2, 0, 1)[None].float() / 255
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        noisy = (pixels + _SIGMA * noise).clamp(0, 1)
        with torch.inference_mode():
            purified = booster.purify(noisy, _SIGMA)
        for axis, shown in zip(line, (row["image"], attacked, _picture(noisy), _picture(purified)), strict=True):
            axis.imshow(shown)
        line[0].set_ylabel("faint objects" if row is rows[-1] else "")
    for axis, head in zip(axes[0], _HEADS, strict=True):
        axis.set_title(head)
    save(figure, Path(__file__).parent.parent / "docs" / "purified.png")


def _canvas(rows: int) -> tuple[Any, Any]:
    with style():
        figure, axes = panels(rows, len(_HEADS), 7.2, 1.9 * rows)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
    return figure, axes


def _picture(pixels: torch.Tensor) -> np.ndarray:
    return (pixels[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


if __name__ == "__main__":
    main()
