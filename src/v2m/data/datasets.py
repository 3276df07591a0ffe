"""Labelled images: in memory or in files, one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from v2m.data.images import load_image
from v2m.errors import InputError

__all__ = ["ArrayDataset", "FileDataset", "ImageDataset"]


class ImageDataset(ABC):
    """A sequence of (PIL image, class index) with what a model needs to know about it.

    Attributes:
        name: what the user called it, for messages and reports.
        classes: class names, in the order of the class indices.
        targets: class index of each image.
        in_chans: channels of its images, 1 (mode "L") or 3 (mode "RGB").
        image_size: (H, W) if all images have that size, else None.
        mean, std: per-channel statistics of the training images in [0, 1], for normalisation.
        on_error: what a loader does with an unreadable image: "raise" or "skip" (and count).
        origin: where the images come from, for reports.
    """

    name: str
    classes: list[str]
    targets: list[int]
    in_chans: int
    image_size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    on_error: str
    origin: str

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image `index` and its class; BadImageError if its file cannot be read."""

    @abstractmethod
    def identifier(self, index: int) -> str:
        """What image `index` is called, the same on every machine: a path below the folder."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> ImageDataset:
        """The images at `indices`, in that order, as a dataset with the same classes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayDataset(ImageDataset):
    """Images of one size held in memory: `images` (n, H, W) or (n, H, W, 3) uint8."""

    name: str
    images: np.ndarray
    targets: list[int]
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str = "memory"
    on_error: str = "raise"

    def __post_init__(self) -> None:
        images = self.images
        if (
            images.dtype != np.uint8
            or images.ndim not in (3, 4)
            or images.shape[3:] not in ((), (3,))
        ):
            raise InputError(
                f"`images` must be uint8 of shape (n, H, W) or (n, H, W, 3); got {images.dtype} of "
                f"shape {images.shape}."
            )
        if len(images) != len(self.targets):
            raise InputError(f"{len(images)} images but {len(self.targets)} targets.")

    @property
    def in_chans(self) -> int:
        return 1 if self.images.ndim == 3 else 3

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[1:3]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), self.targets[index]

    def identifier(self, index: int) -> str:
        return str(range(len(self))[index])

    def subset(self, indices: Sequence[int]) -> ArrayDataset:
        positions = np.asarray(indices, dtype=np.int64)
        targets = [self.targets[i] for i in positions]
        return replace(self, images=self.images[positions], targets=targets)


@dataclass(frozen=True, kw_only=True, eq=False)
class FileDataset(ImageDataset):
    """Images in files: `paths` relative to `root`, posix style."""

    name: str
    root: Path
    paths: list[str]
    targets: list[int]
    classes: list[str]
    in_chans: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    on_error: str = "raise"

    @property
    def image_size(self) -> None:
        return None

    @property
    def origin(self) -> str:
        return str(self.root)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return load_image(self.root / self.paths[index], self.in_chans), self.targets[index]

    def identifier(self, index: int) -> str:
        return self.paths[index]

    def subset(self, indices: Sequence[int]) -> FileDataset:
        paths, targets = [self.paths[i] for i in indices], [self.targets[i] for i in indices]
        return replace(self, paths=paths, targets=targets)
