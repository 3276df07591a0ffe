"""Augmentation of batches on the device: each image by itself, as configured, reproducible."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from v2m.data import DataConfig, create_loader
from v2m.data.device_augment import CHUNK, DeviceAugment
from v2m.errors import InputError

PLAIN = DataConfig(on_device=True, auto_augment=None, color_jitter=0, random_erasing=0)
STATISTICS = ((0.5, 0.4, 0.3), (0.2, 0.2, 0.25))


def batch(count: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 24, 16), dtype=torch.uint8)


def test_normalisation() -> None:
    images = batch()
    mean, std = (torch.tensor(x)[:, None, None] for x in STATISTICS)
    expected = (images.float() / 255 - mean) / std
    assert torch.allclose(DeviceAugment(PLAIN, *STATISTICS)(images), expected)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_is_a_rectangle_in_some_of_the_images(mode: str) -> None:
    images = batch(400)
    config = replace(PLAIN, random_erasing=0.25, erasing_mode=mode)
    before, after = (
        DeviceAugment(PLAIN, *STATISTICS)(images),
        DeviceAugment(config, *STATISTICS)(images),
    )
    changed = (before != after).any(1)  # (B, H, W)
    erased = changed.flatten(1).any(1)
    assert 0.15 < erased.float().mean() < 0.35
    for index in erased.nonzero().flatten().tolist():
        rows, columns = changed[index].nonzero(as_tuple=True)
        box = after[index, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        area = box.shape[1] * box.shape[2] / (24 * 16)
        assert 0.01 < area < 0.5
        assert changed[index].sum() >= 0.95 * box.shape[1] * box.shape[2]
        flat = box.std((1, 2), correction=0).max()
        assert (flat > 0.3) if mode == "pixel" and area > 0.1 else True
        assert (flat < 1e-5) if mode == "rand" else True
        assert (box == 0).all() if mode == "const" else True


def test_the_policy_differs_between_chunks_and_repeats_with_the_seed() -> None:
    images = batch(1).expand(8 * CHUNK, -1, -1, -1)
    augment = DeviceAugment(replace(PLAIN, auto_augment="rand-m9-mstd0.5-inc1"), *STATISTICS)
    torch.manual_seed(3)
    one = augment(images)
    torch.manual_seed(3)
    assert torch.equal(augment(images), one)
    assert not torch.equal(augment(images), one)
    chunks = one.split(CHUNK)
    assert all(torch.equal(chunk[0], image) for chunk in chunks for image in chunk)
    assert len({chunk.numpy().tobytes() for chunk in chunks}) > 4
    assert one.isfinite().all()


def test_colour_jitter_and_what_is_not_known() -> None:
    images = batch()
    jittered = DeviceAugment(replace(PLAIN, color_jitter=0.4), *STATISTICS)(images)
    assert not torch.equal(jittered, DeviceAugment(PLAIN, *STATISTICS)(images))
    with pytest.raises(InputError, match=r"no counterpart of auto_augment = 'augmix-m3-w3'"):
        DeviceAugment(replace(PLAIN, auto_augment="augmix-m3-w3"), *STATISTICS)
    for channels in (1, 3):
        grey = torch.randint(0, 256, (9, channels, 8, 8), dtype=torch.uint8)
        config = replace(PLAIN, auto_augment="rand-m9", random_erasing=0.5)
        assert DeviceAugment(config, (0.5,) * channels, (0.5,) * channels)(grey).shape == grey.shape


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_sends_bytes(arrays, workers: int) -> None:
    loader = create_loader(
        arrays, PLAIN, is_training=True, input_size=(1, 28, 28), batch_size=8, num_workers=workers
    )
    images, _ = next(iter(loader))
    assert images.dtype == torch.uint8
    assert images.shape == (8, 1, 28, 28)
    loader = create_loader(
        arrays, PLAIN, is_training=False, input_size=(1, 28, 28), batch_size=8, num_workers=workers
    )
    assert next(iter(loader))[0].dtype == torch.float32
