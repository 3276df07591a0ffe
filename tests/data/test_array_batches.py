"""The fast path of arrays in memory against its definition and against the transforms."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from v2m.data import SMALL_IMAGES, ArrayDataset, DataConfig, create_loader, evaluation_transform
from v2m.data.array_batches import ArrayBatches, can_batch

PLAIN = DataConfig(
    crop="center",
    crop_pct=1.0,
    horizontal_flip=0,
    random_erasing=0,
    color_jitter=0,
    auto_augment=None,
)


def test_it_evaluates_exactly_as_the_transforms_do(arrays) -> None:
    transform = evaluation_transform(PLAIN, (1, 28, 28), arrays.mean, arrays.std)
    expected = torch.stack([transform(arrays[i][0]) for i in range(len(arrays))])
    loader = create_loader(arrays, PLAIN, is_training=False, input_size=(1, 28, 28), batch_size=7)
    assert can_batch(arrays, PLAIN, False, (1, 28, 28))
    assert torch.equal(torch.cat([images for images, _ in loader]), expected)
    assert torch.cat([targets for _, targets in loader]).tolist() == arrays.targets


@pytest.mark.parametrize(
    ("options", "is_training", "size", "expected"),
    [
        ({}, True, (1, 28, 28), True),
        ({"crop": "padded", "random_erasing": 0.5}, True, (1, 28, 28), True),
        ({"crop": "resized"}, True, (1, 28, 28), False),
        ({"crop": "resized"}, False, (1, 28, 28), True),
        ({"color_jitter": 0.1}, True, (1, 28, 28), False),
        ({"auto_augment": "rand-m9"}, True, (1, 28, 28), False),
        ({"crop_pct": 0.9}, True, (1, 28, 28), False),
        ({"crop_pct": 0.9}, False, (1, 28, 28), False),
        ({}, True, (3, 28, 28), False),
        ({}, False, (1, 32, 28), False),
    ],
)
def test_it_is_used_where_it_does_all_that_is_asked(
    arrays, options: dict, is_training: bool, size: tuple[int, int, int], expected: bool
) -> None:
    assert can_batch(arrays, replace(PLAIN, **options), is_training, size) is expected


@pytest.mark.parametrize("channels", [1, 3])
def test_it_crops_flips_and_normalises_as_defined(channels: int) -> None:
    shape = (200, 5, 7) if channels == 1 else (200, 5, 7, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    dataset = ArrayDataset(
        name="odd",
        images=pixels,
        targets=[0] * 200,
        classes=["x"],
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )
    config = replace(SMALL_IMAGES, crop_padding=2, vertical_flip=0.5, random_erasing=0)
    load = ArrayBatches(
        dataset, config, is_training=True, mean=dataset.mean, std=dataset.std, seed=0
    )
    images, _ = load(0, np.arange(200), np.zeros(200, dtype=int))
    padded = np.pad(pixels.reshape(200, 5, 7, channels), ((0, 0), (2, 2), (2, 2), (0, 0)))
    padded = ((torch.from_numpy(padded).permute(0, 3, 1, 2) / 255) - 0.5) / 0.25
    used = Counter()
    for image, source in zip(images, padded):
        crops = {
            (top, left, up, side): torch.equal(
                image, _flip(source[:, top : top + 5, left : left + 7], up, side)
            )
            for top in range(5)
            for left in range(5)
            for up in (False, True)
            for side in (False, True)
        }
        assert any(crops.values())
        used.update(key for key, equal in crops.items() if equal)
    for position, choices in enumerate((5, 5, 2, 2)):  # every choice happens
        assert len({key[position] for key in used}) == choices


def _flip(image: Tensor, up: bool, side: bool) -> Tensor:
    image = image.flip(1) if up else image
    return image.flip(2) if side else image


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_it_erases_one_rectangle_of_timms_size(mode: str) -> None:
    dataset = ArrayDataset(
        name="white",
        images=np.full((250, 28, 20), 255, np.uint8),
        targets=[0] * 250,
        classes=["x"],
        mean=(0.0,),
        std=(1.0,),
    )
    config = replace(PLAIN, random_erasing=0.25, erasing_mode=mode)
    load = ArrayBatches(dataset, config, is_training=True, mean=(0.0,), std=(1.0,), seed=0)
    images, _ = load(0, np.arange(250), np.zeros(250, dtype=int))
    shares, edges = [], set()
    for image in images[:, 0]:
        erased = image != 1
        if not erased.any():
            continue
        rows, columns = torch.nonzero(erased, as_tuple=True)
        box = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box != 1).float().mean() > 0.98
        assert len(box.unique()) == 1 if mode != "pixel" else len(box.unique()) > 4
        assert mode != "const" or (box == 0).all()
        shares.append(box.numel() / image.numel())
        if box.shape[0] < 28 and box.shape[1] < 20:
            edges |= {("top", int(rows.min())), ("bottom", int(rows.max()))}
            edges |= {("left", int(columns.min())), ("right", int(columns.max()))}
    assert 35 < len(shares) < 90  # a quarter of 250
    assert {("top", 0), ("bottom", 27), ("left", 0), ("right", 19)} <= edges
    assert 0.01 < min(shares) < 0.06
    assert 0.28 < max(shares) < 0.36
    if mode == "pixel":
        noise = images[images != 1]
        assert abs(noise.mean()) < 0.1
        assert abs(noise.std() - 1) < 0.1
