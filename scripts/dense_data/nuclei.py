"""Cell nuclei on a fluorescence micrograph, out of the package stardist: masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .coco import CocoFolder, starts
from .packages import Package

SIDE, STEP = 128, 16  # pixels of a tile, and from one training tile to the next
TRAIN_END, TEST_BEGIN = 224, 256  # columns; between them lies the margin
BRIGHTEST = 120.0  # grey value that becomes white: one pixel in a hundred is brighter
LEAST = 1 / 3
SOURCE = """\
Cell nuclei on one fluorescence micrograph of 512 x 512 pixels, each with its mask.

Image and masks: 2018 Data Science Bowl, Broad Bioimage Benchmark Collection BBBC038v1 (Caicedo et
al. 2019, doi:10.1038/s41592-019-0612-7), CC0 1.0. They are in the Python package stardist
(Schmidt et al. 2018), BSD 3-clause licence.

Training: overlapping tiles of columns 0 to {train}. Test: the 8 tiles of columns {test} to 511,
which do not overlap. It is one image: a working example, no measure of how well nuclei are found
elsewhere.
"""


def prepare(package: Path | None, output: Path) -> list[str]:
    """Write the data set in COCO's layout; returns what was written."""
    source = Package("stardist", "stardist", package)
    image = source.array("data/images/img2d.tif").astype(np.float32)
    labels = source.array("data/images/mask2d.tif").astype(np.int64)
    grey = (255 * np.clip(image / BRIGHTEST, 0, 1)).round().astype(np.uint8)
    folder = CocoFolder(output, "nucleus", least=LEAST)
    height, width = grey.shape
    training = (starts(0, TRAIN_END, SIDE, STEP), starts(0, height, SIDE, STEP))
    test = (starts(TEST_BEGIN, width, SIDE, SIDE), starts(0, height, SIDE, SIDE))
    lines = [
        folder.write("train", _tiles(folder, grey, labels, *training)),
        folder.write("test", _tiles(folder, grey, labels, *test)),
    ]
    text = SOURCE.format(train=TRAIN_END - 1, test=TEST_BEGIN)
    (output / "SOURCE.txt").write_text(text)
    return lines


def _tiles(
    folder: CocoFolder, grey: np.ndarray, labels: np.ndarray, lefts: list[int], tops: list[int]
) -> Iterator[tuple[np.ndarray, list[dict[str, Any]]]]:
    for top in tops:
        for left in lefts:
            tile = (left, top, left + SIDE, top + SIDE)
            yield grey[top : top + SIDE, left : left + SIDE], folder.masks(labels, tile)
