"""Generated scenes: one to four coloured shapes on a textured background.

Objects have a popularity and a circle of companions, so that POPE's three negative samplings (random, popular,
adversarial) mean on these scenes what they mean on photographs. A *faint* scene blends most of its objects into the
background at a low opacity; `tiny/llava/README.md` says why the model is trained on some of those.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from lmms_smoothguard.tiny.company import Company

SIZE = 64
"""Side of a scene in pixels."""
GRID = 8
"""Patches a side: one label a patch for the vision stage of training."""

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 215, 50),
    "purple": (150, 55, 190),
    "orange": (245, 140, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
OBJECTS = tuple(f"{color} {shape}" for color, shape in itertools.product(COLORS, SHAPES))
"""All 30 object names; an object is its index in here."""

_CANVAS = 2 * SIZE  # drawn at twice the size, then averaged: smooth edges
_FAINTEST, _LEAST_FAINT = 0.025, 0.6
_FAINT_OPAQUE_SHARE = 0.35
_FAINT_TEXTURE = 0.4  # a faint scene has a calmer background, or nothing faint could be seen on it


class Scene(NamedTuple):
    """`image` uint8 (64, 64, 3); `objects` sorted indices into OBJECTS; `patches` uint8 (64,), 0 or 1 + object."""

    image: np.ndarray
    objects: tuple[int, ...]
    patches: np.ndarray


class SceneSet(NamedTuple):
    """Scenes as arrays: `images` (n, 64, 64, 3) uint8, `objects` (n, 4) int8 padded with -1, `patches` (n, 64) uint8."""

    images: np.ndarray
    objects: np.ndarray
    patches: np.ndarray

    def present(self, index: int) -> tuple[int, ...]:
        """The objects of one scene."""
        return tuple(int(o) for o in self.objects[index] if o >= 0)


def color_of(obj: int) -> int:
    """Index of an object's colour."""
    return obj // len(SHAPES)


def shape_of(obj: int) -> int:
    """Index of an object's shape."""
    return obj % len(SHAPES)


COMPANY = Company([(color_of(obj), shape_of(obj)) for obj in range(len(OBJECTS))])
"""Which objects are frequent, and which keep company."""


def _corners(shape: str, cx: float, cy: float, radius: float, turn: float) -> list[tuple[float, float]]:
    polar: list[tuple[float, float]]
    if shape == "square":
        polar = [(1.15, math.pi / 4 + k * math.pi / 2) for k in range(4)]
    elif shape == "triangle":
        polar = [(1.2, -math.pi / 2 + k * 2 * math.pi / 3) for k in range(3)]
    elif shape == "star":
        polar = [(1.2 if k % 2 == 0 else 0.5, -math.pi / 2 + k * math.pi / 5) for k in range(10)]
    else:  # cross: the twelve corners of a plus sign
        arm, tip = 0.36, 1.05
        quarter = [(arm, -tip), (arm, -arm), (tip, -arm)]
        points = [
            (x * math.cos(k * math.pi / 2) - y * math.sin(k * math.pi / 2),
             x * math.sin(k * math.pi / 2) + y * math.cos(k * math.pi / 2))
            for k in range(4)
            for x, y in quarter
        ]  # fmt: skip
        polar = [(math.hypot(x, y), math.atan2(y, x)) for x, y in points]
    return [(cx + radius * r * math.cos(t + turn), cy + radius * r * math.sin(t + turn)) for r, t in polar]


def _background(rng: np.random.Generator, texture: float) -> np.ndarray:
    """A tinted plain with soft clouds, sometimes a grating, and grain: float (64, 64, 3) in 0-255."""
    clouds = Image.fromarray(rng.normal(0, 1, (6, 6)).astype(np.float32))
    field: np.ndarray = np.asarray(clouds.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) * rng.uniform(4, 22)
    if rng.random() < 0.4:
        y, x = np.mgrid[0:SIZE, 0:SIZE]
        angle, frequency = rng.uniform(0, math.pi), rng.uniform(0.3, 1.2)
        field = field + np.sin((x * math.cos(angle) + y * math.sin(angle)) * frequency) * rng.uniform(4, 18)
    grain = rng.normal(0, texture * rng.uniform(1, 8), (SIZE, SIZE, 1))
    return rng.uniform(60, 200) + rng.normal(0, 12, 3) + field[..., None] + grain


def draw_scene(rng: np.random.Generator, *, faint: bool = False) -> Scene:
    """Draws one scene, every object in a quarter of its own."""
    objects = COMPANY.sample(rng)
    texture = _FAINT_TEXTURE if faint else 1.0
    plain = Image.fromarray(_background(rng, texture).clip(0, 255).astype(np.uint8))
    canvas = plain.resize((_CANVAS, _CANVAS), Image.Resampling.BILINEAR)
    labels = Image.new("L", (_CANVAS, _CANVAS), 0)
    for obj, cell in zip(objects, rng.permutation(4), strict=False):
        radius = 2 * rng.uniform(9, 13)
        cx = 2 * (16 + 32 * (cell % 2) + rng.uniform(-3, 3))
        cy = 2 * (16 + 32 * (cell // 2) + rng.uniform(-3, 3))
        opacity = 1.0
        if faint and rng.random() >= _FAINT_OPAQUE_SHARE:
            opacity = math.exp(rng.uniform(math.log(_FAINTEST), math.log(_LEAST_FAINT)))
        base = COLORS[list(COLORS)[color_of(obj)]]
        color = tuple(int(np.clip(channel + rng.normal(0, 10), 0, 255)) for channel in base)
        turn = rng.uniform(-0.2, 0.2)
        painted = canvas.copy()
        for image, fill in ((painted, color), (labels, obj + 1)):
            pen = ImageDraw.Draw(image)
            if SHAPES[shape_of(obj)] == "circle":
                pen.ellipse([cx - radius, cy - radius, cx + radius, cy + radius], fill=fill)
            else:
                pen.polygon(_corners(SHAPES[shape_of(obj)], cx, cy, radius, turn), fill=fill)
        canvas = painted if opacity == 1.0 else Image.blend(canvas, painted, opacity)
    smooth = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX)).astype(np.float32)
    pixels = smooth + rng.normal(0, texture * rng.uniform(0, 5), smooth.shape)
    return Scene(pixels.clip(0, 255).astype(np.uint8), tuple(sorted(objects)), _patch_labels(np.asarray(labels)))


def _patch_labels(labels: np.ndarray) -> np.ndarray:
    """The object that fills most of a patch, where objects fill at least a fifth of it; else 0."""
    side = _CANVAS // GRID
    patches = labels.reshape(GRID, side, GRID, side).transpose(0, 2, 1, 3).reshape(GRID * GRID, -1)
    out = np.zeros(GRID * GRID, np.uint8)
    for index, patch in enumerate(patches):
        inside = patch[patch > 0]
        if inside.size * 5 >= patch.size:
            out[index] = np.bincount(inside).argmax()
    return out


def make_scenes(count: int, seed: int, *, faint: bool = False) -> SceneSet:
    """`count` scenes that depend on `seed` and `faint` alone."""
    rng = np.random.default_rng([seed, int(faint)])
    out = SceneSet(
        np.zeros((count, SIZE, SIZE, 3), np.uint8),
        np.full((count, 4), -1, np.int8),
        np.zeros((count, GRID * GRID), np.uint8),
    )
    for index in range(count):
        scene = draw_scene(rng, faint=faint)
        out.images[index], out.patches[index] = scene.image, scene.patches
        out.objects[index, : len(scene.objects)] = scene.objects
    return out
