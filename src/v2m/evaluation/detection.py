"""COCO's average precision of boxes and masks over a whole data set, by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from v2m.data.annotations import DetectionDataset, mask_api
from v2m.errors import InputError

__all__ = ["DetectionResult", "average_precision", "coco_rows", "evaluate_detector"]

# COCO's twelve figures, in its order
FIGURES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
MASK_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class DetectionResult:
    """Figures of one evaluation, fractions of 1; None where there is no such object.

    Attributes:
        box, mask: COCO's twelve figures by name ("ap", "ap50", ...); mask is empty without masks.
        classes: {class name: {"box_ap": ..., "mask_ap": ...}}.
        rows: the detections as COCO's results, "image_id" counting images from 1 in the data
            set's order.
        images: how many were seen.
    """

    box: dict[str, float | None]
    mask: dict[str, float | None] = field(default_factory=dict)
    classes: dict[str, dict[str, float | None]]
    rows: list[dict[str, Any]]
    images: int

    def summary(self) -> dict[str, Any]:
        """The figures, ready for JSON: box_ap, box_ap50, ..., mask_ap, ..., images."""
        named = {f"box_{key}": value for key, value in self.box.items()}
        named |= {f"mask_{key}": value for key, value in self.mask.items()}
        return {**named, "images": self.images}


@torch.inference_mode()
def evaluate_detector(
    model: nn.Module,
    loader: Iterable[tuple[list[Tensor], list[tuple[int, Any]]]],
    dataset: DetectionDataset,
    *,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    on_batch: Callable[[int], None] | None = None,
    limit_batches: int | None = None,
) -> DetectionResult:
    """Run a `v2m.heads.Detector` over an evaluation loader of `dataset`.

    Args:
        loader: yields images and, for each, its index in `dataset` first in a pair.
        on_batch: called with the number of images after each batch.
        limit_batches: stop after so many; the figures are then of these images.

    Raises:
        InputError: the loader yields nothing, or faster-coco-eval is missing.
    """
    device = torch.device(device or next(model.parameters()).device)
    was_training = model.training
    model.eval()
    rows: list[dict[str, Any]] = []
    seen: list[int] = []
    try:
        for number, (images, targets) in enumerate(loader):
            if limit_batches is not None and number >= limit_batches:
                break
            with autocast():
                found = model([image.to(device, non_blocking=True) for image in images])
            for (index, _), detections in zip(targets, found):
                rows += coco_rows(detections, index + 1, dataset.category_ids)
                seen.append(index)
            if on_batch is not None:
                on_batch(len(images))
    finally:
        model.train(was_training)
    rows, seen = _from_all_ranks(rows), sorted(set(_from_all_ranks(seen)))
    if not seen:
        raise InputError("there is nothing to evaluate: the data set yields no images.")
    truth = dataset.subset(seen).coco()
    position = {index + 1: number for number, index in enumerate(seen, 1)}
    counted = [{**row, "image_id": position[row["image_id"]]} for row in rows]
    return _result(truth, counted, rows, dataset, bool(getattr(model.config, "masks", False)))


def _result(
    truth: dict[str, Any],
    counted: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    dataset: DetectionDataset,
    masks: bool,
) -> DetectionResult:
    box, by_class = average_precision(truth, counted, "bbox")
    names = dict(zip(dataset.category_ids, dataset.classes))
    classes = {names[number]: {"box_ap": value} for number, value in by_class.items()}
    mask: dict[str, float | None] = {}
    if masks and dataset.has_masks:
        mask, by_class = average_precision(truth, counted, "segm")
        for number, value in by_class.items():
            classes[names[number]]["mask_ap"] = value
    images = len(truth["images"])
    return DetectionResult(box=box, mask=mask, classes=classes, rows=rows, images=images)


def coco_rows(
    detections: dict[str, Tensor], image_id: int, category_ids: list[int]
) -> list[dict[str, Any]]:
    """One image's detections as COCO's results: category, score, box, and run-length mask."""
    boxes = detections["boxes"].double().cpu()
    sizes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    rows = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(
            detections["labels"].tolist(), sizes, detections["scores"].double().tolist()
        )
    ]
    if "masks" in detections and rows:
        inside = (detections["masks"][:, 0] >= MASK_THRESHOLD).cpu().numpy().astype(np.uint8)
        encoded = mask_api().encode(np.asfortranarray(inside.transpose(1, 2, 0)))
        for row, mask in zip(rows, encoded):
            counts = mask["counts"]
            text = counts.decode() if isinstance(counts, bytes) else counts
            row["segmentation"] = {"size": list(mask["size"]), "counts": text}
    return rows


def average_precision(
    truth: dict[str, Any], rows: list[dict[str, Any]], kind: str
) -> tuple[dict[str, float | None], dict[int, float | None]]:
    """COCO's twelve figures by name, and the average precision of each category.

    Args:
        truth: COCO's JSON of the annotations.
        rows: COCO's results.
        kind: "bbox" or "segm".

    Returns:
        None stands where there is no annotated object to find.
    """
    mask_api()  # says how to install what is missing
    from faster_coco_eval import COCO, COCOeval_faster

    categories = [category["id"] for category in truth["categories"]]
    wanted = {a["category_id"] for a in truth["annotations"] if not a["iscrowd"]}
    if not wanted:
        return dict.fromkeys(FIGURES), dict.fromkeys(categories)
    if not rows:  # which the library cannot load
        figures = dict.fromkeys(FIGURES, 0.0)
        return figures, {c: 0.0 if c in wanted else None for c in categories}
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO(truth)
        evaluation = COCOeval_faster(annotations, annotations.loadRes(rows), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = {name: _figure(v) for name, v in zip(FIGURES, evaluation.stats)}
    precision = np.asarray(evaluation.eval["precision"])  # (IoUs, recalls, categories, areas, dets)
    by_class = {}
    for number, category in enumerate(evaluation.params.catIds):
        values = precision[:, :, number, 0, -1]
        values = values[values > -1]
        by_class[int(category)] = float(values.mean()) if values.size else None
    return figures, by_class


def _figure(value: float) -> float | None:
    """COCO writes -1 where there is nothing to find."""
    return None if value < 0 else float(value)


def _from_all_ranks(part: list) -> list:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return part
    parts: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return [entry for rows in parts for entry in rows]
