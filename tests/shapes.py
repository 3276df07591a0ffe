"""Pictures of discs and squares with exact masks, in the layouts of COCO, VOC and ADE20K."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASSES = ("disc", "square")
COLORS = ((200, 40, 40), (40, 80, 210))


def draw(
    seed: int, size: int = 64, objects: int = 2
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """An image (size, size, 3) and its objects: (class, mask (size, size) of bool), apart."""
    random = np.random.default_rng(seed)
    image = random.integers(90, 130, (size, size, 3)).astype(np.uint8)
    rows, columns = np.mgrid[:size, :size]
    taken, found = np.zeros((size, size), bool), []
    while len(found) < objects:
        radius = int(random.integers(size // 8, size // 5))
        row, column = random.integers(radius + 1, size - radius - 1, 2)
        label = int(random.integers(2))
        distance = np.stack([np.abs(rows - row), np.abs(columns - column)])
        norm = np.hypot(*distance) if label == 0 else distance.max(0)
        mask = norm <= radius
        if (taken & (distance.max(0) <= radius + 3)).any():
            continue
        taken |= mask
        image[mask] = COLORS[label]
        found.append((label, mask))
    return image, found


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """left, top, right, bottom; the last two outside."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed run lengths: column by column, beginning with zeros."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(np.int8)])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}


def coco_content(images: int, size: int = 64, first_seed: int = 0) -> tuple[dict, list[np.ndarray]]:
    """COCO's JSON and the pictures."""
    content: dict = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 3 + 4 * i, "name": name} for i, name in enumerate(CLASSES)]
    pictures = []
    for number in range(images):
        picture, objects = draw(first_seed + number, size)
        pictures.append(picture)
        name = f"{number:03d}.png"
        content["images"].append(
            {"id": 10 + number, "file_name": name, "height": size, "width": size}
        )
        for label, mask in objects:
            left, top, right, bottom = box_of(mask)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 + number,
                    "category_id": 3 + 4 * label,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": run_lengths(mask),
                }
            )
    return content, pictures


def write_coco(
    root: Path, images: int, size: int = 64, splits: tuple[str, ...] = ("train", "val")
) -> Path:
    """COCO's layout; every split has the same pictures."""
    content, pictures = coco_content(images, size)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in splits:
        (root / split).mkdir(exist_ok=True)
        for entry, picture in zip(content["images"], pictures):
            Image.fromarray(picture).save(root / split / entry["file_name"])
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return root


def write_classes(
    root: Path, images: int, size: int = 64, splits: tuple[str, ...] = ("training", "validation")
) -> Path:
    """ADE20K's layout with classes.txt; every split has the same pictures."""
    for split in splits:
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            picture, objects = draw(number, size)
            classes = np.zeros(picture.shape[:2], np.uint8)
            for label, mask in objects:
                classes[mask] = 1 + label
            Image.fromarray(picture).save(root / "images" / split / f"{number:03d}.png")
            Image.fromarray(classes).save(root / "annotations" / split / f"{number:03d}.png")
    (root / "classes.txt").write_text("background\n" + "\n".join(CLASSES) + "\n")
    return root


def write_voc(root: Path, images: int, size: int = 64) -> Path:
    """Pascal VOC's layout, all images in train.txt."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(images):
        picture, objects = draw(number, size)
        name = f"{number:03d}"
        names.append(name)
        Image.fromarray(picture).save(root / "JPEGImages" / f"{name}.png")
        parts = []
        for label, mask in objects:
            left, top, right, bottom = box_of(mask)
            parts.append(
                f"<object><name>{CLASSES[label]}</name><difficult>0</difficult><bndbox>"
                f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin>"
                f"<xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
            )
        text = (
            f"<annotation><filename>{name}.png</filename><size><width>{size}</width>"
            f"<height>{size}</height><depth>3</depth></size>{''.join(parts)}</annotation>"
        )
        (root / "Annotations" / f"{name}.xml").write_text(text)
    (root / "ImageSets" / "Main" / "train.txt").write_text("\n".join(names) + "\n")
    return root


def noisy_answers(dataset, seed: int) -> list[dict]:
    """The truth moved about, some of it missing or of another class, and inventions."""
    random, answers = np.random.default_rng(seed), []
    for index in range(len(dataset)):
        target = dataset.target(index)
        boxes, masks, labels = [], [], []
        for box, mask, label in zip(target["boxes"], target["masks"], target["labels"]):
            for _ in range(random.integers(0, 3)):
                shift = random.integers(-3, 4, 2)
                boxes.append((box + torch.tensor([*shift, *shift])).clamp(0, 64).tolist())
                masks.append(np.roll(mask.numpy(), shift[::-1], (0, 1)))
                labels.append(int(label) if random.random() < 0.85 else 1 - int(label))
        for _ in range(random.integers(0, 2)):
            left, top = random.integers(0, 50, 2)
            boxes.append([left, top, left + 10, top + 8])
            masks.append(np.zeros((64, 64), np.uint8))
            masks[-1][top : top + 8, left : left + 10] = 1
            labels.append(int(random.integers(2)))
        answers.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "scores": torch.from_numpy(random.permutation(997)[: len(boxes)] / 1000.0),
                "masks": torch.from_numpy(np.array(masks).reshape(-1, 1, 64, 64)).float(),
            }
        )
    return answers
