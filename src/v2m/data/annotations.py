"""Images with annotated objects: what every detection layout is read into."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import tv_tensors

from v2m.data.images import BadImageError, load_image
from v2m.errors import InputError

__all__ = [
    "AnnotatedImage",
    "BadAnnotationError",
    "DetectionDataset",
    "Instance",
    "Problems",
    "check_box",
    "is_number",
    "mask_api",
]

NAMED = 10  # problems that an error message quotes
OUTSIDE = 1.0  # pixels that a box may reach over the edge, by rounding; it is cut there


class BadAnnotationError(BadImageError):
    """An annotation that cannot be used; the message names the file, the entry and why."""


def mask_api() -> Any:
    """faster-coco-eval's run-length masks; InputError says how to install it."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise InputError(
            "masks and COCO's average precision need faster-coco-eval: pip install 'v2m[dense]'."
        ) from error
    return mask


class Problems(list):
    """Sentences about bad annotations, each naming its file and entry."""

    def add(self, where: str, reason: str) -> None:
        """Note that the entry `where` cannot be used."""
        self.append(f"{where}: {reason}")

    def settle(self, on_error: str) -> None:
        """Raise BadAnnotationError for what was found, unless bad entries are to be skipped."""
        if not self or on_error == "skip":
            return
        more = f"\n... and {len(self) - NAMED} more" if len(self) > NAMED else ""
        raise BadAnnotationError(
            f"{len(self)} bad annotations:\n" + "\n".join(self[:NAMED]) + more + "\nCorrect them,"
            " or choose to skip bad annotations (data.on_error=skip)."
        )


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One object of an image.

    Attributes:
        box: left, top, right, bottom in pixels; the right and lower edges lie outside.
        label: index of its class.
        crowd: a group, or too difficult: it is neither trained on nor counted.
        mask: COCO's run-length mask with the image's size; None without masks.
        area: pixels of the mask, or of the box.
        entry: what a message calls it.
    """

    box: tuple[float, float, float, float]
    label: int
    crowd: bool = False
    mask: dict[str, Any] | None = None
    area: float = 0.0
    entry: str = ""


@dataclass(frozen=True, kw_only=True)
class AnnotatedImage:
    """A file, its size in pixels and what is on it."""

    path: str  # relative to the data set's root, posix style
    height: int
    width: int
    instances: tuple[Instance, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionDataset:
    """A sequence of (PIL image, target).

    A target is a dict of torchvision's tv_tensors: "boxes" (n, 4) as left, top, right, bottom,
    "labels" (n,) int64 class indices, and with masks "masks" (n, H, W) uint8. Crowds are left out
    of it.

    Attributes:
        name: what the user called it.
        root: where `images[i].path` is.
        classes: class names in the order of the class indices.
        category_ids: the number that each class has in COCO files.
        has_masks: whether every object has one.
        problems: what was skipped when it was read, a sentence each.
        on_error: what a loader does with an unreadable image: "raise" or "skip" (and count).
    """

    name: str
    root: Path
    images: list[AnnotatedImage]
    classes: list[str]
    category_ids: list[int]
    has_masks: bool
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
        return self.images[index].path

    def subset(self, indices: Sequence[int]) -> DetectionDataset:
        """The images at `indices`, in that order, with the same classes."""
        return replace(self, images=[self.images[i] for i in indices])

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        """Image and target; BadImageError if the file cannot be read or has another size."""
        entry = self.images[index]
        path = self.root / entry.path
        image = load_image(path, self.in_chans)
        if image.size != (entry.width, entry.height):
            raise BadAnnotationError(
                f"{path} has {image.width} x {image.height} pixels, and its annotation says"
                f" {entry.width} x {entry.height}."
            )
        return image, self.target(index)

    def target(self, index: int) -> dict[str, Any]:
        """The objects of image `index`, without reading the image."""
        entry = self.images[index]
        size = (entry.height, entry.width)
        kept = [instance for instance in entry.instances if not instance.crowd]
        boxes = torch.tensor([i.box for i in kept], dtype=torch.float32).reshape(-1, 4)
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([i.label for i in kept], dtype=torch.int64),
        }
        if self.has_masks:
            masks = np.zeros((0, *size), dtype=np.uint8)
            if kept:
                decoded = mask_api().decode([i.mask for i in kept])  # (H, W, n)
                masks = np.ascontiguousarray(decoded.transpose(2, 0, 1))
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        return target

    def coco(self) -> dict[str, Any]:
        """All annotations as COCO's JSON, images numbered from 1 in the data set's order."""
        images, annotations = [], []
        for number, image in enumerate(self.images, 1):
            size = {"height": image.height, "width": image.width}
            images.append({"id": number, "file_name": image.path, **size})
            for instance in image.instances:
                left, top, right, bottom = instance.box
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": self.category_ids[instance.label],
                    "bbox": [left, top, right - left, bottom - top],
                    "area": instance.area,
                    "iscrowd": int(instance.crowd),
                }
                if self.has_masks:
                    annotation["segmentation"] = instance.mask
                annotations.append(annotation)
        names = zip(self.category_ids, self.classes)
        categories = [{"id": number, "name": name} for number, name in names]
        return {"images": images, "annotations": annotations, "categories": categories}


def check_box(
    box: Sequence[Any], height: int, width: int, refuse: Callable[[str], None]
) -> tuple[float, float, float, float] | None:
    """left, top, right, bottom cut at the image's edge; None after `refuse(why)` if unusable."""
    if len(box) != 4 or not all(is_number(value) for value in box):
        refuse(f"its box {list(box)} is not four finite numbers")
        return None
    left, top, right, bottom = map(float, box)
    shown = f"its box from ({left:g}, {top:g}) to ({right:g}, {bottom:g})"
    if right <= left or bottom <= top:
        refuse(f"{shown} is empty")
        return None
    over = max(-left, -top, right - width, bottom - height)
    if over > OUTSIDE:
        refuse(f"{shown} leaves the image of {width} x {height} pixels")
        return None
    cut = (max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height))
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        refuse(f"{shown} lies outside the image of {width} x {height} pixels")
        return None
    return cut


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold; JSON's integers have no limit."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max
