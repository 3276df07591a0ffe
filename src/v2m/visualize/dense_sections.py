"""The sections of a report on detection or segmentation, as data for the page's template."""

from __future__ import annotations

from typing import Any

import numpy as np

from v2m.evaluation.matching import Thresholds

from .dense_run import DenseRun
from .figures import draw_curves, themed_svg
from .sections import duration

__all__ = ["class_table", "curves", "headline", "thresholds", "uses"]

SIZES = {
    "small": "below 32 x 32 pixels",
    "medium": "up to 96 x 96",
    "large": "larger",
}


def headline(run: DenseRun) -> dict[str, Any] | None:
    """The figure that the task is measured by, and those beside it."""
    if not run.test:
        return None
    return _detection(run) if run.task == "detect" else _segmentation(run)


def _detection(run: DenseRun) -> dict[str, Any] | None:
    if not run.kinds:
        run.missing.append("Average precision: the test images have no annotated object.")
        return None
    kind = run.kinds[-1]
    bars = []
    for name in run.kinds:
        of = f" of {name}es" if name == "box" else f" of {name}s"
        of = of if len(run.kinds) > 1 else ""
        for key, words in (("ap50", "AP at IoU 0.5"), ("ap75", "AP at IoU 0.75")):
            bars.append({"name": words + of, "value": run.test[f"{name}_{key}"], "kind": "first"})
    for size, words in SIZES.items():
        value = run.test.get(f"{kind}_ap_{size}")
        if value is not None:
            bars.append({"name": f"AP of objects {words}", "value": value, "kind": "second"})
    bars.append({"name": "average recall", "value": run.test[f"{kind}_ar100"], "kind": "chance"})
    what = "masks" if kind == "mask" else "boxes"
    box = f"; {100 * run.test['box_ap']:.1f}\u00a0% of boxes" if kind == "mask" else ""
    return {
        "name": "Average precision",
        "value": run.test[f"{kind}_ap"],
        "words": f"average precision of {what} on {_images(run)}, COCO's: over IoU from 0.50 to"
        f" 0.95{box}",
        "bars": bars,
        "sentences": [],
    }


def _segmentation(run: DenseRun) -> dict[str, Any]:
    bars = [
        {"name": "pixels right", "value": run.test["pixel_accuracy"], "kind": "first"},
        {"name": "the same, mean of classes", "value": run.test["mean_accuracy"], "kind": "first"},
    ]
    if run.confusion is not None:
        most = run.confusion.sum(1).max() / run.confusion.sum()
        bars.append(
            {"name": "always the most common class", "value": float(most), "kind": "chance"}
        )
    return {
        "name": "Mean IoU",
        "value": run.test["miou"],
        "words": f"mean intersection over union of {len(run.classes)} classes on {_images(run)}",
        "bars": bars,
        "sentences": [],
    }


def _images(run: DenseRun) -> str:
    split = run.test.get("split", "test")
    which = "test" if split == "test" else f"{split or 'validation'}"
    return f"{run.test['images']:,} {which} images"


def curves(run: DenseRun) -> dict[str, Any] | None:
    """The loss and the figure of the task over the epochs."""
    if not run.epochs:
        return None
    epochs = [record["epoch"] for record in run.epochs]
    if run.task == "segment":
        figure = {"mean IoU": "validation_miou", "pixels right": "validation_pixel_accuracy"}
        loss = {"training": "train_loss", "validation": "validation_loss"}
    else:
        masks = any("validation_mask_ap" in record for record in run.epochs)
        figure = {"AP of boxes": "validation_box_ap", "at IoU 0.5": "validation_box_ap50"}
        if masks:
            figure = {"AP of boxes": "validation_box_ap", "AP of masks": "validation_mask_ap"}
        loss = {"training": "train_loss"}
    figures = []
    for name, keys, percent in (("Loss", loss, False), ("Validation images", figure, True)):
        columns = {what: [record.get(key) for record in run.epochs] for what, key in keys.items()}
        lines = {what: c for what, c in columns.items() if any(v is not None for v in c)}
        if lines:
            svg = themed_svg(draw_curves(epochs, lines, percent=percent), name)
            figures.append({"name": name, "svg": svg})
    seconds = sum(record.get("seconds", 0) for record in run.epochs)
    rates = [r["images_per_second"] for r in run.epochs if "images_per_second" in r]
    words = f"{len(run.epochs)} epochs in {duration(seconds)}, validation included"
    if rates:
        words += f"; {np.median(rates):,.3g} training images a second"
    peaks = [r["peak_memory_gib"] for r in run.epochs if "peak_memory_gib" in r]
    if peaks:
        words += f"; {max(peaks):.1f} GiB of memory at most"
    if run.task == "detect":
        words += ". The loss is the sum of those of proposals, classes, boxes and masks"
    else:
        words += ". The training loss has that of the auxiliary head in it"
    return {"figures": figures, "sentence": words + "."}


