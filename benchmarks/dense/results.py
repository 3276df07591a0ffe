"""The table, the pictures and the logs of finished runs."""

from __future__ import annotations

import argparse
import csv
import datetime
import tarfile
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import v2m
from v2m.data.ade20k import load_segmentation
from v2m.data.detection import load_detection
from v2m.drawing import draw_classes, enlarged, palette
from v2m.evaluation.matching import Thresholds, match_data_set
from v2m.heads import from_directory
from v2m.predict_dense import DensePredictor
from v2m.visualize.dense_examples import object_pair
from v2m.visualize.dense_run import DenseRun, read_dense_run

from .probes import read_probes
from .recipe import DATA, MODELS

COLUMNS = (
    *("data", "backbone", "parameters_million", "epochs", "steps", "batch", "figure", "value"),
    *("ap50", "seconds", "images_per_second_alone", "images_per_second_beside_others"),
    *("peak_memory_gib", "precision", "device", "torch", "v2m", "date"),
)
SHOWN = {"trees": (1, 6, 8), "nuclei": (0, 3, 5), "textures": (0, 1, 2, 3)}  # of the test images
GAP, TITLE = 6, 22  # pixels


def collect(args: argparse.Namespace) -> None:
    """Write TO.csv, TO_DATA.png and TO_logs.tar.gz."""
    names = [f"{data}-{model}" for data in DATA for model in MODELS]
    runs = {}
    for name in names:
        if (args.output / name / "model.safetensors").is_file():
            runs[name] = read_dense_run(args.output / name, dataset=_moved(args, name))
        else:
            print(f"{name}: not finished")
    args.to.parent.mkdir(parents=True, exist_ok=True)
    probes = read_probes(args.output)
    rows = [_row(name, run, probes.get(name, {})) for name, run in runs.items()]
    with open(f"{args.to}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print({key: value for key, value in row.items() if value != ""})
    for data in DATA:
        found = {name: run for name, run in runs.items() if name.startswith(f"{data}-")}
        if found:
            _picture(data, found).save(f"{args.to}_{data}.png", optimize=True)
    with tarfile.open(f"{args.to}_logs.tar.gz", "w:gz") as archive:
        for name in runs:
            for file in ("metrics.jsonl", "train_config.json", "config.json", "report.html"):
                if (path := args.output / name / file).is_file():
                    archive.add(path, f"{name}/{file}")


def _moved(args: argparse.Namespace, name: str):
    """The test images, where the data are not where the run had them."""
    if args.data is None:
        return None
    data = name.split("-")[0]
    load = load_segmentation if data == "textures" else load_detection
    return load(args.data / data, "test")


def _row(name: str, run: DenseRun, probe: dict[str, float]) -> dict[str, Any]:
    figure = "miou" if run.task == "segment" else f"{run.kinds[-1]}_ap"
    parameters = sum(p.numel() for p in from_directory(run.directory).parameters())
    peaks = [record["peak_memory_gib"] for record in run.epochs if "peak_memory_gib" in record]
    rates = [record["images_per_second"] for record in run.epochs]
    machine = run.machine
    values = {
        "data": name.split("-")[0],
        "backbone": run.model["model_args"]["backbone"],
        "parameters_million": parameters / 1e6,
        "epochs": run.settings["schedule.epochs"],
        "steps": run.epochs[-1]["step"],
        "batch": run.settings["data.batch_size"],
        "figure": figure,
        "value": run.test[figure],
        "ap50": run.test.get(figure.replace("_ap", "_ap50"), "") if run.kinds else "",
        "seconds": run.test["seconds"],
        "images_per_second_alone": probe.get("images_per_second", ""),
        "images_per_second_beside_others": median(rates),
        "peak_memory_gib": max(peaks) if peaks else "",
        "precision": run.test["precision"],
        "device": _device(machine),
        "torch": torch.__version__,
        "v2m": v2m.__version__,
        "date": datetime.date.today().isoformat(),
    }
    return {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}


def _device(machine: dict[str, Any]) -> str:
    accelerator = machine.get("accelerator", "none")
    return machine.get("processor", "") if accelerator == "none" else accelerator


def _picture(data: str, runs: dict[str, DenseRun]) -> Image.Image:
    """A row a test image: what is there, and what each model says."""
    some, columns = next(iter(runs.values())), {}
    shown = tuple(index for index in SHOWN[data] if index < len(some.dataset))
    if some.task == "segment":
        columns = _class_columns(runs, shown)
    else:
        for run in runs.values():
            matches = match_data_set(run.dataset, run.rows)
            best = Thresholds.of(matches)
            score = 0.5 if best.best is None else float(best.scores[best.best])
            pairs = [object_pair(run, matches[i], i, score) for i in shown]
            columns.setdefault("image", [enlarged(run.dataset[i][0])[0] for i in shown])
            title = f"{run.model['model_args']['backbone']}, scores from {score:.2f}"
            columns[title] = [found for _, found in pairs]
            if len(columns) == 2:
                there = [object_pair(run, _all_found(matches[i]), i, 0.0)[0] for i in shown]
                columns = {"image": columns["image"], "what is there": there, title: columns[title]}
    return _sheet(columns)


def _all_found(match):
    """Every object drawn as found: the truth alone."""
    return type(match)(**{**vars(match), "found": np.ones_like(match.found)})


def _class_columns(runs: dict[str, DenseRun], shown: tuple[int, ...]) -> dict[str, list]:
    some = next(iter(runs.values()))
    colors = palette(len(some.classes))
    items = [some.dataset[index] for index in shown]
    columns = {
        "image": [image.convert("RGB") for image, _ in items],
        "what is there": [draw_classes(i, np.asarray(c), colors) for i, c in items],
    }
    for run in runs.values():
        predictor = DensePredictor(run.directory)
        columns[run.model["model_args"]["backbone"]] = [
            draw_classes(image, predictor.classes(image), colors) for image, _ in items
        ]
    return columns


def _sheet(columns: dict[str, list[Image.Image]]) -> Image.Image:
    """Columns of pictures of one size with their titles."""
    width, height = next(iter(columns.values()))[0].size
    rows = len(next(iter(columns.values())))
    size = (len(columns) * (width + GAP) - GAP, TITLE + rows * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(columns.items()):
        left = column * (width + GAP)
        draw.text((left + 2, 4), title, fill="black", font_size=14)
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, TITLE + row * (height + GAP)))
    return sheet
