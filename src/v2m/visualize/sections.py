"""The sections of a report: what each shows and says, as data for the page's template."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from .figures import draw_curves, themed_svg
from .results import wilson_interval
from .run import Run

__all__ = [
    "accuracy",
    "confusion",
    "curves",
    "data_uri",
    "duration",
    "example_cards",
    "how_made",
    "uses",
]

MOST_CLASSES = 20  # of a confusion matrix that can still be read
LARGEST_PICTURE = 224  # pixels, of an example


def accuracy(run: Run) -> dict[str, Any] | None:
    """Headline figures, and how much of the accuracy hangs on where the patches lie."""
    if run.results is None:
        return None
    results, classes = run.results, run.results.probabilities.shape[1]
    count, top1, interval = len(results.targets), results.accuracy(), results.interval()
    chance = float(np.bincount(results.targets).max() / count)
    bars = [{"name": "first guess right", "value": top1, "interval": interval, "kind": "first"}]
    if classes > 5:
        bars.append({"name": "among the first five", "value": results.accuracy(5), "kind": "first"})
    shuffled = run.test.get("shuffled_top1")
    if shuffled is not None:
        between = wilson_interval(round(shuffled * count), count)
        bars.append(
            {"name": "patches shuffled", "value": shuffled, "interval": between, "kind": "second"}
        )
    bars.append({"name": "always the most common class", "value": chance, "kind": "chance"})
    sentences = [
        f"On average it gives its answer a probability of {_percent(results.confidence())}: "
        f"{_calibration(results.confidence(), interval)}"
    ]
    if shuffled is not None:
        sentences.append(_shuffling(top1, shuffled, interval))
    else:
        run.missing.append("Accuracy with shuffled patches: it was not measured.")
    return {
        "top1": top1,
        "count": f"{count:,}",
        "interval": interval,
        "bars": bars,
        "sentences": sentences,
    }


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}\u00a0%"


def _calibration(confidence: float, interval: tuple[float, float]) -> str:
    if confidence > interval[1]:
        return "more than it is right, so it is too sure of itself."
    if confidence < interval[0]:
        return "less than it is right, so it doubts itself too much."
    return "as often as it is right, so its probabilities can be taken at their word."


def _shuffling(top1: float, shuffled: float, interval: tuple[float, float]) -> str:
    """What the accuracy on shuffled patches means."""
    start = (
        f"With the patches of every test image in random order it gets {_percent(shuffled)} right "
        f"instead of {_percent(top1)}."
    )
    if shuffled >= interval[0]:
        return f"{start} That is no loss: this model does not use where the patches lie."
    return (
        f"{start} A model that took each patch for itself, whatever its place, would lose nothing: "
        "what is lost is what this model reads from where the patches lie. It never saw shuffled "
        "images in training, so this is no measure of what the patches alone could tell."
    )


def curves(run: Run) -> dict[str, Any] | None:
    """Loss and accuracy over the epochs."""
    if not run.epochs:
        return None
    epochs = [record["epoch"] for record in run.epochs]

    def column(key: str) -> list[float | None]:
        return [record.get(key) for record in run.epochs]

    figures = []
    for name, what, percent in (("Loss", "loss", False), ("Accuracy", "accuracy", True)):
        both = {
            "training": column(f"train_{what}"),
            "validation": column("validation_top1" if percent else "validation_loss"),
        }
        lines = {key: values for key, values in both.items() if any(v is not None for v in values)}
        if lines:
            svg = themed_svg(draw_curves(epochs, lines, percent=percent), what)
            figures.append({"name": name, "svg": svg})
    return {"figures": figures, "sentence": _speed(run)}


def _speed(run: Run) -> str:
    seconds = sum(record.get("seconds", 0) for record in run.epochs)
    rates = [record["images_per_second"] for record in run.epochs if "images_per_second" in record]
    words = f"{len(run.epochs)} epochs in {duration(seconds)}"
    if rates:
        words += f", {np.median(rates):,.0f} training images a second"
    last = run.epochs[-1]
    if last.get("validation_top1") is not None:
        words += f"; {_percent(last['validation_top1'])} of the validation images at the end"
    mixed = any(run.settings.get(f"mix.{name}") for name in ("mixup", "cutmix"))
    images = "mixed with each other and augmented" if mixed else "augmented"
    return (
        f"{words}. The training curves are taken while the weights change and on {images} images, "
        "so they may look worse than those of the validation images, which are taken as they are."
    )


def duration(seconds: float) -> str:
    """A time in words: 1 h 05 min, 3 min 15 s, 9 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def confusion(run: Run) -> dict[str, Any] | None:
    """The confusion matrix, of the classes with the most mistakes where there are many."""
    if run.results is None:
        return None
    matrix, names = run.results.confusion(), run.classes
    totals = matrix.sum(axis=1)
    shown = np.arange(len(matrix))
    sentences = _likeliest_mix_ups(matrix, names)
    if len(matrix) > MOST_CLASSES:
        mistakes = matrix.sum(axis=0) + totals - 2 * matrix.diagonal()
        shown = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_CLASSES])
        sentences.insert(
            0, f"Shown are the {MOST_CLASSES} of {len(matrix)} classes with most mistakes."
        )
    rows = []
    for true in shown:
        cells = [
            {
                "answer": names[answer],
                "count": int(matrix[true, answer]),
                "share": float(matrix[true, answer] / max(totals[true], 1)),
                "hit": true == answer,
            }
            for answer in shown
        ]
        right = float(matrix[true, true] / max(totals[true], 1))
        rows.append(
            {"name": names[true], "cells": cells, "count": int(totals[true]), "right": right}
        )
    return {"classes": [names[index] for index in shown], "rows": rows, "sentences": sentences}


