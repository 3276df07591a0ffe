"""Folders of images, one subfolder per class (torchvision's ImageFolder layout)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from v2m.data.datasets import FileDataset
from v2m.data.images import IMAGE_SUFFIXES
from v2m.errors import InputError

__all__ = [
    "SPLIT_FOLDERS",
    "class_difference",
    "class_names",
    "find_splits",
    "image_paths",
    "loose_images",
    "read_folder",
]

# The folder names that stand for each split, in order of preference.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


def find_splits(directory: Path) -> dict[str, Path]:
    """{split: folder} of the split folders in `directory`; {} if it is to be split as a whole.

    A folder named like a split counts as one if it has folders in it; one with images right inside
    is a class that happens to have that name.
    """
    if not directory.exists():
        raise InputError(
            f"the folder {directory} does not exist. Give a folder with one subfolder of images "
            "per class, or a name that `v2m data` lists."
        )
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder: expected one with a subfolder per class.")
    found = {}
    for split, names in SPLIT_FOLDERS.items():
        paths = [directory / name for name in names]
        existing = [path for path in paths if path.is_dir() and class_names(path)]
        if len(existing) > 1:
            raise InputError(
                f"{directory} has both {existing[0].name}/ and {existing[1].name}/: keep one of "
                "them."
            )
        if existing:
            found[split] = existing[0]
    return found


def class_names(directory: Path) -> list[str]:
    """The names of the visible folders in `directory`, sorted."""
    return [entry.name for entry in _entries(directory) if _is_folder(entry)]


def loose_images(directory: Path) -> list[str]:
    """The names of the images right in `directory`, which belong to no class, sorted."""
    entries = _entries(directory)
    return sorted(e.name for e in entries if not _is_folder(e) and _is_image(e.name))


def image_paths(directory: Path, class_name: str) -> list[str]:
    """Paths, posix style and relative to `directory`, of the images of a class, sorted."""
    return sorted(_images(directory / class_name, class_name))


def read_folder(directory: Path, *, name: str, on_error: str = "raise") -> FileDataset:
    """The images below DIRECTORY/<class>/, at any depth; classes and files sorted by name.

    Hidden files and folders are left out. Links are followed, no folder twice.
    """
    classes = class_names(directory)
    if not classes:
        loose = loose_images(directory)
        raise InputError(
            f"{directory} has no class folders{', only loose images' if loose else ''}: put the "
            "images of each class into a subfolder named after it."
        )
    files = [image_paths(directory, class_name) for class_name in classes]
    if not any(files):
        raise InputError(
            f"{directory} has no images in its {len(classes)} subfolders (looked for "
            f"{', '.join(IMAGE_SUFFIXES)})."
        )
    empty = [class_name for class_name, found in zip(classes, files) if not found]
    if empty:
        raise InputError(
            f"{directory} has no images of class {', '.join(map(repr, empty))}: add some or remove "
            "the folder."
        )
    return FileDataset(
        name=name,
        root=directory,
        paths=[path for found in files for path in found],
        targets=[target for target, found in enumerate(files) for _ in found],
        classes=classes,
        on_error=on_error,
    )


def class_difference(expected: Sequence[str], got: Sequence[str]) -> str | None:
    """How the classes `got` differ from those `expected`, in words; None if they do not."""
    missing, extra = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    parts = [f"{verb} {', '.join(n)}" for verb, n in (("lacks", missing), ("adds", extra)) if n]
    return " and ".join(parts) or None


def _images(folder: Path, relative: str) -> Iterator[str]:
    """Paths of the images below `folder`, each beginning with `relative`."""
    waiting, seen = [(folder, relative)], set()
    while waiting:
        folder, relative = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:  # a loop of links
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in _entries(folder):
            if _is_folder(entry):
                waiting.append((Path(entry.path), f"{relative}/{entry.name}"))
            elif _is_image(entry.name):
                yield f"{relative}/{entry.name}"


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be read: {error.strerror}.") from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return not entry.name.startswith(".") and entry.is_dir()
    except OSError:  # a link to itself, say: not a folder, and reading it as an image says why
        return False


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
