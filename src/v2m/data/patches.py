"""Shuffling the patches of images, to see whether a model uses where things are."""

from __future__ import annotations

import torch
from torch import Tensor

from v2m.errors import InputError

__all__ = ["shuffle_patches"]


def shuffle_patches(
    images: Tensor, patch_size: int | tuple[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """Permute the patches of each image at random, each image with its own permutation.

    Args:
        images: (B, C, H, W), any dtype and device.
        patch_size: side, or (height, width), of a patch; H and W must be multiples of it.
        generator: a CPU generator, for the same permutations each time.

    Returns:
        (B, C, H, W): every pixel of an image once, inside its patch.
    """
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if images.ndim != 4 or min(height, width) < 1:
        raise InputError(
            f"`images` must be (B, C, H, W) and `patch_size` positive; got {tuple(images.shape)} "
            f"and {patch_size}."
        )
    B, C, H, W = images.shape
    if H % height or W % width:
        raise InputError(
            f"`images` are {H} x {W}, which patches of {height} x {width} do not fill: choose a "
            "patch size that divides both sides."
        )
    rows, columns = H // height, W // width
    patches = images.reshape(B, C, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(B, rows * columns, C, height, width)
    order = torch.rand(B, rows * columns, generator=generator).argsort(dim=1).to(images.device)
    patches = patches[torch.arange(B, device=images.device)[:, None], order]
    patches = patches.reshape(B, rows, columns, C, height, width).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(B, C, H, W)
