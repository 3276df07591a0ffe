"""Objects and classes drawn on images: what is there beside what a model says."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from v2m.data.annotations import mask_api

__all__ = [
    "MISSED",
    "RIGHT",
    "WRONG",
    "draw_classes",
    "draw_detections",
    "draw_objects",
    "enlarged",
    "palette",
]

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
        _draw_box(draw, [times * side for side in box], color, 2)
    return picture


def _draw_box(draw: ImageDraw.ImageDraw, box: Sequence[float], color: tuple, width: int) -> None:
    """A box whose right and lower edges lie outside; one of less than a pixel is a pixel."""
    left, top, right, bottom = box
    right, bottom = max(left, right - 1), max(top, bottom - 1)
    draw.rectangle((left, top, right, bottom), outline=color, width=width)


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


def draw_detections(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    scores: Sequence[float],
    *,
    masks: np.ndarray | None = None,
    names: Sequence[str],
) -> Image.Image:
    """An RGB image of the same size with objects: boxes, or outlines of masks, and their scores.

    Classes have a colour each; of one class alone, objects differ in colour. The class, if there
    are several, and the score stand in the upper left corner of each box that has room for them.

    Args:
        boxes: left, top, right, bottom, pixels; the right and lower edges lie outside.
        masks: (n, H, W) of bool.
    """
    colors = palette(max(len(names), len(labels)))
    chosen = [colors[label if len(names) > 1 else i] for i, label in enumerate(labels)]
    width = 2 if max(image.size) >= LEAST_SIDE else 1
    pixels = np.asarray(image.convert("RGB"))
    if masks is not None:
        for mask, color in zip(masks, chosen):
            pixels = np.where(_outline(mask, width)[..., None], np.uint8(color), pixels)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    size = int(np.clip(max(image.size) / 45, 9, 16))
    for (left, top, right, bottom), label, score, color in zip(boxes, labels, scores, chosen):
        if masks is None:
            _draw_box(draw, (left, top, right, bottom), color, width)
        text = f"{score:.2f}" if len(names) == 1 else f"{names[label]} {score:.2f}"
        if draw.textlength(text, font_size=size) <= right - left - 4 and bottom - top > size:
            place, style = (left + 3, top + 2), {"fill": "white", "stroke_fill": "black"}
            draw.text(place, text, font_size=size, stroke_width=1, **style)
    return picture


def palette(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ: hues by the golden ratio, at three levels of brightness."""
    hues = ((0.61803398875 * i) % 1.0 for i in range(count))
    levels = ((0.95, 0.75, 0.55)[i % 3] for i in range(count))
    colors = (colorsys.hsv_to_rgb(h, 0.8, v) for h, v in zip(hues, levels))
    return [tuple(round(255 * channel) for channel in color) for color in colors]
