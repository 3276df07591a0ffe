"""Pascal VOC's XML: one file of boxes an image."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from v2m.data.annotations import (
    AnnotatedImage,
    DetectionDataset,
    Instance,
    Problems,
    check_box,
)
from v2m.data.text import read_text
from v2m.errors import InputError

__all__ = ["read_voc", "voc_list"]

VOC_SPLITS = {
    "train": ("train", "trainval"),
    "validation": ("val", "validation"),
    "test": ("test",),
}
SUFFIXES = (".jpg", ".jpeg", ".png")


def read_voc(
    root: Path, split: str | None, *, name: str, on_error: str = "raise"
) -> DetectionDataset:
    """Boxes of ROOT/Annotations/*.xml for ROOT/JPEGImages/*.

    VOC counts pixels from 1 and boxes include their last pixel: xmin..xmax becomes xmin - 1..xmax.
    Objects marked difficult become crowds: neither trained on nor counted. Classes are the names
    found in all files, sorted.

    Args:
        split: "train", "validation" or "test", listed in ROOT/ImageSets/Main/{train,val,test}.txt;
            None for all files. Without train.txt, what trainval.txt lists, or else all files, are
            for training, but for those that val.txt and test.txt list.

    Raises:
        InputError: folders missing or a split that is not listed.
        BadAnnotationError: entries that cannot be used, with `on_error` = "raise".
    """
    folder, pictures = root / "Annotations", root / "JPEGImages"
    files = {path.stem: path for path in sorted(folder.glob("*.xml"))}
    if not files or not pictures.is_dir():
        raise InputError(
            f"{root} is not Pascal VOC's layout: expected Annotations/*.xml and JPEGImages/."
        )
    problems = Problems()
    wanted = _wanted(root, split, list(files))
    trees = {stem: _parse(files[stem], problems) for stem in files}
    objects = (o for tree in trees.values() if tree is not None for o in tree.iter("object"))
    classes = sorted({text for o in objects if (text := _text(o, "name"))})
    if not classes:
        raise InputError(f"{folder} has no named objects: there is nothing to learn.")
    images = []
    for stem in wanted:
        if stem not in files:
            problems.add(f"{root}, image {stem} of {split}", f"{folder / stem}.xml is missing")
        elif (tree := trees[stem]) is not None:
            image = _image(tree, files[stem], pictures, classes, problems)
            images += [image] if image else []
    problems.settle(on_error)
    if not images:
        raise InputError(f"{root} has no usable image.")
    return DetectionDataset(
        name=name,
        root=pictures,
        images=images,
        classes=classes,
        category_ids=list(range(1, len(classes) + 1)),
        has_masks=False,
        on_error=on_error,
        problems=list(problems),
        split=split or "",
    )


def voc_list(root: Path, split: str) -> Path | None:
    """The file that lists the images of a split, if there is one."""
    paths = (root / "ImageSets" / "Main" / f"{name}.txt" for name in VOC_SPLITS[split])
    return next((path for path in paths if path.is_file()), None)


def _wanted(root: Path, split: str | None, stems: list[str]) -> list[str]:
    """The names, each once, of the images of a split, of those annotated."""
    if split is None:
        return stems
    path = voc_list(root, split)
    if split == "train" and (path is None or path.stem != "train"):
        return _left_for_training(root, stems if path is None else _names(path))
    if path is None:
        raise InputError(
            f"{root} lists no {split} images in ImageSets/Main/{VOC_SPLITS[split][0]}.txt."
        )
    return _names(path)


def _left_for_training(root: Path, stems: list[str]) -> list[str]:
    lists = [path for name in ("validation", "test") if (path := voc_list(root, name))]
    held_out = {stem for path in lists for stem in _names(path)}
    left = [stem for stem in stems if stem not in held_out]
    if stems and not left:
        raise InputError(
            f"{root} has no image to train on: {' and '.join(map(str, lists))} list all"
            f" {len(stems)}. List those for training in ImageSets/Main/train.txt."
        )
    return left


def _names(path: Path) -> list[str]:
    lines = read_text(path).splitlines()
    return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


def _parse(path: Path, problems: Problems) -> ElementTree.Element | None:
    try:
        text = path.read_bytes()
        if b"<!ENTITY" in text:  # an entity bomb, or a file from elsewhere
            raise ElementTree.ParseError("it declares entities")
        return ElementTree.fromstring(text)
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        problems.add(str(path), f"it cannot be read as XML ({error})")
        return None


def _text(element: ElementTree.Element, name: str) -> str:
    return (element.findtext(name) or "").strip()


def _image(
    tree: ElementTree.Element, path: Path, pictures: Path, classes: list[str], problems: Problems
) -> AnnotatedImage | None:
    named = Path(_text(tree, "filename").replace("\\", "/")).name
    candidates = [named, *(path.stem + suffix for suffix in SUFFIXES)]
    file = next((c for c in candidates if c and (pictures / c).is_file()), None)
    if file is None:
        problems.add(str(path), f"the image {pictures / (named or path.stem)} is missing")
        return None
    try:
        height, width = (int(_text(tree, f"size/{side}")) for side in ("height", "width"))
    except ValueError:
        height = width = 0
    if height <= 0 or width <= 0:
        problems.add(str(path), "its size/height and size/width are no whole numbers above 0")
        return None
    instances = []
    for position, element in enumerate(tree.iter("object")):
        label, where = _text(element, "name"), f"{path}, object {position + 1}"
        instance = _instance(element, label, classes, (height, width), where, problems)
        instances += [instance] if instance else []
    return AnnotatedImage(path=file, height=height, width=width, instances=tuple(instances))


def _instance(
    element: ElementTree.Element,
    label: str,
    classes: list[str],
    size: tuple[int, int],
    where: str,
    problems: Problems,
) -> Instance | None:
    if label not in classes:
        problems.add(where, "it has no name")
        return None
    texts = [_text(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = map(float, texts)
    except ValueError:
        problems.add(where, f"its bndbox is {texts}, not four numbers")
        return None
    box = check_box(
        (left - 1, top - 1, right, bottom), *size, lambda reason: problems.add(where, reason)
    )
    if box is None:
        return None
    area = (box[2] - box[0]) * (box[3] - box[1])
    difficult = _text(element, "difficult") == "1"
    return Instance(box=box, label=classes.index(label), crowd=difficult, area=area, entry=where)
