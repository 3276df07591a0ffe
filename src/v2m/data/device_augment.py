"""Colour policy, normalisation and erasing of whole batches, on the device that trains.

Decoding, crop and flips stay with the loader's processes, which then send bytes: a quarter of what
normalised images take.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from v2m.data.config import DataConfig
from v2m.errors import InputError

__all__ = ["DeviceAugment"]

CHUNK = 8  # images that share the operations and strengths of the colour policy
# timm's random erasing: share of the image's area, and height over width, log-uniform.
_AREA, _ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


class DeviceAugment:
    """(B, C, H, W) uint8 -> (B, C, H, W) float32, augmented and normalised, on the same device.

    All random numbers come from torch's global generators, which the trainer seeds at each step.

    Args:
        config: `auto_augment` may be none or a RandAugment ("rand-m9-...": torchvision's, of that
            magnitude, one draw for each 8 images; timm's noise on the magnitude has no counterpart
            there); without it, `color_jitter` applies.

    Raises:
        InputError: for another policy.
    """

    def __init__(self, config: DataConfig, mean: Sequence[float], std: Sequence[float]) -> None:
        self.config = config
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        self.colour = _colour(config)

    def __call__(self, images: Tensor) -> Tensor:
        if self.colour is not None:
            images = torch.cat([self.colour(chunk) for chunk in images.split(CHUNK)])
        mean, std = (x.to(images.device)[:, None, None] for x in (self.mean, self.std))
        images = images.float().div(255).sub(mean).div(std)
        return self._erase(images) if self.config.random_erasing > 0 else images

    def _erase(self, images: Tensor) -> Tensor:
        """Random erasing of each image by itself, without a loop over them."""
        batch, _, height, width = images.shape
        chance, area, aspect, top, left = torch.rand(5, batch, 1, 1, 1, device=images.device)
        area = (_AREA[0] + (_AREA[1] - _AREA[0]) * area) * height * width
        low, high = map(math.log, _ASPECT)
        aspect = torch.exp(low + (high - low) * aspect)
        tall = (area * aspect).sqrt().round().clamp(1, height)
        wide = (area / aspect).sqrt().round().clamp(1, width)
        top, left = (top * (height - tall + 1)).floor(), (left * (width - wide + 1)).floor()
        rows = torch.arange(height, device=images.device)[:, None]
        columns = torch.arange(width, device=images.device)
        inside = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
        inside &= chance < self.config.random_erasing  # (B, 1, H, W)
        return torch.where(inside, self._filling(images), images)

    def _filling(self, images: Tensor) -> Tensor:
        mode = self.config.erasing_mode
        if mode == "const":
            return images.new_zeros(())
        return torch.randn_like(images if mode == "pixel" else images[:, :, :1, :1])


def _colour(config: DataConfig) -> v2.Transform | None:
    if config.auto_augment is None:
        strength = config.color_jitter
        return v2.ColorJitter(strength, strength, strength) if strength > 0 else None
    found = re.match(r"rand-(?:.*-)?m(\d+)", config.auto_augment)
    if found is None:
        raise InputError(
            f"augment.on_device has no counterpart of auto_augment = {config.auto_augment!r}: use "
            "a RandAugment (rand-m9), or none, or leave augment.on_device out."
        )
    operations = re.search(r"-n(\d+)", config.auto_augment)
    return v2.RandAugment(
        num_ops=int(operations[1]) if operations else 2,
        magnitude=min(int(found[1]), 10),
        num_magnitude_bins=11,
        interpolation=v2.InterpolationMode.BILINEAR,
    )
