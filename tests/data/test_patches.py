"""Shuffled patches: every patch once, each image in its own order."""

from __future__ import annotations

import pytest
import torch

from v2m.data import shuffle_patches
from v2m.errors import InputError


def patches_of(image: torch.Tensor, height: int, width: int) -> list[bytes]:
    rows = image.unfold(1, height, height).unfold(2, width, width)  # (C, H/h, W/w, h, w)
    return [p.contiguous().numpy().tobytes() for p in rows.permute(1, 2, 0, 3, 4).flatten(0, 1)]


@pytest.mark.parametrize("patch_size", [4, (2, 3), (8, 12), 1])
def test_every_patch_is_there_once_and_whole(patch_size) -> None:
    images = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12)
    shuffled = shuffle_patches(images, patch_size, torch.Generator().manual_seed(0))
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    assert shuffled.shape == images.shape
    assert shuffled.dtype == images.dtype
    for before, after in zip(images, shuffled):
        old, new = patches_of(before, height, width), patches_of(after, height, width)
        assert sorted(old) == sorted(new)
        assert (old == new) == (len(old) == 1)


def test_each_image_has_its_own_order_and_the_seed_decides() -> None:
    images = torch.arange(64.0).reshape(1, 1, 8, 8).expand(3, 1, 8, 8)
    first, again, other = (
        shuffle_patches(images, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(images, torch.arange(64.0).reshape(1, 1, 8, 8).expand(3, 1, 8, 8))


@pytest.mark.parametrize(
    ("shape", "patch_size", "message"),
    [
        ((1, 1, 8, 9), 4, "8 x 9, which patches of 4 x 4 do not fill"),
        ((1, 8, 8), 4, r"must be \(B, C, H, W\)"),
        ((1, 1, 8, 8), 0, "positive"),
    ],
)
def test_sizes_that_do_not_fit(shape, patch_size, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shuffle_patches(torch.zeros(shape), patch_size)
