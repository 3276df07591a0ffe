"""Augmentations that change an image and its boxes, masks or classes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from v2m.data.ade20k import IGNORED

__all__ = [
    "BalancedCrop",
    "Distortion",
    "RandomShortSide",
    "detection_evaluation",
    "detection_training",
    "segmentation_evaluation",
    "segmentation_training",
]

Transform = Callable[[Any, Any], tuple[Tensor, Any]]
SMALLEST_BOX = 1.0  # pixels of a side; smaller ones, after resizing, are left out


def detection_training(
    min_sizes: Sequence[int],
    max_size: int,
    *,
    horizontal_flip: float,
    vertical_flip: float = 0.0,
    distortion: float = 0.0,
) -> Transform:
    """(PIL image, target) -> ((C, H, W) float32 in [0, 1], target), resized and flipped at random.

    Args:
        min_sizes: the shorter side becomes one of these, pixels.
        max_size: unless the longer one would be more than this.
        distortion: probability of each change of brightness, contrast, saturation and hue.
    """
    distort = [Distortion(distortion)] if distortion else []
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomShortestSize(list(min_sizes), max_size, antialias=True),
            v2.RandomHorizontalFlip(horizontal_flip),
            v2.RandomVerticalFlip(vertical_flip),
            *distort,
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=SMALLEST_BOX),
            v2.ToDtype(torch.float32, scale=True),
            v2.ToPureTensor(),
        ]
    )


def detection_evaluation() -> Transform:
    """(PIL image, target) -> ((C, H, W) float32 in [0, 1], target); the detector resizes."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def segmentation_training(
    size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    ratio: tuple[float, float],
    largest_class: float,
    horizontal_flip: float,
    distortion: float,
) -> Transform:
    """(PIL image, classes) -> ((C, H, W) normalised float32, (H, W) int64), as for ADE20K.

    The shorter side becomes that of `size` times a random number of `ratio`; a crop of `size` of
    which no class fills more than `largest_class`, if ten tries find one; a flip; photometric
    distortion; what is missing on the right and below is the mean colour and no class.

    Args:
        size: height and width, pixels.
        distortion: probability of each change of brightness, contrast, saturation and hue.
    """
    fill = {tv_tensors.Image: [round(255 * m) for m in mean], tv_tensors.Mask: IGNORED}
    distort = [Distortion(distortion)] if len(mean) == 3 and distortion else []
    return v2.Compose(
        [
            v2.ToImage(),
            RandomShortSide(min(size), ratio),
            BalancedCrop(size, largest_class, fill),
            v2.RandomHorizontalFlip(horizontal_flip),
            *distort,
            *_normalised(mean, std),
        ]
    )


def segmentation_evaluation(mean: Sequence[float], std: Sequence[float]) -> Transform:
    """(PIL image, classes) -> ((C, H, W) normalised float32, (H, W) int64), of the same size."""
    return v2.Compose([v2.ToImage(), *_normalised(mean, std)])


def _normalised(mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
    return [
        v2.ToDtype(dtypes, scale=True),
        v2.Normalize(list(mean), list(std)),
        v2.ToPureTensor(),
    ]


class Distortion(v2.RandomPhotometricDistort):
    """Random brightness, contrast, saturation and hue of an RGB image, each with a probability.

    In the ranges of mmsegmentation's, whose brightness is a shift by up to an eighth of white where
    this is a factor. Unlike torchvision's own it never exchanges the colour channels.
    """

    def __init__(self, probability: float):
        super().__init__(brightness=(0.75, 1.25), hue=(-0.1, 0.1), p=probability)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


class RandomShortSide(v2.Transform):
    """Resizes so that the shorter side is `side` times a random number of `ratio`, uniformly."""

    def __init__(self, side: int, ratio: tuple[float, float]):
        super().__init__()
        self.side, self.ratio = side, ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        low, high = self.ratio
        side = self.side * (low + (high - low) * torch.rand(()).item())
        scale = side / min(height, width)
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resize, inpt, params["size"], antialias=True)


class BalancedCrop(v2.Transform):
    """A random crop of which no class fills more than a part, padded on the right and below.

    Args:
        size: height and width, pixels.
        largest_class: that part, of the pixels with a class; 1 takes the first crop.
        fill: {kind of tensor: what padding holds}.
    """

    TRIES = 10

    def __init__(self, size: tuple[int, int], largest_class: float, fill: dict[Any, Any]):
        super().__init__()
        self.size, self.largest_class, self.fill = size, largest_class, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        classes = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        crop_height, crop_width = min(height, self.size[0]), min(width, self.size[1])
        for _ in range(self.TRIES):
            top = int(torch.randint(height - crop_height + 1, ()))
            left = int(torch.randint(width - crop_width + 1, ()))
            part = classes[..., top : top + crop_height, left : left + crop_width]
            counts = part[part != IGNORED].unique(return_counts=True)[1]
            if self.largest_class >= 1 or (
                len(counts) > 1 and counts.max() <= self.largest_class * counts.sum()
            ):
                break
        return {"box": (top, left, crop_height, crop_width)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        box = params["box"]
        inpt = self._call_kernel(F.crop, inpt, *box)
        padding = [0, 0, self.size[1] - box[3], self.size[0] - box[2]]
        if not any(padding):
            return inpt
        return self._call_kernel(F.pad, inpt, padding, fill=self.fill[type(inpt)])
