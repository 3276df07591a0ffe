"""Feature pyramids for torchvision's detectors: an OrderedDict of maps with equal channels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from v2m.heads.backbone import DenseBackbone

__all__ = ["LEVELS", "DetectionBackbone", "SimplePyramid"]

LEVELS = ("0", "1", "2", "3")  # the maps that regions are read from; "pool" is for the RPN alone


class DetectionBackbone(nn.Module):
    """torchvision's backbone contract: images (B, C, H, W) -> OrderedDict of five maps.

    A hierarchical model gets torchvision's FPN, a plain one the simple pyramid; both add a max
    pooled fifth level.

    Attributes:
        out_channels: channels of every map.
    """

    def __init__(self, body: DenseBackbone, *, out_channels: int = 256):
        super().__init__()
        self.body = body
        self.out_channels = out_channels
        self.sizes: list[tuple[int, int]] | None = None
        extra = LastLevelMaxPool()
        if body.is_plain:
            self.neck: nn.Module = SimplePyramid(body.channels, out_channels, extra)
        else:
            self.neck = FeaturePyramidNetwork(body.channels, out_channels, extra_blocks=extra)

    def set_sizes(self, sizes: Sequence[tuple[int, int]] | None) -> None:
        """Say where the images of the next batch end; the rest of it is padding."""
        self.sizes = None if sizes is None else list(sizes)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images (B, C, H, W) -> {"0": (B, out_channels, H / 4, W / 4), ..., "pool": ...}."""
        sizes, self.sizes = self.sizes, None
        return self.neck(OrderedDict(zip(LEVELS, self.body(images, sizes))))


class SimplePyramid(nn.Module):
    """Each map by itself through a 1x1 and a 3x3 convolution with layer norms (arXiv 2203.16527).

    There is no way from one level to another: all of them come from one map.

    Args:
        in_channels: channels of each map.
        out_channels: channels of every map afterwards.
        extra: torchvision's block that adds further levels.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, extra: LastLevelMaxPool):
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, out_channels, 1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for width in in_channels
        )
        self.extra = extra

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        """{name: (B, in_channels[i], H_i, W_i)} -> {name: (B, out_channels, H_i, W_i)} and more."""
        results = [level(x) for level, x in zip(self.levels, maps.values())]
        results, names = self.extra(results, list(maps.values()), list(maps))
        return OrderedDict(zip(names, results))
