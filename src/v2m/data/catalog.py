"""The data sets that have a name, and `load_dataset`, which takes a name or a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from v2m.data import fashion_mnist
from v2m.data.datasets import FileDataset, ImageDataset
from v2m.data.fashion_mnist import BUNDLED_DIRECTORY, FULL, SMALL, IdxSet
from v2m.data.folders import SPLIT_FOLDERS, class_difference, class_names, find_splits, read_folder
from v2m.data.hugging_face import read_hugging_face
from v2m.data.shards import find_shards, read_shards
from v2m.data.splits import carve
from v2m.errors import InputError

__all__ = ["SPLITS", "DatasetInfo", "describe", "load_dataset"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One row of `v2m data`.

    Attributes:
        images: {"train": n, "test": n}; the validation images are kept aside from the training
            images.
        image_size: (C, H, W).
        location: the folder it lies in, None if it is not on this machine.
        bundled: whether it is part of the package.
        hint: how to get it.
    """

    name: str
    images: dict[str, int]
    classes: tuple[str, ...]
    image_size: tuple[int, int, int]
    location: Path | None
    bundled: bool
    licence: str
    hint: str


def describe() -> list[DatasetInfo]:
    """What `load_dataset` knows by name, installed or not."""
    rows = (
        (SMALL, BUNDLED_DIRECTORY, "part of v2m"),
        (FULL, fashion_mnist.locate(), f"v2m data download {FULL.name}"),
    )
    return [
        DatasetInfo(
            name=dataset.name,
            images=dict(dataset.counts),
            classes=fashion_mnist.CLASSES,
            image_size=(1, 28, 28),
            location=location,
            bundled=dataset is SMALL,
            licence="MIT, (c) 2017 Zalando SE",
            hint=hint,
        )
        for dataset, location, hint in rows
    ]


def load_dataset(
    name_or_path: str | os.PathLike,
    split: str = "train",
    *,
    on_error: str = "raise",
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> ImageDataset:
    """A split of a data set that `describe()` lists, of a folder of images, of a folder of tar
    shards (`wds:FOLDER`, see `v2m.data.shards`) or of a Hugging Face data set on the disk
    (`hfds:FOLDER`).

    A folder has one subfolder per class, below train/ and, each if there is one, validation/ (or
    val/) and test/; without train/ it is split as a whole. What is missing is kept aside from the
    training images, of each class `validation_fraction`, chosen by `seed` and file name: validation
    always, test if there is no folder for validation either. With train/ and val/ alone (ImageNet)
    the test split is val/.

    Args:
        split: "train", "validation" or "test".
        on_error: what loaders do with an unreadable image: "raise" BadImageError, or "skip" and
            count it.
        validation_fraction: 0 trains on everything; there is then no validation split to load.
        seed: of the choice of validation images.

    Raises:
        InputError: for an unknown name, a missing or empty folder, an empty class, splits with
            different classes, or a damaged file of a named set.
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error must be raise or skip; got {on_error!r}.")
    if not 0 <= validation_fraction < 1:
        raise InputError(
            f"validation_fraction must be at least 0 and below 1; got {validation_fraction}."
        )
    name = os.fspath(name_or_path)
    for dataset in (SMALL, FULL):
        if name == dataset.name:
            return _load_idx(dataset, split, validation_fraction, seed)
    kind, colon, rest = name.partition(":")
    if colon and kind in _PREFIXED:
        parts = _PREFIXED[kind](Path(rest), on_error)
        return _load_parts(parts, name, split, validation_fraction, seed)
    if not os.path.exists(name) and os.sep not in name:
        raise InputError(
            f"{name!r} is neither a data set ({SMALL.name}, {FULL.name}) nor a folder, wds:FOLDER "
            "or hfds:FOLDER. `v2m data` lists what there is."
        )
    return _load_folder(Path(name), split, on_error, validation_fraction, seed)


def _load_idx(dataset: IdxSet, split: str, fraction: float, seed: int) -> ImageDataset:
    directory = BUNDLED_DIRECTORY if dataset is SMALL else fashion_mnist.require()
    if split == "test":
        return fashion_mnist.read_part(dataset, directory, "test")
    images = fashion_mnist.read_part(dataset, directory, "train")
    return _carved(images, ("validation",), split, fraction, seed)


def _load_folder(
    directory: Path, split: str, on_error: str, fraction: float, seed: int
) -> ImageDataset:
    folders = _with_test(find_splits(directory) or {"train": directory})
    name = directory.resolve().name or str(directory)
    if split != "train" and split in folders:
        dataset = read_folder(folders[split], name=name, on_error=on_error)
        if "train" in folders:
            _check_classes(dataset, folders["train"])
        return dataset
    if "train" not in folders:
        found = sorted({path.name for path in folders.values()})
        raise InputError(
            f"{directory} has {'/, '.join(found)}/ but no train/, so there are no {split} images."
        )
    training = read_folder(folders["train"], name=name, on_error=on_error)
    missing = [part for part in ("validation", "test") if part not in folders]
    return _carved(training, missing, split, fraction, seed)


def _with_test(parts: dict[str, Any]) -> dict[str, Any]:
    """Where there are validation images but none for the test (ImageNet), they are it."""
    if "validation" in parts:
        parts.setdefault("test", parts["validation"])
    return parts


def _load_parts(
    parts: dict[str, Callable[[], ImageDataset]],
    source: str,
    split: str,
    fraction: float,
    seed: int,
) -> ImageDataset:
    """`split` out of the parts there are, kept aside from the training images if need be."""
    parts = _with_test(parts)
    if split != "train" and split in parts:
        return parts[split]()
    if "train" not in parts:
        raise InputError(f"{source} has {', '.join(parts)} but no train, so no {split} images.")
    missing = [part for part in ("validation", "test") if part not in parts]
    return _carved(parts["train"](), missing, split, fraction, seed)


def _shards(folder: Path, on_error: str) -> dict[str, Callable[[], ImageDataset]]:
    return {
        split: partial(read_shards, folder, shards, on_error=on_error)
        for split, shards in find_shards(folder).items()
    }


def _hugging_face(folder: Path, on_error: str) -> dict[str, Callable[[], ImageDataset]]:
    splits = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
    found = read_hugging_face(folder, on_error)
    unknown = [name for name in found if name not in splits]
    if unknown:
        raise InputError(
            f"hfds:{folder} has a split {unknown[0]!r}: expected train, validation or test."
        )
    return {splits[name]: partial(lambda part: part, part) for name, part in found.items()}


_PREFIXED = {"wds": _shards, "hfds": _hugging_face}


def _check_classes(dataset: FileDataset, training: Path) -> None:
    difference = class_difference(class_names(training), dataset.classes)
    if difference:
        raise InputError(
            f"the classes of {dataset.root} differ from those of {training}: it {difference}. "
            "Every split needs the same class folders."
        )


def _carved(
    images: ImageDataset, missing: Sequence[str], split: str, fraction: float, seed: int
) -> ImageDataset:
    """`split` of training images that the `missing` splits are kept aside from."""
    parts = carve(images, [fraction] * len(missing), seed)
    dataset = dict(zip((*missing, "train"), parts))[split]
    if len(dataset) == 0:
        raise InputError(
            f"{images.name} has no {split} images: with validation_fraction 0 none are kept aside "
            "from the training images. Give a fraction above 0, or a folder of its own."
        )
    return dataset
