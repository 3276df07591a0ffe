"""What a run of detection or segmentation left in its folder, read for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from v2m.data.ade20k import SegmentationDataset, load_segmentation
from v2m.data.annotations import DetectionDataset
from v2m.data.detection import load_detection
from v2m.errors import InputError
from v2m.evaluation.dense_run import stored_task
from v2m.heads.checkpoint import read_dense_config

from .run import Run, read_log

__all__ = ["DenseRun", "read_dense_run"]

DenseDataset = DetectionDataset | SegmentationDataset


@dataclass(kw_only=True)
class DenseRun(Run):
    """A run's files, of detection or segmentation.

    Attributes:
        task: "detect" or "segment".
        rows: of detection, what was found on the test images, COCO's results; or None.
        confusion: of segmentation, (K, K) pixels of the test images by true class (row) and
            answer; or None.
    """

    task: str
    rows: list[dict[str, Any]] | None = None
    confusion: np.ndarray | None = None
    dataset: DenseDataset | None = field(default=None)

    @property
    def classes(self) -> list[str]:
        """Class names; "class 7" for a model without names."""
        count = self.model["model_args"]["num_classes"]
        return self.model.get("label_names") or [f"class {index}" for index in range(count)]

    @property
    def kinds(self) -> list[str]:
        """ "box", and "mask" where masks were evaluated."""
        return [kind for kind in ("box", "mask") if self.test.get(f"{kind}_ap") is not None]


def read_dense_run(directory: str | Path, *, dataset: DenseDataset | None = None) -> DenseRun:
    """Read the folder of a run of detection or segmentation.

    Args:
        dataset: The test images, where they are not those the configuration names.

    Raises:
        InputError: There is no trained model in the folder, or one of its files is damaged.
    """
    from v2m.engine.rundir import CONFUSION, DETECTIONS  # here, since training writes reports

    run = DenseRun(
        directory=Path(directory),
        model=read_dense_config(directory),
        task=stored_task(directory),
    )
    read_log(run)
    if not run.test:
        run.missing.append("Figures of the test images: the run has not been evaluated on them.")
    run.dataset = dataset or _test_images(run)
    if run.task == "detect":
        run.rows = _rows(run, run.directory / DETECTIONS)
    else:
        run.confusion = _confusion(run, run.directory / CONFUSION)
    return run


def _test_images(run: DenseRun) -> DenseDataset | None:
    name = run.settings.get("data.name")
    if name is None:
        return None
    load = load_detection if run.task == "detect" else load_segmentation
    try:
        dataset = load(
            name,
            "test",
            on_error=run.settings["data.on_error"],
            validation_fraction=run.settings["data.validation_fraction"],
            seed=run.settings["data.split_seed"],
        )
    except InputError as error:
        run.missing.append(f"Example images: the test images are not at hand ({error})")
        return None
    if list(dataset.classes) != run.classes:
        run.missing.append(f"Example images: {name} has other classes now.")
        return None
    return dataset


def _rows(run: DenseRun, path: Path) -> list[dict[str, Any]] | None:
    """The stored detections; the data set is put aside if they are not about all of it."""
    if not path.is_file():
        run.missing.append(
            f"Thresholds and examples: the folder has no {path.name}, which training writes when"
            " it ends."
        )
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        last = max((row["image_id"] for row in rows), default=0)
        known = {row["category_id"] for row in rows}
        rows = [{**row, "score": float(row["score"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read: {type(error).__name__}: {error}. Evaluate the model again."
        ) from error
    if run.dataset is None:
        return rows
    count = run.test.get("images", len(run.dataset))
    if count != len(run.dataset) or last > count or not known <= set(run.dataset.category_ids):
        run.missing.append(
            f"Thresholds and examples: {path.name} is about {count} images and the data set has"
            f" {len(run.dataset)}, or other classes, so they cannot be put side by side."
        )
        run.dataset = None
    return rows


def _confusion(run: DenseRun, path: Path) -> np.ndarray | None:
    if not path.is_file():
        run.missing.append(
            f"The table of the classes: the folder has no {path.name}, which training writes when"
            " it ends."
        )
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            confusion = np.asarray(arrays["confusion"], dtype=np.int64)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}. Evaluate the model again.") from error
    if confusion.shape != (len(run.classes), len(run.classes)):
        raise InputError(
            f"{path} holds a table of shape {confusion.shape} for {len(run.classes)} classes."
            " Evaluate the model again."
        )
    return confusion
