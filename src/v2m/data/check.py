"""Reading every image of a folder before training on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from v2m.data.folders import class_difference, class_names, find_splits, image_paths, loose_images
from v2m.data.images import BadImageError, load_image

__all__ = ["FolderReport", "check_folder"]

_IMAGES_AT_ONCE = 4096  # bounds the memory of the queue, not of the images


@dataclass
class FolderReport:
    """What `check_folder` found.

    Attributes:
        images: {split: {class: number of images}}; the one split of a folder without split folders
            is called "all".
        problems: empty classes, images of no class, classes that differ between splits: one
            sentence each.
        bad: one sentence for each image that cannot be read, naming it.
    """

    images: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def check_folder(
    directory: str | os.PathLike, progress: Callable[[int, int], None] | None = None
) -> FolderReport:
    """Read every image of a folder as `load_dataset` would, and report all that is wrong with it.

    Args:
        progress: called with (images read, images in all).

    Raises:
        InputError: if there is no such folder, or a folder in it cannot be listed.
    """
    directory = Path(directory)
    splits = find_splits(directory) or {"all": directory}
    report, paths = FolderReport(), []
    for split, folder in splits.items():
        found = {name: image_paths(folder, name) for name in class_names(folder)}
        report.images[split] = {name: len(files) for name, files in found.items()}
        paths += [folder / path for files in found.values() for path in files]
        if loose := loose_images(folder):
            report.problems.append(
                f"{folder} has images outside of the class folders ({len(loose)}), which no one"
                f" will see: {', '.join(loose[:3])}{', ...' * (len(loose) > 3)}."
            )
        if not found:
            report.problems.append(f"{folder} has no class folders.")
        report.problems += [
            f"{folder / name} has no images: class {name!r} is empty."
            for name, files in found.items()
            if not files
        ]
        difference = class_difference(list(report.images.get("train", found)), list(found))
        if difference:
            report.problems.append(f"{folder} {difference}, compared with {splits['train']}.")
    report.bad = _read_all(paths, progress or (lambda done, total: None))
    return report


def _read_all(paths: list[Path], progress: Callable[[int, int], None]) -> list[str]:
    """One sentence for each file that is not a readable image."""
    reasons, done, waiting = [], 0, iter(paths)
    progress(0, len(paths))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while group := list(islice(waiting, _IMAGES_AT_ONCE)):
            for reason in pool.map(_reason, group):
                done += 1
                progress(done, len(paths))
                if reason:
                    reasons.append(reason)
    return reasons


def _reason(path: Path) -> str | None:
    try:
        load_image(path)
    except BadImageError as error:
        return str(error)
    return None
