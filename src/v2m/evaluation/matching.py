"""Which detections are right, which objects are missed: for pictures and thresholds, not for AP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from v2m.data.annotations import AnnotatedImage, DetectionDataset, mask_api

__all__ = ["ImageMatches", "Thresholds", "match_data_set", "match_image"]


@dataclass(frozen=True, kw_only=True)
class ImageMatches:
    """The detections of one image beside what is there.

    Attributes:
        rows: the detections, COCO's results, best first.
        right: (m,) whether each is an object of its class that no better one had.
        counted: (m,) False for those on a crowd.
        found: (n,) the score of the detection that found each object, 0 for none.
        wanted: (n,) False for crowds.
    """

    rows: list[dict[str, Any]]
    right: np.ndarray
    counted: np.ndarray
    found: np.ndarray
    wanted: np.ndarray

    def f1(self, score: float) -> float:
        """Harmonic mean of precision and recall of the detections with at least that score."""
        kept = self.counted & (np.array([r["score"] for r in self.rows]) >= score)
        total = int(kept.sum() + self.wanted.sum())
        return 2 * int((self.right & kept).sum()) / total if total else 1.0


def match_image(
    image: AnnotatedImage,
    rows: Sequence[dict[str, Any]],
    category_ids: Sequence[int],
    *,
    least: float = 0.5,
) -> ImageMatches:
    """Detections and objects of an image in pairs, as COCO's evaluation makes them at one IoU.

    The best detection chooses first: the object of its class that it overlaps most. Masks are
    compared where both sides have them, else boxes.

    Args:
        rows: the image's detections, COCO's results.
        least: the intersection over union that a pair needs.
    """
    rows = sorted(rows, key=lambda row: -row["score"])
    wanted = np.array([not instance.crowd for instance in image.instances], bool)
    found = np.zeros(len(image.instances))
    right, counted = np.zeros(len(rows), bool), np.ones(len(rows), bool)
    labels = np.array([instance.label for instance in image.instances], int)
    overlap = _overlaps(image, rows)
    for number, row in enumerate(rows):
        same = labels == category_ids.index(row["category_id"])
        good = same & (overlap[number] >= least)
        free = good & wanted & (found == 0)
        if free.any():
            chosen = int(np.argmax(np.where(free, overlap[number], -1)))
            found[chosen], right[number] = row["score"], True
        else:
            counted[number] = not (good & ~wanted).any()
    return ImageMatches(rows=rows, right=right, counted=counted, found=found, wanted=wanted)


def _overlaps(image: AnnotatedImage, rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """(m, n) intersection over union; over a crowd, the part of the detection that is in it."""
    instances = image.instances
    if not rows or not instances:
        return np.zeros((len(rows), len(instances)))
    if all(i.mask is not None for i in instances) and all("segmentation" in r for r in rows):
        found: list = [row["segmentation"] for row in rows]
        there: list = [instance.mask for instance in instances]
    else:
        found = [row["bbox"] for row in rows]
        corners = np.array([instance.box for instance in instances], float)
        there = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).tolist()
    crowds = [int(instance.crowd) for instance in instances]
    return np.asarray(mask_api().iou(found, there, crowds)).reshape(len(rows), len(instances))


def match_data_set(dataset: DetectionDataset, rows: Sequence[dict[str, Any]]) -> list[ImageMatches]:
    """`match_image` for each image; "image_id" counts from 1 in the data set's order."""
    by_image: list[list[dict[str, Any]]] = [[] for _ in dataset.images]
    for row in rows:
        by_image[row["image_id"] - 1].append(row)
    return [
        match_image(image, part, dataset.category_ids)
        for image, part in zip(dataset.images, by_image)
    ]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What detections with at least a score are worth.

    Attributes:
        scores: (k,) from 0 to 1.
        precision: (k,) part of the detections that are right; NaN where there is none.
        recall: (k,) part of the objects that are found.
    """

    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    @classmethod
    def of(cls, matches: Sequence[ImageMatches], steps: int = 101) -> Thresholds:
        """Over all images and classes."""
        counted = [
            (row["score"], right)
            for match in matches
            for row, right, counts in zip(match.rows, match.right, match.counted)
            if counts
        ]
        objects = sum(int(match.wanted.sum()) for match in matches)
        values = np.array(sorted(counted, key=lambda pair: pair[0]), float).reshape(-1, 2)
        hits = np.concatenate([[0], np.cumsum(values[::-1, 1])])[::-1]  # of the rows from i on
        scores = np.linspace(0, 1, steps)
        first = np.searchsorted(values[:, 0], scores)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = hits[first] / (len(values) - first)
            recall = hits[first] / objects if objects else np.full(steps, np.nan)
        return cls(scores=scores, precision=precision, recall=recall)

    @property
    def best(self) -> int | None:
        """Where the harmonic mean of both is largest; None if nothing is right at any score."""
        total = self.precision + self.recall
        with np.errstate(invalid="ignore", divide="ignore"):
            f1 = 2 * self.precision * self.recall / total
        return int(np.nanargmax(f1)) if np.nan_to_num(f1).any() else None
