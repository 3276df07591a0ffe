"""Tree crowns on aerial photographs, out of the package deepforest: boxes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .coco import Box, CocoFolder, starts
from .packages import Package

TRAIN = "2019_YELL_2_528000_4978000_image_crop2"
TEST = "2019_YELL_2_541000_4977000_image_crop"
WIDTH, HEIGHT = 312, 345  # of a tile; 4 x 3 of them are the whole test photograph
MARGIN = 50  # pixels left out between the tiles for training and those for validation
LEAST = 1 / 3
SOURCE = """\
Tree crowns on two aerial photographs of Yellowstone, a pixel is 10 cm.

Photographs: National Ecological Observatory Network (NEON), Airborne Observation Platform, high
resolution orthorectified camera imagery (DP3.30010.001), site YELL, 2019. NEON releases its data
under CC0 1.0 (www.neonscience.org/usage-policies) and asks to be cited.
Boxes: the authors of DeepForest (Weinstein et al. 2020, doi:10.1111/2041-210X.13472), drawn by
hand. Both are in the Python package deepforest, MIT licence.

Training and validation are tiles of one photograph (its right edge for validation, {margin} pixels
apart), the test is the other one, cut into 12 tiles that do not overlap.
"""


def prepare(package: Path | None, output: Path) -> list[str]:
    """Write the data set in COCO's layout; returns what was written."""
    source = Package("deepforest", "deepforest", package)
    folder = CocoFolder(output, "tree", least=LEAST)
    photograph, boxes = _read(source, TRAIN)
    height, width = photograph.shape[:2]
    edge = width - WIDTH
    grids = {
        "train": (starts(0, edge - MARGIN, WIDTH, WIDTH // 3), starts(0, height, HEIGHT, 115)),
        "val": ([edge], starts(0, height, HEIGHT, HEIGHT)),
    }
    lines = [
        folder.write(split, _tiles(folder, photograph, boxes, *g)) for split, g in grids.items()
    ]
    photograph, boxes = _read(source, TEST)
    height, width = photograph.shape[:2]
    grid = (starts(0, width, WIDTH, WIDTH), starts(0, height, HEIGHT, HEIGHT))
    lines.append(folder.write("test", _tiles(folder, photograph, boxes, *grid)))
    (output / "SOURCE.txt").write_text(SOURCE.format(margin=MARGIN))
    return lines


def _read(source: Package, name: str) -> tuple[np.ndarray, list[Box]]:
    """A photograph (H, W, 3) and its boxes."""
    tree = ElementTree.parse(io.BytesIO(source.read(f"data/{name}.xml")))
    boxes = [
        tuple(float(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        for entry in tree.iter("object")
    ]
    return source.array(f"data/{name}.png"), boxes


def _tiles(
    folder: CocoFolder, photograph: np.ndarray, boxes: list[Box], lefts: list[int], tops: list[int]
) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    for top in tops:
        for left in lefts:
            tile = (left, top, left + WIDTH, top + HEIGHT)
            yield (
                photograph[top : top + HEIGHT, left : left + WIDTH],
                folder.boxes(boxes, tile),
            )
