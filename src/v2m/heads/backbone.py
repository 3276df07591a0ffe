"""Any model as the backbone of a dense task: images to feature maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

import v2m
from v2m.errors import InputError
from v2m.heads.padding import PaddingMask
from v2m.models.backbone import Backbone
from v2m.models.hierarchical import HierarchicalV2M

__all__ = ["STRIDES", "DenseBackbone", "pad_to_multiple"]

STRIDES = (4, 8, 16, 32)


class DenseBackbone(nn.Module):
    """Images (B, C, H, W) -> four feature maps (B, channels[i], ceil(H / s_i), ceil(W / s_i)).

    A hierarchical model gives its own four stages. A plain one has a single resolution: its map is
    brought to the four strides by transposed convolutions and pooling (ViTDet's simple pyramid,
    arXiv 2203.16527), from its last layer or from four depths. The library's models get a
    LayerNorm over the channels of each map, as VMamba's and Swin's dense recipes have it; other
    models of timm are taken as they are. The classifier and unused layers are removed.

    Images whose sides are no multiple of `multiple` are padded with zeros (the mean colour of
    normalised images) below and on the right.

    Args:
        model: a model of timm's interface with `forward_intermediates`; it is changed.
        taps: what a plain model gives: "last" layer four times, or four "depths".

    Attributes:
        channels: channels of each map.
        strides: pixels of the image per cell of each map.
        multiple: what the sides of an image are padded to a multiple of.
        is_plain: whether the model has one resolution only.
    """

    def __init__(self, model: nn.Module, *, taps: Literal["last", "depths"] = "last"):
        super().__init__()
        if taps not in ("last", "depths"):
            raise InputError(f'`taps` must be "last" or "depths"; got {taps!r}.')
        info = _feature_info(model)
        self.is_plain = len({entry["reduction"] for entry in info}) == 1
        if self.is_plain:
            indices = [len(info) - 1] if taps == "last" else _depths(len(info))
        else:
            indices = _stages(model, info)
        widths = [info[i]["num_chs"] for i in indices]
        self.indices = list(indices)
        model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.model = model
        ours = isinstance(model, Backbone)
        self.norms = nn.ModuleList(
            LayerNorm2d(w, eps=1e-5) if ours else nn.Identity() for w in widths
        )
        self.rescales = None
        self.channels, self.multiple = widths, 1
        self.strides: tuple[float, ...] = STRIDES
        if self.is_plain:
            patch = self.multiple = info[0]["reduction"]
            widths = widths * (4 if taps == "last" else 1)
            powers = [round(math.log2(patch / stride)) for stride in STRIDES]
            self.strides = tuple(patch / 2.0**power for power in powers)
            self.rescales = nn.ModuleList(rescale(w, p) for w, p in zip(widths, powers))
            self.channels = [w // 2 ** max(p, 0) for w, p in zip(widths, powers)]
        exact = isinstance(model, HierarchicalV2M)
        self.padding = PaddingMask(model) if exact else None

    def forward(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Tensor]:
        """Images (B, C, H, W) -> the four maps, (B, channels[i], H_i, W_i).

        Args:
            sizes: (height, width) of the image in the upper left corner of each padded one. A
                hierarchical V2M then gives on these the maps it would give without the padding;
                other models see the padding as zeros.
        """
        images = pad_to_multiple(images, self.multiple)
        if self.padding is not None:
            self.padding.set_sizes(images, sizes)
        maps = self.model.forward_intermediates(
            images, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        maps = [norm(m.to(images.dtype)) for norm, m in zip(self.norms, maps)]
        if self.rescales is None:
            return maps
        if len(maps) == 1:
            maps = maps * len(self.rescales)
        return [resize(m) for resize, m in zip(self.rescales, maps)]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay must leave alone."""
        own = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in own}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.model.set_grad_checkpointing(enable)

    @classmethod
    def create(cls, name: str, *, taps: Literal["last", "depths"] = "last", **keywords: Any):
        """The backbone of a new model, `keywords` as `v2m.create_model` takes them."""
        return cls(v2m.create_model(name, **{"num_classes": 0, **keywords}), taps=taps)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Zeros below and on the right of (B, C, H, W) until the sides are multiples of `multiple`."""
    height, width = images.shape[-2:]
    down, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, down)) if down or right else images


def rescale(width: int, power: int) -> nn.Module:
    """(B, D, H, W) -> 2**power times the resolution: transposed convolutions, or max pooling.

    Each doubling halves the channels.
    """
    if power <= 0:
        return nn.MaxPool2d(2**-power, ceil_mode=True) if power else nn.Identity()
    layers: list[nn.Module] = []
    for i in range(power):
        if i > 0:
            layers += [LayerNorm2d(width), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, stride=2))
        width //= 2
    return nn.Sequential(*layers)


def _feature_info(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None)
    missing = [
        name
        for name in ("forward_intermediates", "prune_intermediate_layers")
        if not hasattr(model, name)
    ]
    if info is None or missing:
        raise InputError(
            f"a {type(model).__name__} cannot be a backbone: it has no"
            f" {' and no '.join(missing or ['feature_info'])}. Choose a model of `v2m models`, or"
            " one of timm that has them."
        )
    return list(info)


def _depths(layers: int) -> list[int]:
    """Four depths, evenly, the last layer among them."""
    if layers < 4:
        raise InputError(
            f'taps="depths" needs a model of at least 4 layers; this one has {layers}.'
        )
    return [layers * (i + 1) // 4 - 1 for i in range(4)]


def _stages(model: nn.Module, info: list[dict[str, Any]]) -> list[int]:
    """The last feature map at each of the four strides."""
    found = {entry["reduction"]: index for index, entry in enumerate(info)}
    if any(stride not in found for stride in STRIDES):
        raise InputError(
            f"a {type(model).__name__} has feature maps at strides {sorted(found)}; a backbone"
            f" needs {STRIDES}, or one stride only."
        )
    return [found[stride] for stride in STRIDES]
