"""Data sets behind timm's reader interface: a reader gives image `index` as (open file, class)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.readers.reader import Reader

from v2m.data.datasets import ImageDataset
from v2m.data.images import BadImageError, decode_image

__all__ = ["ReaderDataset"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReaderDataset(ImageDataset):
    """Images of a reader of timm that takes indices; `indices` says which of them, in which
    order."""

    name: str
    reader: Reader
    indices: Sequence[int]
    targets: list[int]
    classes: list[str]
    origin: str
    in_chans: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    on_error: str = "raise"

    @property
    def image_size(self) -> None:
        return None

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = f"{self.identifier(index)} of {self.origin}"
        try:
            file, _ = self.reader[self.indices[index]]
            with file:
                data: Any = io.BytesIO(file.read())
        except (OSError, AssertionError) as error:
            raise BadImageError(f"{name} cannot be read: {error}") from error
        return decode_image(data, name, self.in_chans), self.targets[index]

    def identifier(self, index: int) -> str:
        return self.reader.filename(self.indices[index])

    def subset(self, indices: Sequence[int]) -> ReaderDataset:
        chosen, targets = [self.indices[i] for i in indices], [self.targets[i] for i in indices]
        return replace(self, indices=chosen, targets=targets)