def class_table(run: DenseRun) -> dict[str, Any] | None:
    """A row a class."""
    if not run.test:
        return None
    rows = _object_rows(run) if run.task == "detect" else _pixel_rows(run)
    return rows if rows["rows"] else None


def _object_rows(run: DenseRun) -> dict[str, Any]:
    counts = None
    if run.dataset is not None:
        labels = [i.label for image in run.dataset.images for i in image.instances if not i.crowd]
        counts = np.bincount(labels, minlength=len(run.classes)) if labels else None
    rows = []
    for number, name in enumerate(run.classes):
        figures = run.test["classes"].get(name, {})
        cells = [_percent(figures.get(f"{kind}_ap")) for kind in run.kinds]
        rows.append([name, *([f"{counts[number]:,}"] if counts is not None else []), *cells])
    names = {"box": "AP of boxes", "mask": "AP of masks"}
    head = ["class", *(["objects"] if counts is not None else []), *(names[k] for k in run.kinds)]
    return {"head": head, "rows": rows, "sentence": "COCO's AP, over IoU from 0.50 to 0.95."}


def _pixel_rows(run: DenseRun) -> dict[str, Any]:
    if run.confusion is None:
        head = ["class", "IoU"]
        rows = [[name, _percent(run.test["classes"].get(name))] for name in run.classes]
        return {"head": head, "rows": rows, "sentence": ""}
    matrix, rows = run.confusion, []
    hits, there, answered = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    for number, name in enumerate(run.classes):
        wrong = matrix[number].copy()
        wrong[number] = 0
        other = int(wrong.argmax())
        taken = f"{run.classes[other]} {_percent(wrong[other] / there[number])}"
        rows.append(
            [
                name,
                _percent(there[number] / matrix.sum()),
                _percent(_ratio(hits[number], there[number] + answered[number] - hits[number])),
                _percent(_ratio(hits[number], there[number])),
                _percent(_ratio(hits[number], answered[number])),
                taken if wrong[other] else "",
            ]
        )
    head = ["class", "of all pixels", "IoU", "found", "right where said", "most often taken for"]
    words = "Found: part of the class's pixels. Right where said: part of the pixels named so."
    return {"head": head, "rows": rows, "sentence": words}


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}\u00a0%"


def thresholds(found: Thresholds | None) -> dict[str, Any] | None:
    """Precision and recall of boxes or masks by the score from which they are believed."""
    if found is None or found.best is None:
        return None
    columns = {
        "right, of those shown": found.precision,
        "found, of what is there": found.recall,
    }
    lines = {
        name: [None if np.isnan(value) else float(value) for value in values]
        for name, values in columns.items()
    }
    figure = draw_curves(found.scores.tolist(), lines, percent=True, label="least score shown")
    best = found.best
    sentence = (
        f"With scores of at least {found.scores[best]:.2f} both are in balance best:"
        f" {_percent(found.precision[best])} of what is shown is right at IoU 0.5, and"
        f" {_percent(found.recall[best])} of what is there is found. It was chosen on these very"
        " images, so expect a little less on others."
    )
    return {"svg": themed_svg(figure, "thresholds"), "sentence": sentence}


def uses(run: DenseRun, score: float | None) -> list[dict[str, str]]:
    """What to do with the model next, as code to copy."""
    where = run.directory.as_posix()
    option = f" --score {score:.2f}" if score is not None else ""
    words = "Draw what it finds on a picture or a folder of them, and write it as COCO's JSON:"
    then = 'found = predictor.detect(image)  # "boxes", "labels", "scores" and, if learnt, "masks"'
    if run.task == "segment":
        words = "Write the class of each pixel as a PNG, and drawn:"
        then = "classes = predictor.classes(image)  # (H, W), numbers of predictor.label_names"
    return [
        {"words": words, "code": f"v2m predict {where} PICTURE-OR-FOLDER --output FOLDER{option}"},
        {
            "words": "From Python:",
            "code": "from PIL import Image\nfrom v2m.predict_dense import DensePredictor\n\n"
            f'predictor = DensePredictor("{where}")\n'
            f'image = Image.open("PICTURE").convert("RGB")\n{then}',
        },
        {
            "words": "Measure it on another data set:",
            "code": f"v2m evaluate {where} --data FOLDER",
        },
    ]
