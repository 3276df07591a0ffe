"""Padding that a hierarchical V2M does not see.

Detection pads the images of a batch to one size, below and on the right. A scan that starts at a
padded corner would carry what it finds there into the image. In the hierarchical models every map
from a token to a token but the convolutions and the scans looks at one place only, the depthwise
convolution has no bias, and a scan over zeros has a state of zeros. So it is enough to put zeros
outside the image before each convolution, as its own padding does, and after the depthwise one: the
features inside the image are then what they are without the padding.

The plain models cannot have this from outside: their causal convolutions, inside the scan, have a
bias, so padded tokens reach the three corners whose scans start beyond the image's edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from v2m.errors import InputError
from v2m.models.hierarchical import HierarchicalV2M

__all__ = ["PaddingMask"]


class PaddingMask(nn.Module):
    """Puts zeros outside the images of a padded batch, inside a hierarchical V2M.

    Hooks on the model's convolutions do it; without padding they do nothing.

    Args:
        model: the model to hook.
    """

    def __init__(self, model: HierarchicalV2M):
        super().__init__()
        self.sizes: list[tuple[int, int]] | None = None
        for i, stage in enumerate(model.layers):
            stride = 4 * 2**i
            for block in stage.blocks:
                convolution = block.op.conv2d
                convolution.register_forward_pre_hook(partial(self._before, stride))
                convolution.register_forward_hook(partial(self._after, stride))
            if not isinstance(stage.downsample, nn.Identity):
                stage.downsample[1].register_forward_pre_hook(partial(self._before, stride))
        model.patch_embed[5].register_forward_pre_hook(partial(self._before, 2))

    def set_sizes(self, images: Tensor, sizes: Sequence[tuple[int, int]] | None) -> None:
        """Say where the images end in the next batch (B, C, H, W); None: at its edge."""
        height, width = images.shape[-2:]
        if sizes is None or all(tuple(size) == (height, width) for size in sizes):
            self.sizes = None
            return
        if len(sizes) != len(images) or any(
            not (0 < h <= height and 0 < w <= width) for h, w in sizes
        ):
            raise InputError(
                f"`sizes` must be one (height, width) within {height} x {width} for each of the"
                f" {len(images)} images; got {list(sizes)}."
            )
        self.sizes = [(int(h), int(w)) for h, w in sizes]

    def _before(self, stride: int, _module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (self._mask(inputs[0], stride),)

    def _after(self, stride: int, _module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return self._mask(output, stride)

    def _mask(self, grid: Tensor, stride: int) -> Tensor:
        """(B, H, W, C) with zeros outside the images."""
        if self.sizes is None:
            return grid
        rows = torch.arange(grid.shape[1], device=grid.device)
        columns = torch.arange(grid.shape[2], device=grid.device)
        ends = torch.tensor([(-(-h // stride), -(-w // stride)) for h, w in self.sizes])
        ends = ends.to(grid.device, non_blocking=True)
        inside = (rows < ends[:, :1])[:, :, None] & (columns < ends[:, 1:])[:, None, :]  # (B, H, W)
        return grid.masked_fill(~inside.unsqueeze(-1), 0)
