"""What a training run left in its folder, read for the report. What is missing is said in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from v2m.data import load_dataset
from v2m.data.datasets import ImageDataset
from v2m.errors import InputError
from v2m.models import read_config

from .results import Results

__all__ = ["Run", "read_log", "read_run"]


@dataclass(kw_only=True)
class Run:
    """A run's files.

    Attributes:
        directory: Where they lie.
        model: `config.json`, in timm's Hub schema.
        settings: The training configuration, by dotted key.
        epochs: The records of the epochs, in order.
        test: The record of the test images, or empty.
        results: Class probabilities of the test images, or None.
        dataset: The test images, or None.
        missing: A sentence for each thing that is not there.
    """

    directory: Path
    model: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    test: dict[str, Any] = field(default_factory=dict)
    results: Results | None = None
    dataset: ImageDataset | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def machine(self) -> dict[str, Any]:
        """Versions and machine of the training, where it recorded them."""
        return self.test.get("machine", {})

    @property
    def classes(self) -> list[str]:
        """Class names; "class 7" for a model without names."""
        count = self.model["num_classes"]
        for names in (self.model.get("label_names"), self.dataset and self.dataset.classes):
            if names and len(names) == count:
                return list(names)
        return [f"class {index}" for index in range(count)]


def read_run(directory: str | Path, *, dataset: ImageDataset | None = None) -> Run:
    """Read a run's folder.

    Args:
        directory: What `v2m train --output` wrote; config.json and model.safetensors must be there.
        dataset: The test images, where they are not those the configuration names.

    Raises:
        InputError: There is no trained model in the folder, or one of its files is damaged.
    """
    from v2m.engine.rundir import PREDICTIONS  # here, since training writes reports itself

    run = Run(directory=Path(directory), model=read_config(directory))
    read_log(run)
    run.dataset = dataset or _test_images(run)
    run.results = _predictions(run, run.directory / PREDICTIONS)
    return run


def read_log(run: Run) -> None:
    """Read a run's configuration and its records, or say that they are missing."""
    from v2m.engine.config import to_dict  # here, since training writes reports itself
    from v2m.engine.rundir import RunDirectory

    stored = RunDirectory(run.directory)
    records = stored.records()
    run.epochs = [record for record in records if record["kind"] == "epoch"]
    run.test = next((record for record in records if record["kind"] == "test"), {})
    config = stored.config()
    if config is not None:
        run.settings = dict(_flat(to_dict(config)))
    else:
        run.missing.append("The training configuration: the folder has no train_config.json.")
    if not run.epochs:
        run.missing.append("The curves: the folder has no record of the epochs (metrics.jsonl).")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested sections as (dotted key, value)."""
    pairs = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value))
    return pairs


def _test_images(run: Run) -> ImageDataset | None:
    name = run.settings.get("data.name")
    if name is None:
        return None
    try:
        return load_dataset(
            name,
            "test",
            validation_fraction=run.settings["data.validation_fraction"],
            seed=run.settings["data.split_seed"],
        )
    except InputError as error:
        run.missing.append(f"Example images: the test images are not at hand ({error})")
        return None


def _predictions(run: Run, path: Path) -> Results | None:
    """The stored probabilities; the data set is cut to the images they are about."""
    if not path.is_file():
        run.missing.append(
            f"Accuracy on test images, confusions and examples: the folder has no {path.name}, "
            "which training writes when it ends on a data set with test images."
        )
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            results = Results(
                probabilities=np.asarray(arrays["probabilities"], dtype=np.float64),
                targets=np.asarray(arrays["targets"], dtype=np.int64),
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}. Evaluate the model again.") from error
    count = len(results.targets)
    if run.dataset is not None and run.dataset.targets[:count] == results.targets.tolist():
        run.dataset = run.dataset.subset(range(count))
    elif run.dataset is not None:
        run.missing.append(
            f"Example images: {path.name} is about {count} images and the data set "
            f"{run.settings.get('data.name', 'given')!r} has {len(run.dataset)} test images, or in "
            "another order, so they cannot be put side by side."
        )
        run.dataset = None
    return results
