"""Detect objects, or name each pixel, with a trained model: `v2m predict` for dense tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from v2m.data.images import BadImageError, load_image
from v2m.drawing import draw_classes, draw_detections, palette
from v2m.engine.distributed import Ranks, choose_device
from v2m.errors import InputError
from v2m.evaluation.dense_run import stored_inference
from v2m.evaluation.detection import MASK_THRESHOLD, coco_rows
from v2m.evaluation.segmentation import segment
from v2m.heads import Detector, from_directory
from v2m.predict import REMEDY

__all__ = ["DensePredictor", "predict_to_folder"]

DETECTIONS, MAPS, DRAWN = "detections.json", "maps.json", "_drawn"


class DensePredictor:
    """A stored detector or segmenter with its preprocessing and class names.

    Args:
        folder: what training wrote.
        device: "cpu", "cuda", "mps", or "auto".
    """

    def __init__(self, folder: str | os.PathLike, *, device: str = "auto"):
        self.model = from_directory(folder).to(choose_device(device, Ranks()))
        self.device = next(self.model.parameters()).device
        names = self.model.pretrained_cfg.get("label_names")
        self.label_names = names or [f"class {i}" for i in range(self.model.num_classes)]
        self.detects = isinstance(self.model, Detector)
        self.inference = None if self.detects else stored_inference(folder)
        self.colors = palette(self.model.num_classes)

    def _tensor(self, image: Image.Image) -> Tensor:
        """(C, H, W) in [0, 1] on the device."""
        return F.to_dtype(F.to_image(image), torch.float32, scale=True).to(self.device)

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> dict[str, Tensor]:
        """Boxes, labels, scores and masks of one image, on the CPU; see `v2m.heads.Detector`."""
        (found,) = self.model([self._tensor(image)])
        return {key: value.cpu() for key, value in found.items()}

    @torch.inference_mode()
    def classes(self, image: Image.Image) -> np.ndarray:
        """(H, W) uint8 class of each pixel of one image."""
        cfg = self.model.pretrained_cfg
        tensor = F.normalize(self._tensor(image), list(cfg["mean"]), list(cfg["std"]))
        return segment(self.model, tensor, self.inference).argmax(0).byte().cpu().numpy()

    def draw_detections(
        self, image: Image.Image, found: dict[str, Tensor], *, score: float
    ) -> Image.Image:
        """The image with the boxes, masks and names of what has at least that score."""
        kept = found["scores"] >= score
        masks = None
        if "masks" in found:
            masks = (found["masks"][kept, 0] >= MASK_THRESHOLD).numpy()
        return draw_detections(
            image,
            found["boxes"][kept].tolist(),
            found["labels"][kept].tolist(),
            found["scores"][kept].tolist(),
            masks=masks,
            names=self.label_names,
        )

    def draw_classes(self, image: Image.Image, classes: np.ndarray) -> Image.Image:
        """The image under the colours of its classes."""
        return draw_classes(image, classes, self.colors)


def predict_to_folder(
    predictor: DensePredictor,
    paths: Iterable[Path],
    output: Path,
    *,
    score: float = 0.5,
    skipped: list[tuple[Path, str]] | None = None,
) -> Iterator[Path]:
    """Write what a model finds on images, one after the other; yields the files drawn.

    A detector writes OUTPUT/detections.json, COCO's JSON of images, categories (the model's
    classes, numbered from 1) and annotations (all scores), and a picture an image with what has at
    least `score`. A segmenter writes OUTPUT/NAME.png with the number of each pixel's class, and
    OUTPUT/NAME_drawn.png; OUTPUT/maps.json has the names of the classes, and which map is whose.

    Args:
        skipped: receives (path, reason) of each image that cannot be read; without it, such an
            image is an error.

    Raises:
        InputError: an image cannot be read, or the folder not be written, or it holds the images.
    """
    paths = list(paths)
    if overwritten := [path for path in paths if path.resolve().parent == output.resolve()]:
        raise InputError(
            f"{output} holds {overwritten[0].name}, one of the images to predict, and results with"
            " such names would replace it: give another folder with --output."
        )
    names = _Names()
    content: dict[str, list[Any]] = {"images": [], "classes": predictor.label_names}
    if predictor.detects:
        categories = [{"id": i, "name": name} for i, name in enumerate(predictor.label_names, 1)]
        content = {"images": [], "annotations": [], "categories": categories}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for path in paths:
            try:
                image = load_image(path, predictor.model.config.in_chans)
                result = predictor.detect(image) if predictor.detects else predictor.classes(image)
            except InputError as error:
                reason = str(error) if isinstance(error, BadImageError) else f"{path}: {error}"
                if skipped is None:
                    raise BadImageError(f"{reason} {REMEDY}") from error
                skipped.append((path, reason))
                continue
            name = names.of(path)
            if predictor.detects:
                target = output / f"{name}.png"
                yield _detected(predictor, image, result, path, target, score, content)
            else:
                drawn = _named(predictor, image, result, output, name)
                files = {"map": f"{name}.png", "drawn": drawn.name}
                content["images"].append({"file_name": str(path), **files})
                yield drawn
        summary = output / (DETECTIONS if predictor.detects else MAPS)
        summary.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error}.") from error


class _Names:
    """A name of its own for the results of each image."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def of(self, path: Path) -> str:
        name, number = path.stem, 1
        while {name, name + DRAWN} & self.taken:
            number += 1
            name = f"{path.stem}-{number}"
        self.taken |= {name, name + DRAWN}
        return name


def _detected(
    predictor: DensePredictor,
    image: Image.Image,
    found: dict[str, Tensor],
    path: Path,
    target: Path,
    score: float,
    content: dict[str, list[Any]],
) -> Path:
    number = len(content["images"]) + 1
    size = {"height": image.height, "width": image.width}
    content["images"].append({"id": number, "file_name": str(path), **size})
    ids = [category["id"] for category in content["categories"]]
    for row in coco_rows(found, number, ids):
        content["annotations"].append({"id": len(content["annotations"]) + 1, **row})
    predictor.draw_detections(image, found, score=score).save(target)
    return target


def _named(
    predictor: DensePredictor, image: Image.Image, classes: np.ndarray, output: Path, name: str
) -> Path:
    Image.fromarray(classes).save(output / f"{name}.png")
    target = output / f"{name}{DRAWN}.png"
    predictor.draw_classes(image, classes).save(target)
    return target
