"""COCO's JSON: images, annotations with boxes and masks, categories."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from v2m.data.annotations import (
    AnnotatedImage,
    DetectionDataset,
    Instance,
    Problems,
    check_box,
    is_number,
    mask_api,
)
from v2m.errors import InputError

__all__ = ["coco_classes", "read_coco"]

Refuse = Callable[[str], None]

LONGEST_SIDE = 2**31 - 1  # of an image, pixels
# {file and its state: classes} of the files read so far; COCO's own take seconds and gigabytes
_known_classes: dict[tuple[Path, int, int], list[str]] = {}


def read_coco(
    path: Path, folder: Path, *, name: str, on_error: str = "raise", split: str = ""
) -> DetectionDataset:
    """The data set of a COCO file whose images are in `folder`.

    Every object needs a "bbox"; masks ("segmentation": polygons, or run lengths, compressed or
    not) are read if all objects have one.

    Args:
        on_error: "raise" an error that names all bad entries, or "skip" them (`problems` of the
            data set then names them).

    Raises:
        InputError: no such file, or not COCO's JSON.
        BadAnnotationError: entries that cannot be used.
    """
    content = _load(path)
    problems = Problems()
    categories = _categories(content["categories"], path, problems)
    classes = list(categories.values())
    _known_classes[_state(path)] = list(classes)
    labels = {number: label for label, number in enumerate(categories)}
    images = _images(content["images"], path, folder, problems)
    unmasked = [
        i
        for i, a in enumerate(content["annotations"])
        if not (isinstance(a, dict) and a.get("segmentation"))
    ]
    with_masks = bool(content["annotations"]) and not unmasked
    found: dict[Any, list[Instance]] = {number: [] for number in images}
    listed = {_key(entry.get("id")) for entry in content["images"] if isinstance(entry, dict)}
    for position, entry in enumerate(content["annotations"]):
        number = entry.get("id", "none") if isinstance(entry, dict) else "none"
        where = f"{path}, annotations[{position}] (id {number})"

        def refuse(reason: str, where: str = where) -> None:
            problems.add(where, reason)

        if not isinstance(entry, dict):
            refuse("it is no JSON object")
        elif _key(entry.get("image_id")) not in listed:
            refuse(f"its image_id {entry.get('image_id')!r} is not among the images")
        elif _key(entry.get("category_id")) not in labels:
            refuse(f"its category_id {entry.get('category_id')!r} is not among the categories")
        elif entry["image_id"] in images:  # else its image was refused already
            image = images[entry["image_id"]]
            instance = _instance(entry, image, labels[entry["category_id"]], with_masks, refuse)
            if instance is not None:
                found[entry["image_id"]].append(replace(instance, entry=where))
    problems.settle(on_error)
    left_out = list(problems)
    if 0 < len(unmasked) < len(content["annotations"]):
        left_out.append(
            f"masks: {len(unmasked)} of {len(content['annotations'])} objects of {path} have none, "
            f"the first of them annotations[{unmasked[0]}]"
        )
    return DetectionDataset(
        name=name,
        root=folder,
        images=[replace(images[n], instances=tuple(found[n])) for n in images],
        classes=classes,
        category_ids=list(categories),
        has_masks=with_masks,
        on_error=on_error,
        problems=left_out,
        split=split,
    )


def coco_classes(path: Path) -> list[str]:
    """The classes that `read_coco` gives for a file, which is not read again if it has been.

    Raises:
        InputError: not COCO's JSON, or no categories.
    """
    if _state(path) not in _known_classes:
        categories = _categories(_load(path)["categories"], path, Problems())
        _known_classes[_state(path)] = list(categories.values())
    return list(_known_classes[_state(path)])


def _state(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path.resolve(), status.st_mtime_ns, status.st_size


def _load(path: Path) -> dict[str, list]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(
                f'{path} is not COCO\'s JSON: expected an object with lists "images",'
                f' "annotations" and "categories"; {key!r} is missing or no list.'
            )
    return content


def _key(value: Any) -> Any:
    """Identifiers are numbers or text; anything else matches nothing."""
    return value if isinstance(value, int | str) else None


def _categories(entries: list, path: Path, problems: Problems) -> dict[Any, str]:
    """{id: name}, by id."""
    found: dict[Any, str] = {}
    for position, entry in enumerate(entries):
        where = f"{path}, categories[{position}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
            problems.add(where, "it has no whole number as id")
        elif not isinstance(entry.get("name"), str) or not entry["name"]:
            problems.add(where, "it has no name")
        elif entry["id"] in found or entry["name"] in found.values():
            problems.add(where, f"id {entry['id']} or name {entry['name']!r} is there twice")
        else:
            found[entry["id"]] = entry["name"]
    if not found:
        raise InputError(f"{path} has no categories: there is nothing to learn.")
    return dict(sorted(found.items()))


def _images(
    entries: list, path: Path, folder: Path, problems: Problems
) -> dict[Any, AnnotatedImage]:
    """{id: image without objects}, in the file's order."""
    found: dict[Any, AnnotatedImage] = {}
    for position, entry in enumerate(entries):
        entry = entry if isinstance(entry, dict) else {}
        where = f"{path}, images[{position}] (id {entry.get('id', 'none')})"
        name, size = entry.get("file_name"), (entry.get("height"), entry.get("width"))
        if _key(entry.get("id")) is None:
            problems.add(where, "it has no id")
        elif entry["id"] in found:
            problems.add(where, "its id is there twice")
        elif not isinstance(name, str) or not name:
            problems.add(where, "it has no file_name")
        elif not all(isinstance(side, int) and 0 < side <= LONGEST_SIDE for side in size):
            problems.add(where, f"its height and width are {size[0]!r} and {size[1]!r}")
        elif not (folder / name).is_file():
            problems.add(where, f"the file {folder / name} is missing")
        else:
            found[entry["id"]] = AnnotatedImage(path=name, height=size[0], width=size[1])
    if not found:
        problems.settle("raise")
        raise InputError(f"{path} lists no images.")
    return found


