"""Folders of images, one subfolder per class (torchvision's ImageFolder layout)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from v2m.data.datasets import FileDataset
from v2m.data.images import IMAGE_SUFFIXES
from v2m.errors import InputError

__all__ = ["SPLIT_FOLDERS", "find_splits", "read_folder"]

# The folder names that stand for each split, in order of preference.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


def find_splits(directory: Path) -> dict[str, Path]:
    """{split: folder} of the split folders in `directory`; {} if there is no train/."""
    if not directory.exists():
        raise InputError(
            f"the folder {directory} does not exist. Give a folder with one subfolder of images "
            "per "
            "class, or a name that `v2m data` lists."
        )
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder: expected one with a subfolder per class.")
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        existing = [directory / name for name in names if (directory / name).is_dir()]
        if len(existing) > 1:
            raise InputError(
                f"{directory} has both {existing[0].name}/ and {existing[1].name}/: keep one of "
                "them."
            )
        if existing:
            found[split] = existing[0]
    return found if "train" in found else {}


def read_folder(directory: Path, *, name: str, on_error: str = "raise") -> FileDataset:
    """The images below DIRECTORY/<class>/, at any depth; classes and files sorted by name.

    Hidden files and folders are left out. Links are followed, no folder twice.
    """
    classes = sorted(
        entry.name for entry in _entries(directory) if entry.is_dir() and _visible(entry.name)
    )
    if not classes:
        loose = any(_is_image(entry.name) for entry in _entries(directory))
        raise InputError(
            f"{directory} has no class folders{', only loose images' if loose else ''}: put the "
            "images "
            "of each class into a subfolder named after it."
        )
    paths, targets, empty = [], [], []
    for target, class_name in enumerate(classes):
        files = sorted(_images(directory / class_name, class_name))
        if not files:
            empty.append(class_name)
        paths += files
        targets += [target] * len(files)
    if not paths:
        raise InputError(
            f"{directory} has no images in its {len(classes)} subfolders "
            f"({', '.join(IMAGE_SUFFIXES)})."
        )
    if empty:
        raise InputError(
            f"{directory} has no images of class {', '.join(map(repr, empty))}: add some or remove "
            "the "
            "folder."
        )
    return FileDataset(
        name=name, root=directory, paths=paths, targets=targets, classes=classes, on_error=on_error
    )


def check_same_classes(train: FileDataset, other: FileDataset) -> None:
    """InputError unless both have the same classes."""
    extra = sorted(set(other.classes) - set(train.classes))
    missing = sorted(set(train.classes) - set(other.classes))
    if extra or missing:
        parts = [f"{kind} {', '.join(n)}" for kind, n in (("lacks", missing), ("adds", extra)) if n]
        raise InputError(
            f"the classes of {other.root} differ from those of {train.root}: it "
            f"{' and '.join(parts)}. "
            "Every split needs the same class folders."
        )


def _images(folder: Path, relative: str) -> Iterator[str]:
    """Paths of the images below `folder`, posix style, beginning with `relative`."""
    waiting, seen = [(folder, relative)], set()
    while waiting:
        folder, relative = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(folder):
            if not _visible(entry.name):
                continue
            if entry.is_dir():
                waiting.append((Path(entry.path), f"{relative}/{entry.name}"))
            elif _is_image(entry.name):
                yield f"{relative}/{entry.name}"


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}.") from error


def _visible(name: str) -> bool:
    return not name.startswith(".")


def _is_image(name: str) -> bool:
    return _visible(name) and name.lower().endswith(IMAGE_SUFFIXES)
