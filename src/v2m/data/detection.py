"""The data set of a folder of annotated objects, whichever layout it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import count as count_from
from pathlib import Path

from v2m.data.annotations import DetectionDataset
from v2m.data.coco import coco_classes, read_coco
from v2m.data.randomness import stable_order
from v2m.data.voc import read_voc, voc_list
from v2m.errors import InputError

__all__ = ["load_detection"]

NAMES = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
LAYOUTS = """\
  COCO          annotations/instances_train2017.json, train2017/ (val2017, test2017 likewise; the
                year may be missing)
  one a folder  train/_annotations.coco.json beside its images (valid/, test/ likewise)
  Pascal VOC    Annotations/*.xml, JPEGImages/, ImageSets/Main/train.txt (val.txt, test.txt
                likewise; without train.txt trainval.txt or all files, but for those)"""
NAMED = 10  # classes that an error message quotes


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

    The classes are those of training, in its order: another split's are found by their names, and
    those that it does not have are added.

    Raises:
        InputError: no such folder, none of the layouts, or objects of classes that training lacks.
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
        dataset = _read(root, split, found[split], on_error)
        if found["train"] in (None, found[split]):  # "voc", whose classes are those of all files
            return dataset
        return _with_classes(*_classes(root, found["train"]), dataset, _source(root, found[split]))
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
        return "voc" if split == "train" or voc_list(root, split) else None
    return None


def _read(
    root: Path, split: str, found: tuple[Path, Path] | str, on_error: str
) -> DetectionDataset:
    if found == "voc":
        return read_voc(root, split, name=root.name, on_error=on_error)
    file, folder = found
    return read_coco(file, folder, name=root.name, on_error=on_error, split=split)


def _source(root: Path, found: tuple[Path, Path] | str) -> Path:
    """The file or the folder that the annotations of a split are in."""
    return found[0] if isinstance(found, tuple) else root / "Annotations"


def _classes(root: Path, found: tuple[Path, Path] | str) -> tuple[list[str], Path]:
    """The classes of a split, and where they are from."""
    source = _source(root, found)
    if isinstance(found, tuple):
        return coco_classes(source), source
    return read_voc(root, None, name=root.name, on_error="skip").classes, source


def _with_classes(
    classes: list[str], training: Path, dataset: DetectionDataset, source: Path
) -> DetectionDataset:
    """`dataset`, from `source`, with the classes of the annotations `training`, in their order."""
    used = {dataset.classes[i.label] for image in dataset.images for i in image.instances}
    if unknown := sorted(used - set(classes)):
        lacking = sorted(set(classes) - set(dataset.classes))
        also = f", and lacks {_shown(lacking)}" if lacking else ""
        raise InputError(
            f"{source} has objects of the categories {_shown(unknown)}, which the training"
            f" annotations {training} do not list{also}. Give the same names to the categories of"
            " both, or remove these objects."
        )
    return dataset if classes == dataset.classes else _reordered(dataset, classes)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def _reordered(dataset: DetectionDataset, classes: list[str]) -> DetectionDataset:
    """`dataset` with `classes`, which have all names that its objects have."""
    numbers = dict(zip(dataset.classes, dataset.category_ids))
    new = count_from(max(numbers.values()) + 1)
    label = {name: i for i, name in enumerate(classes)}
    images = []
    for image in dataset.images:
        moved = (replace(i, label=label[dataset.classes[i.label]]) for i in image.instances)
        images.append(replace(image, instances=tuple(moved)))
    ids = [numbers[name] if name in numbers else next(new) for name in classes]
    return replace(dataset, images=images, classes=classes, category_ids=ids)


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