def _likeliest_mix_ups(matrix: np.ndarray, names: list[str]) -> list[str]:
    """The three most frequent mistakes in words."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    pairs = np.argsort(-wrong, axis=None, kind="stable")[:3]
    found = [np.unravel_index(pair, wrong.shape) for pair in pairs if wrong.flat[pair] > 0]
    if not found:
        return ["There is not one mistake."]
    parts = [
        f"“{names[true]}” for “{names[answer]}” {wrong[true, answer]} times"
        for true, answer in found
    ]
    return [f"Of {wrong.sum()} mistakes the most frequent: it takes {', '.join(parts)}."]


def example_cards(run: Run, count: int) -> dict[str, Any] | None:
    """Right and wrong answers with the images."""
    if run.results is None or run.dataset is None:
        return None
    return {
        "wrong": [_card(run, index) for index in run.results.surest_mistakes(count)],
        "right": [_card(run, index) for index in run.results.first_right(count)],
    }


def _card(run: Run, index: int, guesses: int = 3) -> dict[str, Any]:
    image, _ = run.dataset[index]
    probabilities = run.results.probabilities[index]
    truth = int(run.results.targets[index])
    best = np.argsort(-probabilities, kind="stable")[:guesses]
    return {
        "index": index,
        "truth": run.classes[truth],
        "picture": data_uri(image),
        "guesses": [
            {
                "label": run.classes[answer],
                "probability": float(probabilities[answer]),
                "is_true": bool(answer == truth),
            }
            for answer in best
        ],
    }


def data_uri(image: Image.Image, largest: int = LARGEST_PICTURE) -> str:
    """An image as a data URI: small ones as they are, large ones as thumbnails."""
    is_small = max(image.size) <= 64
    if not is_small:
        image = image.copy()
        image.thumbnail((largest, largest))
    kind, options = ("png", {"optimize": True}) if is_small else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def uses(run: Run) -> list[dict[str, str]]:
    """What to do with the model next, as code to copy."""
    where = run.directory.as_posix()
    channels, height, width = run.model["pretrained_cfg"]["input_size"]
    return [
        {
            "words": "Classify a picture, or a folder of them, on the command line:",
            "code": f"v2m predict {where} PICTURE-OR-FOLDER --top 3",
        },
        {
            "words": "From Python, with the preprocessing and the class names stored with it:",
            "code": "from v2m.predict import predict\n\n"
            f'for prediction in predict("{where}", "PICTURE-OR-FOLDER"):\n'
            "    print(prediction.path, prediction.labels[0], prediction.probabilities[0])",
        },
        {
            "words": "As a timm model, whole or as a backbone:",
            "code": "import timm, torch, v2m\n\n"
            f'model = timm.create_model("local-dir:{where}", pretrained=True).eval()\n'
            f"logits = model(torch.randn(1, {channels}, {height}, {width}))",
        },
    ]


def how_made(run: Run) -> list[tuple[str, str]]:
    """The run in a few lines."""
    facts = [("model", run.model["architecture"])]
    if run.dataset is not None:
        facts.append(("data", f"{run.dataset.name} ({len(run.dataset):,} test images)"))
    elif "data.name" in run.settings:
        facts.append(("data", run.settings["data.name"]))
    for name, key in (("seed", "run.seed"), ("scan", None)):
        value = run.settings.get(key) if key else run.model.get("model_args", {}).get("scan")
        if value is not None:
            facts.append((name, str(value)))
    if run.epochs:
        seconds = sum(record.get("seconds", 0) for record in run.epochs)
        facts.append(("training", f"{len(run.epochs)} epochs, {duration(seconds)}"))
    if "precision" in run.test:
        facts.append(("precision", run.test["precision"]))
    facts += [(name, run.machine[name]) for name in ("processor", "accelerator") if run.machine]
    return facts
