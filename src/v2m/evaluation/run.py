"""Evaluate a stored model on a data set: what `v2m evaluate` does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

import v2m
from v2m.data import DataConfig, ImageDataset, create_loader, load_dataset, shuffle_patches
from v2m.engine.distributed import Ranks, choose_device
from v2m.engine.progress import ConsoleReporter, Reporter
from v2m.engine.rundir import RunDirectory
from v2m.errors import InputError
from v2m.evaluation.classification import ClassificationResult, evaluate_classifier
from v2m.evaluation.patches import patch_size
from v2m.models import read_config

MISTAKES = 3  # named per class


def model_folder(path: str | os.PathLike, reporter: Reporter) -> Path:
    """Where a run's model is (finished, else its last whole checkpoint); other paths as they
    are."""
    path = Path(path)
    run = RunDirectory(path)
    if path.is_dir() and not (path / "model.safetensors").exists() and run.store.root.is_dir():
        newest = run.store.newest(reporter.message)
        if newest is None:
            raise InputError(f"{path} is a run without a whole checkpoint yet.")
        reporter.message(f"the run is not finished: taking {newest}")
        path = newest
    return path


def stored_split(config: Any) -> dict[str, Any]:
    """How the run that left a model kept validation and test images aside, from its `config.json`:
    keywords for loading a data set, so that no image it was trained on is taken for one of them.
    """
    for key in ("v2m", "training", "data"):
        config = config.get(key) if isinstance(config, dict) else None
    found = config if isinstance(config, dict) else {}
    keywords = {"validation_fraction": "validation_fraction", "split_seed": "seed"}
    return {
        keyword: found[name]
        for name, keyword in keywords.items()
        if isinstance(found.get(name), int | float)
    }


def evaluate_on(
    model_path: str | os.PathLike,
    data: str,
    *,
    split: str = "test",
    batch_size: int = 128,
    workers: int | None = None,
    device: str = "auto",
    shuffled: bool = False,
    seed: int = 0,
    on_error: str = "raise",
    console: Console | None = None,
) -> dict[str, Any]:
    """Figures of a stored model on one split of a data set, ready for JSON.

    Args:
        model_path: a run's folder, or anything `v2m.from_checkpoint` reads.
        data: a name of `v2m data`, or a folder of images.
        shuffled: put the patches of each image in random order, drawn from `seed`.
        console: where to show the progress.

    Raises:
        InputError: for anything that cannot be used, or a data set with other classes.
    """
    reporter = Reporter() if console is None else ConsoleReporter(console, epochs=1, steps=1)
    folder = model_folder(model_path, reporter)
    model = v2m.from_checkpoint(folder).to(choose_device(device, Ranks()))
    config = read_config(folder) if (folder / "config.json").is_file() else {}
    dataset = load_dataset(data, split, on_error=on_error, **stored_split(config))
    check_classes(model, dataset)
    cfg = model.pretrained_cfg
    loader = create_loader(
        dataset,
        DataConfig(
            crop_pct=cfg.get("crop_pct", 0.875), interpolation=cfg.get("interpolation", "bicubic")
        ),
        is_training=False,
        input_size=cfg["input_size"],
        batch_size=batch_size,
        mean=cfg["mean"],
        std=cfg["std"],
        num_workers=workers,
    )
    transform = _shuffler(model, seed) if shuffled else None
    with reporter:
        reporter.start_evaluation(f"{dataset.name} {split}", len(dataset))
        result = evaluate_classifier(
            model, loader, transform=transform, on_batch=reporter.evaluated
        )
    return {
        "model": str(model_path),
        "data": data,
        "split": split,
        "shuffled_patches": shuffled,
        "skipped": len(loader.skipped),
        **result.summary(),
        "classes": class_rows(result, dataset.classes),
        "confusion": result.confusion.tolist(),
    }


def _shuffler(model: nn.Module, seed: int) -> Callable[[Tensor], Tensor]:
    """Puts the patches of each image of a batch in random order."""
    generator, size = torch.Generator().manual_seed(seed), patch_size(model)
    if size is None:
        raise InputError(
            f"{type(model).__name__} has no patches of one size, so they cannot be shuffled: "
            "leave --shuffle-patches out."
        )
    return lambda images: shuffle_patches(images, size, generator)


def check_classes(model: nn.Module, dataset: ImageDataset) -> None:
    """InputError unless the model's classes are the data set's, in the same order."""
    names = model.pretrained_cfg.get("label_names")
    if names is not None and list(names) != list(dataset.classes):
        missing = sorted(set(dataset.classes) - set(names))
        detail = f"; the model does not know {', '.join(missing[:5])}" if missing else ""
        raise InputError(
            f"the model was trained for the classes {', '.join(names[:5])}... ({len(names)}) and "
            f"{dataset.name} has {', '.join(dataset.classes[:5])}... ({len(dataset.classes)}): "
            f"they must be the same, in the same order{detail}."
        )
    if model.num_classes != len(dataset.classes):
        raise InputError(
            f"the model has {model.num_classes} classes and {dataset.name} has "
            f"{len(dataset.classes)}: evaluate it on the data set it was trained for."
        )


def class_rows(result: ClassificationResult, classes: list[str]) -> list[dict[str, Any]]:
    """One entry a class: its images, its accuracy and what it is most often mistaken for."""
    rows = []
    for index, (name, accuracy) in enumerate(zip(classes, result.per_class)):
        counts = result.confusion[index].copy()
        total, counts[index] = int(counts.sum()), 0
        order = [int(i) for i in np.argsort(-counts, kind="stable")[:MISTAKES] if counts[i]]
        rows.append(
            {
                "class": name,
                "images": total,
                "accuracy": None if np.isnan(accuracy) else float(accuracy),
                "mistakes": [{"class": classes[i], "images": int(counts[i])} for i in order],
            }
        )
    return rows
