"""Small folders of images and small sets in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from v2m.data import ArrayDataset

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """make_folder({"train/cat": 3, ...}) writes that many 20 x 24 images to each folder."""
    random = np.random.default_rng(0)

    def make(counts: dict[str, int], suffix: str = "png") -> Path:
        for folder, count in counts.items():
            (tmp_path / folder).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / f"{number:03}.{suffix}")
        return tmp_path

    return make


@pytest.fixture
def arrays() -> ArrayDataset:
    """60 grey images of 28 x 28 in 3 classes."""
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), np.uint8)
    return ArrayDataset(
        name="arrays",
        images=images,
        targets=[i % 3 for i in range(60)],
        classes=["a", "b", "c"],
        mean=(0.3,),
        std=(0.4,),
    )
