"""Tiles of annotated photographs as a folder in COCO's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom; the last two outside


def starts(low: int, high: int, side: int, step: int) -> list[int]:
    """Where tiles of `side` begin in [low, high): every `step`, as many as fit."""
    return list(range(low, high - side + 1, step))


class CocoFolder:
    """Writes ROOT/SPLIT/*.png and ROOT/annotations/instances_SPLIT.json.

    Args:
        root: the folder.
        category: the name of the one class.
        least: the part of an object that has to lie in a tile; less of it becomes a crowd there,
            neither trained on nor counted.
    """

    def __init__(self, root: Path, category: str, *, least: float) -> None:
        self.root, self.category, self.least = root, category, least

    def write(self, split: str, tiles: Iterator[tuple[np.ndarray, list[dict[str, Any]]]]) -> str:
        """Write the tiles of a split; returns what was written in words."""
        images, annotations = [], []
        (self.root / split).mkdir(parents=True, exist_ok=True)
        for number, (pixels, objects) in enumerate(tiles, 1):
            name = f"{number:04d}.png"
            Image.fromarray(pixels).save(self.root / split / name)
            height, width = pixels.shape[:2]
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for entry in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": self.category}],
        }
        path = self.root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        whole = sum(not entry["iscrowd"] for entry in annotations)
        return f"{split}: {len(images)} tiles, {whole} objects, {len(annotations) - whole} cut off"

    def boxes(self, boxes: Sequence[Box], tile: tuple[int, int, int, int]) -> list[dict[str, Any]]:
        """Annotations of the boxes that reach into a tile (left, top, right, bottom)."""
        found = []
        for box in boxes:
            left, top = max(box[0], tile[0]), max(box[1], tile[1])
            right, bottom = min(box[2], tile[2]), min(box[3], tile[3])
            if right - left < 1 or bottom - top < 1:
                continue
            area = (right - left) * (bottom - top)
            part = area / ((box[2] - box[0]) * (box[3] - box[1]))
            found.append(
                {
                    "category_id": 1,
                    "bbox": [left - tile[0], top - tile[1], right - left, bottom - top],
                    "area": area,
                    "iscrowd": int(part < self.least),
                }
            )
        return found

    def masks(self, labels: np.ndarray, tile: tuple[int, int, int, int]) -> list[dict[str, Any]]:
        """Annotations of the objects of a map (H, W) of numbers, 0 for none, in a tile."""
        part = labels[tile[1] : tile[3], tile[0] : tile[2]]
        sizes = np.bincount(labels.ravel())
        found = []
        for number in np.unique(part[part > 0]):
            mask = part == number
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
            found.append(
                {
                    "category_id": 1,
                    "bbox": [int(v) for v in (columns[0], rows[0], width, height)],
                    "area": int(mask.sum()),
                    "iscrowd": int(mask.sum() < self.least * sizes[number]),
                    "segmentation": run_lengths(mask),
                }
            )
        return found


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: column by column, beginning with zeros."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(np.int8)])
    counts = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)), [mask.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}
