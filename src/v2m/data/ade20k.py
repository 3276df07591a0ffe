"""Images with a class for each pixel, in ADE20K's folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import tv_tensors

from v2m.data.annotations import BadAnnotationError, Problems
from v2m.data.images import IMAGE_SUFFIXES, load_image
from v2m.data.randomness import stable_order
from v2m.data.text import read_text
from v2m.errors import InputError

__all__ = ["IGNORED", "SegmentationDataset", "load_segmentation"]

IGNORED = 255  # the class index of pixels that are neither trained on nor counted
ADE_CLASSES = "objectInfo150.txt"
FOLDERS = {
    "train": ("training", "train"),
    "validation": ("validation", "val"),
    "test": ("testing", "test"),
}
LAYOUT = """\
  images/training/*.jpg       annotations/training/*.png     one PNG of class numbers an image
  images/validation/*.jpg     annotations/validation/*.png   (testing/ likewise; also train/, val/)
  objectInfo150.txt           ADE20K's list of names: number 0 is no class, 1 is the first; or
  classes.txt                 one name a line: number 0 is the first, 255 is no class"""


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationDataset:
    """A sequence of (PIL image, tv_tensors.Mask (H, W) int64 of class indices, `IGNORED` for none).

    Attributes:
        name: what the user called it.
        root: where `images` and `labels` are, relative to it.
        classes: class names in the order of the class indices.
        offset: the number in the PNG of class 0; smaller ones are ignored.
        problems: what was skipped when the folders were read, a sentence each.
        on_error: what a loader does with an unreadable image: "raise" or "skip" (and count).
    """

    name: str
    root: Path
    images: list[str]
    labels: list[str]
    classes: list[str]
    offset: int
    in_chans: int = 3
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    on_error: str = "raise"
    problems: list[str] = field(default_factory=list)
    split: str = ""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def origin(self) -> str:
        return str(self.root)

    def identifier(self, index: int) -> str:
        """What image `index` is called, the same on every machine."""
        return self.images[index]

    def subset(self, indices: Sequence[int]) -> SegmentationDataset:
        """The images at `indices`, in that order, with the same classes."""
        images, labels = ([names[i] for i in indices] for names in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Image and classes; BadImageError for a file that cannot be read or does not fit."""
        image = load_image(self.root / self.images[index], self.in_chans)
        return image, tv_tensors.Mask(torch.from_numpy(self._classes(index, image.size)))

    def _classes(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """(H, W) int64 class indices of an image of size (W, H)."""
        path = self.root / self.labels[index]
        try:
            with Image.open(path, formats=("PNG", "BMP", "TIFF")) as picture:
                numbers = np.array(picture)
        except Exception as error:  # decoders raise almost anything on damaged files
            raise BadAnnotationError(
                f"{path} cannot be read as a map of classes: {error}"
            ) from error
        if numbers.ndim != 2 or numbers.dtype.kind not in "ui":
            raise BadAnnotationError(
                f"{path} must have one whole number a pixel (grey or palette); it has shape"
                f" {numbers.shape} of {numbers.dtype}."
            )
        if numbers.shape[::-1] != size:
            raise BadAnnotationError(
                f"{path} has {numbers.shape[1]} x {numbers.shape[0]} pixels, and its image"
                f" {self.images[index]} has {size[0]} x {size[1]}."
            )
        classes = numbers.astype(np.int64) - self.offset
        ignored = (classes < 0) | (numbers == IGNORED)
        unknown = ~ignored & (classes >= len(self.classes))
        if unknown.any():
            row, column = map(int, np.argwhere(unknown)[0])
            raise BadAnnotationError(
                f"{path} has the number {numbers[row, column]} at row {row}, column {column}, and"
                f" the {len(self.classes)} classes are the numbers {self.offset} to"
                f" {self.offset + len(self.classes) - 1}."
            )
        return np.where(ignored, IGNORED, classes)


def load_segmentation(
    path: str | os.PathLike,
    split: str = "train",
    *,
    on_error: str = "raise",
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> SegmentationDataset:
    """One split, "train", "validation" or "test", of a folder in ADE20K's layout.

    Without a folder for validation, that fraction of the training images is set aside, the same
    ones for the same seed. Without one for the test the validation images serve (ADE20K keeps its
    own secret); the data set's `split` says which it really is.

    Raises:
        InputError: no such folder, or another layout.
        BadAnnotationError: images without classes, all named, with `on_error` = "raise".
    """
    root = Path(path)
    if split not in FOLDERS:
        raise InputError(f"`split` must be train, validation or test; got {split!r}.")
    if not root.is_dir():
        raise InputError(f"the folder {root} does not exist. Give one in this layout:\n{LAYOUT}")
    classes, offset = _class_names(root)
    found = {name: _folder(root, name) for name in FOLDERS}
    if split == "test" and found["test"] is None:
        split = "validation"
    folder = found[split] or found["train"]
    if folder is None:
        raise InputError(f"{root} has no images/training folder. Expected this layout:\n{LAYOUT}")
    images, labels, problems = _pairs(root, folder)
    problems.settle(on_error)
    whole = SegmentationDataset(
        name=root.name,
        root=root,
        images=images,
        labels=labels,
        classes=classes,
        offset=offset,
        on_error=on_error,
        problems=list(problems),
        split=split,
    )
    if found["validation"] is not None or (found[split] is not None and split != "train"):
        return whole
    return _part(whole, split, validation_fraction, seed)


def _folder(root: Path, split: str) -> str | None:
    return next((n for n in FOLDERS[split] if (root / "images" / n).is_dir()), None)


def _class_names(root: Path) -> tuple[list[str], int]:
    """The names, and the number of the first class."""
    path = root / "classes.txt"
    if path.is_file():
        names = [line.strip() for line in read_text(path).splitlines()]
        names = names[: len(names) - next((i for i, n in enumerate(reversed(names)) if n), 0)]
        if not names or not all(names) or len(set(names)) != len(names) or len(names) > IGNORED:
            raise InputError(
                f"{path} must have one name a line, each once, and 1 to {IGNORED} of them; it has"
                f" {len(names)} lines."
            )
        return names, 0
    path = root / ADE_CLASSES
    if not path.is_file():
        raise InputError(f"{root} has neither classes.txt nor {ADE_CLASSES}:\n{LAYOUT}")
    rows = [line.split("\t") for line in read_text(path).splitlines()[1:]]
    names = [row[-1].split(",")[0].strip() for row in rows if len(row) >= 5]
    if not names:
        raise InputError(f"{path} is not ADE20K's table of names: expected five columns, by tabs.")
    return names, 1


def _pairs(root: Path, folder: str) -> tuple[list[str], list[str], Problems]:
    """The images of a folder and their maps of classes, both relative to `root`."""
    problems, images, labels = Problems(), [], []
    base = root / "images" / folder
    for path in sorted(base.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        label = Path("annotations", folder, path.relative_to(base)).with_suffix(".png")
        if (root / label).is_file():
            images.append(path.relative_to(root).as_posix())
            labels.append(label.as_posix())
        else:
            problems.add(str(path), f"its classes {root / label} are missing")
    if not images:
        problems.settle("raise")
        raise InputError(f"{base} has no images.")
    return images, labels, problems


def _part(
    whole: SegmentationDataset, split: str, fraction: float, seed: int
) -> SegmentationDataset:
    """The training images without, or with only, those set aside for validation."""
    order = stable_order(whole.images, seed)
    count = max(1, round(fraction * len(whole)))
    if count >= len(whole):
        raise InputError(
            f"{whole.name} has {len(whole)} training images: too few to set {fraction:g} of them"
            " aside. Add images, or a validation folder."
        )
    chosen = sorted(order[:count]) if split == "validation" else sorted(order[count:])
    return whole.subset(chosen)
