"""Mosaics of photographed textures, out of the package scikit-image: a class for each pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .packages import Package

SIDE = 256
COUNTS = {"training": 160, "validation": 24, "testing": 40}
PIECES = (4, 8)  # of a mosaic: at least, fewer than
# class: file, and left, top, right, bottom of the part for training and of that for the test
TEXTURES = {
    "brick": ("brick.png", (0, 0, 240, 512), (272, 0, 512, 512)),
    "grass": ("grass.png", (0, 0, 240, 512), (272, 0, 512, 512)),
    "gravel": ("gravel.png", (0, 0, 240, 512), (272, 0, 512, 512)),
    "lawn": ("camera.png", (410, 360, 512, 512), (370, 255, 512, 335)),
    "wood": ("coffee.png", (500, 230, 600, 400), (0, 205, 75, 400)),
}
SOURCE = """\
Mosaics of five photographed textures, made here; every pixel's class is known exactly.

Photographs, all CC0, in the Python package scikit-image: brick and gravel (CC0Textures), grass
(linolafett), camera (Lav Varshney; its lawn), coffee (Rachel Michetti; its table). In grey, each
piece with the same mean and contrast up to a random change, so that brightness and colour tell
nothing.

Training and validation mosaics come from one part of each photograph, test mosaics from another.
"""


def prepare(package: Path | None, output: Path) -> list[str]:
    """Write the data set in ADE20K's layout; returns what was written."""
    source = Package("skimage", "scikit-image", package)
    parts = {False: [], True: []}  # whether for the test: a (H, W) float array a class
    for file, train, test in TEXTURES.values():
        grey = source.image(f"data/{file}").convert("L")
        for is_test, box in ((False, train), (True, test)):
            parts[is_test].append(_standardised(np.array(grey.crop(box), np.float32)))
    lines = []
    for number, (split, count) in enumerate(COUNTS.items()):
        random = np.random.default_rng(number)
        for kind in ("images", "annotations"):
            (output / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels, classes = mosaic(parts[split == "testing"], random)
            name = f"{index:03d}.png"
            Image.fromarray(pixels).save(output / "images" / split / name)
            Image.fromarray(classes).save(output / "annotations" / split / name)
        lines.append(f"{split}: {count} mosaics of {SIDE} x {SIDE} pixels")
    (output / "classes.txt").write_text("\n".join(TEXTURES) + "\n")
    (output / "SOURCE.txt").write_text(SOURCE)
    return lines


def mosaic(
    textures: list[np.ndarray], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """An image (SIDE, SIDE) and its classes, both uint8: pieces around random points, with curved
    edges."""
    rows, columns = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    rows, columns = rows + _wave(random, 12), columns + _wave(random, 12)
    points = random.uniform(0, SIDE, (int(random.integers(*PIECES)), 2))
    distance = [(rows - row) ** 2 + (columns - column) ** 2 for row, column in points]
    nearest = np.argmin(distance, axis=0)
    pixels, classes = np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.uint8)
    order = random.permutation(len(points)) % len(textures)  # all classes, where pieces suffice
    order = random.permutation(len(textures))[order]
    for piece, label in enumerate(order):
        here = nearest == piece
        classes[here] = label
        pixels[here] = _cut(textures[label], random)[here]
    pixels = 128 + pixels * 42 * random.uniform(0.85, 1.15) + _wave(random, 12)
    return np.clip(pixels, 0, 255).round().astype(np.uint8), classes


def _standardised(texture: np.ndarray) -> np.ndarray:
    """With mean 0 and standard deviation 1, so that classes do not differ in brightness."""
    return (texture - texture.mean()) / texture.std()


def _cut(texture: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE) of a texture, turned and mirrored at random; a small one goes on in its mirror
    image."""
    texture = np.rot90(texture, random.integers(4))
    texture = texture[:, ::-1] if random.random() < 0.5 else texture
    missing = [(0, max(0, SIDE + 64 - side)) for side in texture.shape]
    texture = np.pad(texture, missing, mode="symmetric")
    top, left = (random.integers(side - SIDE + 1) for side in texture.shape)
    texture = texture[top : top + SIDE, left : left + SIDE]
    return texture * random.uniform(0.85, 1.15) + random.uniform(-0.3, 0.3)


def _wave(random: np.random.Generator, height: float) -> np.ndarray:
    """(SIDE, SIDE) of smooth changes, standard deviation about `height`."""
    coarse = Image.fromarray(random.normal(0, height, (5, 5)).astype(np.float32))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
