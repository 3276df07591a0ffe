"""Test images beside what is on them and what the model says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from v2m.data.ade20k import IGNORED
from v2m.drawing import MISSED, RIGHT, WRONG, draw_classes, draw_objects, palette
from v2m.evaluation.matching import ImageMatches
from v2m.predict_dense import DensePredictor

from .dense_run import DenseRun
from .sections import data_uri

__all__ = ["class_examples", "legend", "object_examples", "object_pair"]

LOOKED_AT = 24  # images of which the worst classes are shown
LARGEST = 560  # pixels of a picture's longer side


def object_pair(
    run: DenseRun, matches: ImageMatches, index: int, score: float
) -> tuple[Image.Image, Image.Image]:
    """An image with its objects, and with what was found, right and wrong."""
    image, _ = run.dataset[index]
    instances = run.dataset.images[index].instances
    there = [
        (i.box, i.mask, RIGHT if found >= score else MISSED)
        for i, found in zip(instances, matches.found)
        if not i.crowd
    ]
    said = []
    for row, right, counts in zip(matches.rows, matches.right, matches.counted):
        if row["score"] >= score and counts:
            left, top, width, height = row["bbox"]
            box = (left, top, left + width, top + height)
            said.append((box, row.get("segmentation"), RIGHT if right else WRONG))
    return draw_objects(image, there), draw_objects(image, said)


def object_examples(
    run: DenseRun, matches: Sequence[ImageMatches], score: float, count: int
) -> list[dict[str, Any]]:
    """The first test images, and those with most mistakes."""
    f1 = np.array([match.f1(score) for match in matches])
    cards = []
    for words, index in _choose(f1, count):
        match = matches[index]
        shown = np.array([row["score"] >= score for row in match.rows], bool) & match.counted
        hits, wanted = int((match.right & shown).sum()), int(match.wanted.sum())
        pair = object_pair(run, match, index, score)
        cards.append(
            {
                "title": f"{words}: {run.dataset.identifier(index)}",
                "facts": f"{hits} of {wanted} found, {int(shown.sum()) - hits} wrong",
                "pictures": _pictures(("what is there", "what it found"), pair),
            }
        )
    return cards


def class_examples(run: DenseRun, predictor: DensePredictor, count: int) -> list[dict[str, Any]]:
    """The first test images, and the worst of the first few."""
    colors = palette(len(run.classes))
    looked_at = min(LOOKED_AT, len(run.dataset))
    answers, accuracy = [], []
    for index in range(looked_at):
        image, classes = run.dataset[index]
        answer, truth = predictor.classes(image), np.asarray(classes)
        known = truth != IGNORED
        answers.append(answer)
        accuracy.append((answer == truth)[known].mean() if known.any() else 1.0)
    cards = []
    for words, index in _choose(np.array(accuracy), count):
        image, classes = run.dataset[index]
        drawn = (
            image.convert("RGB"),
            draw_classes(image, np.asarray(classes), colors),
            draw_classes(image, answers[index], colors),
        )
        cards.append(
            {
                "title": f"{words}: {run.dataset.identifier(index)}",
                "facts": f"{100 * accuracy[index]:.1f}\u00a0% of the pixels right",
                "pictures": _pictures(("image", "what is there", "what it says"), drawn),
            }
        )
    return cards


def _choose(quality: np.ndarray, count: int) -> list[tuple[str, int]]:
    """The first half in the data set's order, the other half the worst of the rest."""
    first = list(range(min(-(-count // 2), len(quality))))
    rest = [int(i) for i in np.argsort(quality, kind="stable") if i not in first]
    worst = rest[: max(0, count - len(first))]
    return [("From the start", i) for i in first] + [("Among the worst", i) for i in worst]


def _pictures(names: Sequence[str], pictures: Sequence[Image.Image]) -> list[dict[str, str]]:
    return [
        {"name": name, "source": data_uri(picture, LARGEST)}
        for name, picture in zip(names, pictures)
    ]


def legend(run: DenseRun) -> list[dict[str, str]]:
    """Name and colour of what the pictures show."""
    if run.task == "detect":
        names = {"found": RIGHT, "missed": MISSED, "wrong": WRONG}
    else:
        names = dict(zip(run.classes, palette(len(run.classes))))
    return [{"name": k, "color": "#{:02x}{:02x}{:02x}".format(*v)} for k, v in names.items()]
