"""Whole batches out of an array in memory: crop, flips and erasing of all images at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from v2m.data.config import DataConfig
from v2m.data.datasets import ArrayDataset, ImageDataset
from v2m.data.randomness import epoch_normals, epoch_uniforms

__all__ = ["ArrayBatches", "can_batch"]

# Columns of the table of random numbers, one row per image.
_TOP, _LEFT, _FLIP_LEFT, _FLIP_UP, _ERASE, _AREA, _ASPECT, _ERASE_TOP, _ERASE_LEFT, _NOISE = range(
    10
)
# timm's random erasing: share of the image's area, and height over width, log-uniform.
_AREA_RANGE, _ASPECT_RANGE = (0.02, 1 / 3), (0.3, 1 / 0.3)
_NOISE_IMAGES = 256


def can_batch(
    dataset: ImageDataset, config: DataConfig, is_training: bool, input_size: tuple[int, int, int]
) -> bool:
    """Whether `ArrayBatches` does all that `config` asks for."""
    if not isinstance(dataset, ArrayDataset):
        return False
    if (dataset.in_chans, *dataset.image_size) != tuple(input_size):
        return False
    if not is_training:
        return config.crop_pct == 1
    if config.on_device:
        return False
    plain = config.auto_augment is None and config.color_jitter == 0
    return plain and (config.crop == "padded" or (config.crop == "center" and config.crop_pct == 1))


class ArrayBatches:
    """Batches of an ArrayDataset.

    `batches(epoch, indices, draws)` gives images (B, C, H, W) float32 normalised and targets (B,)
    int64. What is done to an image depends on (seed, epoch, index, draw) only.
    """

    def __init__(
        self,
        dataset: ArrayDataset,
        config: DataConfig,
        *,
        is_training: bool,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
    ) -> None:
        self.config, self.is_training, self.seed = config, is_training, seed
        self.size = dataset.image_size
        images = dataset.images.reshape(len(dataset), *self.size, dataset.in_chans)
        self.padding = config.crop_padding if is_training and config.crop == "padded" else 0
        sides = ((self.padding, self.padding),) * 2
        padded = np.pad(images, ((0, 0), *sides, (0, 0))) if self.padding else images
        self.images = np.ascontiguousarray(padded.transpose(0, 3, 1, 2))  # (n, C, H + 2p, W + 2p)
        self.targets = np.asarray(dataset.targets, dtype=np.int64)
        # every byte's normalised value, by the same operations as ToTensor and Normalize
        scaled = torch.arange(256, dtype=torch.float32).div(255)
        columns = [scaled.sub(m).div(s) for m, s in zip(torch.tensor(mean), torch.tensor(std))]
        self.values = torch.stack(columns).numpy()  # (C, 256)
        self._uniforms = lru_cache(maxsize=config.repeats)(self._uniforms)
        self._noise = lru_cache(maxsize=1)(self._noise)

    def __call__(self, epoch: int, indices: np.ndarray, draws: np.ndarray) -> tuple[Tensor, Tensor]:
        targets = torch.from_numpy(self.targets[indices])
        if not self.is_training:
            return torch.from_numpy(self._normalised(self.images[indices])), targets
        uniforms = np.empty((len(indices), 10))
        for draw in np.unique(draws):
            rows = draws == draw
            uniforms[rows] = self._uniforms(epoch, int(draw))[indices[rows]]
        images = self._normalised(self._cropped(indices, uniforms))
        if self.config.random_erasing > 0:
            self._erase(images, uniforms, epoch)
        return torch.from_numpy(images), targets

    def _uniforms(self, epoch: int, draw: int) -> np.ndarray:
        return epoch_uniforms(len(self.targets), 10, self.seed, epoch, draw)

    def _noise(self, epoch: int) -> np.ndarray:
        shape = (_NOISE_IMAGES, self.images.shape[1], *self.size)
        return epoch_normals(shape, self.seed, epoch)

    def _normalised(self, images: np.ndarray) -> np.ndarray:
        if len(self.values) == 1:
            return self.values[0][images]
        return np.stack([v[images[:, c]] for c, v in enumerate(self.values)], axis=1)

    def _cropped(self, indices: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Random crop of the padded images, and flips: (B, C, H, W) uint8."""
        shifts = (uniforms[:, [_TOP, _LEFT]] * (2 * self.padding + 1)).astype(np.int64)
        flips = uniforms[:, [_FLIP_UP, _FLIP_LEFT]]
        chances = (self.config.vertical_flip, self.config.horizontal_flip)
        axes = []  # the rows and the columns to take, (B, H) and (B, W)
        for axis, (side, chance) in enumerate(zip(self.size, chances)):
            steps = np.arange(side)
            flipped = flips[:, axis, None] < chance
            axes.append(shifts[:, axis, None] + np.where(flipped, steps[::-1], steps))
        rows, columns = axes
        pixels = self.images[indices[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return pixels.transpose(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)

    def _erase(self, images: np.ndarray, uniforms: np.ndarray, epoch: int) -> None:
        """timm's random erasing, in place; a rectangle longer than the image is cut to its side."""
        height, width = self.size
        low, high = _AREA_RANGE
        area = (low + (high - low) * uniforms[:, _AREA]) * height * width
        low, high = map(math.log, _ASPECT_RANGE)
        aspect = np.exp(low + (high - low) * uniforms[:, _ASPECT])
        tall = np.clip(np.rint(np.sqrt(area * aspect)), 1, height).astype(np.int64)
        wide = np.clip(np.rint(np.sqrt(area / aspect)), 1, width).astype(np.int64)
        top = (uniforms[:, _ERASE_TOP] * (height - tall + 1)).astype(np.int64)
        left = (uniforms[:, _ERASE_LEFT] * (width - wide + 1)).astype(np.int64)
        noise_index = (uniforms[:, _NOISE] * _NOISE_IMAGES).astype(np.int64)
        noise = self._noise(epoch)
        for i in np.flatnonzero(uniforms[:, _ERASE] < self.config.random_erasing):
            box = (slice(top[i], top[i] + tall[i]), slice(left[i], left[i] + wide[i]))
            if self.config.erasing_mode == "const":
                images[i][:, *box] = 0
            elif self.config.erasing_mode == "rand":
                images[i][:, *box] = noise[noise_index[i], :, :1, :1]
            else:
                images[i][:, *box] = noise[noise_index[i]][:, *box]
