"""Evaluate a stored detector or segmenter on a data set: `v2m evaluate` for dense tasks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from v2m.data.ade20k import SegmentationDataset, load_segmentation
from v2m.data.annotations import DetectionDataset
from v2m.data.dense_loaders import create_dense_loader
from v2m.data.dense_transforms import detection_evaluation, segmentation_evaluation
from v2m.data.detection import load_detection
from v2m.engine.distributed import Ranks, choose_device
from v2m.engine.progress import ConsoleReporter, Reporter
from v2m.errors import InputError
from v2m.evaluation.detection import evaluate_detector
from v2m.evaluation.run import stored_split
from v2m.evaluation.segmentation import MULTI_SCALE, Inference, evaluate_segmenter
from v2m.heads import Detector, Segmenter, from_directory
from v2m.heads.checkpoint import ARCHITECTURES, read_dense_config

__all__ = ["evaluate_dense", "stored_inference", "stored_task"]

STRIDE = 2 / 3  # of a sliding window's side, as in the published evaluations


def stored_task(folder: str | os.PathLike) -> str:
    """ "classify", "detect" or "segment": what the model in a folder was trained for.

    A file, or a folder of another origin, holds a classifier.
    """
    path = Path(folder) / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):  # whoever loads the model says what is wrong
        return "classify"
    architecture = stored.get("architecture") if isinstance(stored, dict) else None
    if architecture not in ARCHITECTURES:
        return "classify"
    return "segment" if ARCHITECTURES[architecture][0] is Segmenter else "detect"


def stored_inference(folder: str | os.PathLike) -> Inference:
    """How a stored segmenter's images were shown to it in validation."""
    side: Any = read_dense_config(folder)
    for key in ("v2m", "training", "segment", "short_side"):
        if not isinstance(side, dict) or key not in side:
            return Inference()
        side = side[key]
    return Inference(short_side=side)


def evaluate_dense(
    folder: str | os.PathLike,
    data: str,
    *,
    split: str = "test",
    batch_size: int = 1,
    workers: int | None = None,
    device: str = "auto",
    on_error: str = "raise",
    multi_scale: bool = False,
    window: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Figures of the model in `folder` on one split of a data set, ready for JSON.

    Args:
        multi_scale: of a segmenter, average six scales and their mirrored images.
        window: of a segmenter, side of the windows that slide over the image, pixels.
        console: where to show the progress.

    Raises:
        InputError: for anything that cannot be used, or a data set with other classes.
    """
    model = from_directory(folder).to(choose_device(device, Ranks()))
    if isinstance(model, Detector) and (multi_scale or window):
        raise InputError("--multi-scale and --window are for models of --task segment.")
    load = load_detection if isinstance(model, Detector) else load_segmentation
    kept_aside = stored_split(read_dense_config(folder))
    dataset = load(data, split, on_error=on_error, **kept_aside)
    _check_classes(model, dataset)
    cfg = model.pretrained_cfg
    transform = detection_evaluation()
    if isinstance(model, Segmenter):
        transform = segmentation_evaluation(cfg["mean"], cfg["std"])
    loader = create_dense_loader(
        dataset, transform, is_training=False, batch_size=batch_size, num_workers=workers
    )
    reporter = Reporter() if console is None else ConsoleReporter(console, epochs=1, steps=1)
    with reporter:
        reporter.start_evaluation(f"{dataset.name} {dataset.split}", len(dataset))
        if isinstance(model, Detector):
            result = evaluate_detector(model, loader, dataset, on_batch=reporter.evaluated)
            classes: dict[str, Any] = result.classes
        else:
            shown = _inference(folder, multi_scale, window)
            result = evaluate_segmenter(model, loader, shown, on_batch=reporter.evaluated)
            iou = [None if np.isnan(value) else float(value) for value in result.iou]
            classes = {name: {"iou": value} for name, value in zip(dataset.classes, iou)}
    return {
        "model": str(folder),
        "task": stored_task(folder),
        "data": data,
        "split": dataset.split,
        "skipped": len(loader.skipped) + len(dataset.problems),
        **result.summary(),
        "classes": classes,
    }


def _inference(folder: str | os.PathLike, multi_scale: bool, window: int | None) -> Inference:
    inference = stored_inference(folder)
    if multi_scale:
        inference = replace(inference, scales=MULTI_SCALE.scales, flip=MULTI_SCALE.flip)
    if window is not None:
        step = max(1, round(window * STRIDE))
        inference = replace(inference, window=(window, window), stride=(step, step))
    return inference


def _check_classes(
    model: Detector | Segmenter, dataset: DetectionDataset | SegmentationDataset
) -> None:
    names = model.pretrained_cfg.get("label_names")
    if names is None and model.num_classes == len(dataset.classes):
        return
    if names is None or list(names) != list(dataset.classes):
        known = ", ".join((names or [])[:5])
        raise InputError(
            f"the model was trained for {model.num_classes} classes ({known}, ...) and"
            f" {dataset.name} has {len(dataset.classes)} ({', '.join(dataset.classes[:5])}, ...):"
            " they must be the same, in the same order."
        )