def _instance(
    entry: dict, image: AnnotatedImage, label: int, with_masks: bool, refuse: Refuse
) -> Instance | None:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        refuse(f"its bbox is {box!r}, not [left, top, width, height]")
        return None
    left, top, width, height = box
    try:
        corners = (left, top, left + width, top + height)
    except (TypeError, OverflowError):
        corners = box
    checked = check_box(corners, image.height, image.width, refuse)
    if checked is None:
        return None
    area = float((checked[2] - checked[0]) * (checked[3] - checked[1]))
    mask = None
    if with_masks:
        mask = _mask(entry["segmentation"], image, refuse)
        if mask is None:
            return None
        area = float(mask_api().area([mask])[0])
        if area == 0:
            refuse("its mask is empty")
            return None
    given = entry.get("area")
    if is_number(given) and given > 0:
        area = float(given)
    crowd = bool(entry.get("iscrowd", 0))
    return Instance(box=checked, label=label, crowd=crowd, mask=mask, area=area)


def _mask(segmentation: Any, image: AnnotatedImage, refuse: Refuse) -> dict[str, Any] | None:
    """The object's run-length mask, of polygons or run lengths."""
    api, size = mask_api(), [image.height, image.width]
    try:
        if isinstance(segmentation, list):
            polygons = [[float(v) for v in polygon] for polygon in segmentation]
            if any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
                refuse("a polygon of its mask has not at least three corners of x and y")
                return None
            return api.merge(api.frPyObjects(polygons, *size))
        if list(segmentation["size"]) != size:
            refuse(
                f"its mask has height and width {list(segmentation['size'])}, and the image {size}"
            )
            return None
        counts = segmentation["counts"]
        lengths = counts if isinstance(counts, list) else _run_lengths(counts)
        if fault := _fault(lengths, size[0] * size[1]):
            refuse(f"the run lengths of its mask {fault}")
            return None
        if isinstance(counts, list):
            return api.frPyObjects(segmentation, *size)
        return {"size": size, "counts": counts}
    except (TypeError, KeyError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        refuse(f"its segmentation cannot be read ({type(error).__name__}: {error})")
        return None


def _fault(lengths: list[Any], pixels: int) -> str | None:
    if not all(type(length) is int and length >= 0 for length in lengths):
        return "are not all whole numbers from 0"
    total = sum(lengths)
    return None if total == pixels else f"add up to {total}, not to the image's {pixels} pixels"


def _run_lengths(text: str) -> list[int]:
    """COCO's compressed run lengths as numbers.

    Each character holds five bits and whether more follow, the lowest first; from the fourth
    number on it is the difference from the one two before.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"counts must be text or a list of numbers, got {text!r}")
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - ord("0")
        if not 0 <= code < 64:
            raise ValueError(f"counts have the character {character!r}")
        value |= (code & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("counts have a number of more than 60 bits")
        if code & 32:
            continue
        if code & 16:  # negative
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("counts end within a number")
    return lengths
