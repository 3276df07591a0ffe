"""The data set of a folder of annotated objects, whichever layout it has."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from v2m.data.annotations import DetectionDataset
from v2m.data.coco import read_coco
from v2m.data.randomness import stable_order
from v2m.data.voc import VOC_SPLITS, read_voc
from v2m.errors import InputError

__all__ = ["load_detection"]

NAMES = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
LAYOUTS = """\
  COCO          annotations/instances_train2017.json, train2017/ (val2017, test2017 likewise; the
                year may be missing)
  one a folder  train/_annotations.coco.json beside its images (valid/, test/ likewise)
  Pascal VOC    Annotations/*.xml, JPEGImages/, ImageSets/Main/train.txt (val.txt, test.txt)"""


def load_detection(
    path: str | os.PathLike,
    split: str = "train",
    *,
    on_error: str = "raise",
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> DetectionDataset:
    """One split, "train", "validation" or "test", of a folder in one of the layouts.

    Without annotations for validation, that fraction of the training images is set aside, the same
    ones for the same seed. Without annotations for the test the validation images serve (COCO
    keeps its own secret); the data set's `split` says which it really is.

    Raises:
        InputError: no such folder, or none of the layouts.
        BadAnnotationError: entries that cannot be used, all named, with `on_error` = "raise".
    """
    root = Path(path)
    if split not in NAMES:
        raise InputError(f"`split` must be train, validation or test; got {split!r}.")
    if not root.is_dir():
        raise InputError(f"the folder {root} does not exist. Give one in one of:\n{LAYOUTS}")
    found = {name: _find(root, name) for name in NAMES}
    if split == "test" and found["test"] is None:
        split = "validation"
    if split != "train" and found[split] is not None:
        return _read(root, split, found[split], on_error)
    if found["train"] is None:
        raise InputError(f"{root} has no annotated training images. Expected one of:\n{LAYOUTS}")
    whole = _read(root, "train", found["train"], on_error)
    if split == "train" and found["validation"] is not None:
        return whole
    return _part(whole, split, validation_fraction, seed)


def _find(root: Path, split: str) -> tuple[Path, Path] | str | None:
    """COCO's file and folder of images, "voc", or None."""
    for name in NAMES[split]:
        for year in ("2017", "2014", ""):
            file = root / "annotations" / f"instances_{name}{year}.json"
            if file.is_file():
                folders = (root / f"{name}{year}", root / "images" / f"{name}{year}", root)
                return file, next(folder for folder in folders if folder.is_dir())
        file = root / name / "_annotations.coco.json"
        if file.is_file():
            return file, root / name
    if (root / "Annotations").is_dir():
        lists = (root / "ImageSets" / "Main" / f"{name}.txt" for name in VOC_SPLITS[split])
        if any(path.is_file() for path in lists) or split == "train":
            return "voc"
    return None


def _read(
    root: Path, split: str, found: tuple[Path, Path] | str, on_error: str
) -> DetectionDataset:
    if found == "voc":
        listed = any(
            (root / "ImageSets" / "Main" / f"{name}.txt").is_file() for name in VOC_SPLITS[split]
        )
        return read_voc(root, split if listed else None, name=root.name, on_error=on_error)
    file, folder = found
    return read_coco(file, folder, name=root.name, on_error=on_error, split=split)


def _part(whole: DetectionDataset, split: str, fraction: float, seed: int) -> DetectionDataset:
    """The training images without, or with only, those set aside for validation."""
    order = stable_order((image.path for image in whole.images), seed)
    count = max(1, round(fraction * len(whole)))
    if count >= len(whole):
        raise InputError(
            f"{whole.name} has {len(whole)} training images: too few to set {fraction:g} of them"
            " aside. Add images, or a validation set."
        )
    chosen = sorted(order[:count]) if split == "validation" else sorted(order[count:])
    return replace(whole.subset(chosen), split=split)
