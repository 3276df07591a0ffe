"""UperNet (arXiv 1807.10221): pyramid pooling, a feature pyramid, their fusion; the segmenter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.nn import functional as F

from v2m.heads.backbone import DenseBackbone, pad_to_multiple
from v2m.heads.config import SegmenterConfig
from v2m.heads.dense import DenseModel, build_body

__all__ = ["PyramidPooling", "Segmenter", "UperNetDecoder"]

BINS = (1, 2, 3, 6)  # cells of a side that pyramid pooling averages to


def _convolution(channels: int, out: int, size: int) -> ConvNormAct:
    """Convolution, batch norm, ReLU."""
    return ConvNormAct(channels, out, size, padding=size // 2)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """A map fused with its averages over few cells, (B, D, H, W) -> (B, channels, H, W)."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), _convolution(in_channels, channels, 1))
            for side in BINS
        )
        self.fuse = _convolution(in_channels + len(BINS) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = [_resize(pool(x), x) for pool in self.pools]
        return self.fuse(torch.cat([x, *pooled], dim=1))


class UperNetDecoder(nn.Module):
    """Maps (B, in_channels[i], H_i, W_i), the finest first -> (B, channels, H_0, W_0)."""

    def __init__(self, in_channels: Sequence[int], channels: int):
        super().__init__()
        *finer, coarsest = in_channels
        self.pooling = PyramidPooling(coarsest, channels)
        self.laterals = nn.ModuleList(_convolution(width, channels, 1) for width in finer)
        self.outputs = nn.ModuleList(_convolution(channels, channels, 3) for _ in finer)
        self.fuse = _convolution(len(in_channels) * channels, channels, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        top = self.pooling(maps[-1])
        results = [top]
        for x, lateral, output in reversed(list(zip(maps, self.laterals, self.outputs))):
            side = lateral(x)
            top = side + _resize(top, side)
            results.insert(0, output(top))
        return self.fuse(torch.cat([_resize(result, results[0]) for result in results], dim=1))


class Segmenter(DenseModel):
    """UperNet on any backbone: a class for each pixel.

    `segmenter(images)` gives logits (B, num_classes, H, W) of the images' own size; in training
    mode the pair of these and of the auxiliary head on stride 16. A plain model gives four depths,
    as BEiT's and Vim's recipes have it.

    Args:
        config: its shape.
        backbone: a model with weights to build on; a new one of `config.backbone` without.
    """

    architecture = "upernet"

    def __init__(self, config: SegmenterConfig, backbone: nn.Module | None = None):
        super().__init__(config)
        self.encoder = build_body(config, backbone, "depths")
        self.decoder = UperNetDecoder(self.encoder.channels, config.channels)
        self.classifier = _classifier(config.channels, config)
        width = config.auxiliary_channels
        self.auxiliary = nn.Sequential(
            _convolution(self.encoder.channels[2], width, 3), *_classifier(width, config)
        )

    @property
    def body(self) -> DenseBackbone:
        return self.encoder

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised images (B, C, H, W) -> logits (B, K, H, W), twice in training."""
        padded = pad_to_multiple(images, self.encoder.multiple)
        maps = self.encoder(padded)
        logits = self._full_size(self.classifier(self.decoder(maps)), padded, images)
        if not self.training:
            return logits
        return logits, self._full_size(self.auxiliary(maps[2]), padded, images)

    @staticmethod
    def _full_size(logits: Tensor, padded: Tensor, images: Tensor) -> Tensor:
        """(B, K, h, w) at the resolution of the padded images, without the padding."""
        height, width = images.shape[-2:]
        return _resize(logits.float(), padded)[..., :height, :width]


def _classifier(channels: int, config: SegmenterConfig) -> nn.Sequential:
    layers = (nn.Dropout2d(config.dropout), nn.Conv2d(channels, config.num_classes, 1))
    nn.init.normal_(layers[1].weight, std=0.01)
    nn.init.zeros_(layers[1].bias)
    return nn.Sequential(*layers)
