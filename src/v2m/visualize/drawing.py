"""Objects and classes drawn on images: what is there beside what a model says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from v2m.data.annotations import mask_api

__all__ = ["MISSED", "RIGHT", "WRONG", "draw_classes", "draw_objects", "enlarged"]

# Blue, orange and pink that differ for colour-blind eyes too (Okabe and Ito 2008).
RIGHT, WRONG, MISSED = (86, 180, 233), (230, 159, 0), (240, 80, 160)
LEAST_SIDE = 360  # smaller images are enlarged before lines are drawn on them
OPACITY = 0.5


def enlarged(image: Image.Image, least: int = LEAST_SIDE) -> tuple[Image.Image, int]:
    """An RGB image, a whole number of times as large if its longer side is below `least`."""
    times = max(1, -(-least // max(image.size)))
    size = (image.width * times, image.height * times)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC), times


def draw_objects(
    image: Image.Image, objects: Iterable[tuple[Sequence[float], Any, tuple[int, int, int]]]
) -> Image.Image:
    """An image with the outlines of objects, enlarged if it is small.

    Args:
        objects: of each the box (left, top, right, bottom), the run-length mask or None, and the
            colour. An object with a mask is drawn without its box.
    """
    picture, times = enlarged(image)
    pixels = np.asarray(picture)
    masked = []
    for box, mask, color in objects:
        if mask is not None:
            whole = np.kron(mask_api().decode([mask])[..., 0], np.ones((times, times), np.uint8))
            pixels = np.where(_outline(whole)[..., None], np.uint8(color), pixels)
        else:
            masked.append((box, color))
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for box, color in masked:
        left, top, right, bottom = (times * side for side in box)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=color, width=2)
    return picture


def _outline(mask: np.ndarray, width: int = 2) -> np.ndarray:
    """(H, W) pixels inside a mask that are at most `width` from its edge."""
    inside = np.pad(mask.astype(bool), 1)
    for _ in range(width):
        core = inside.copy()
        core[1:] &= inside[:-1]
        core[:-1] &= inside[1:]
        core[:, 1:] &= inside[:, :-1]
        core[:, :-1] &= inside[:, 1:]
        inside = core
    return mask.astype(bool) & ~inside[1:-1, 1:-1]


def draw_classes(
    image: Image.Image, classes: np.ndarray, colors: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """An image under the colours of its classes; where there is none (255), the image alone."""
    table = np.zeros((256, 3), np.float32)
    table[: len(colors)] = colors
    picture = np.asarray(image.convert("RGB"), np.float32)
    known = (classes < len(colors))[..., None]
    mixed = np.where(known, (1 - OPACITY) * picture + OPACITY * table[classes], picture)
    return Image.fromarray(mixed.round().astype(np.uint8))
