"""The report of a training run: one HTML file that needs nothing else."""

from __future__ import annotations

import os
from pathlib import Path

from v2m.data.datasets import ImageDataset
from v2m.errors import InputError
from v2m.evaluation.dense_run import stored_task
from v2m.models.table import count_multiply_adds
from v2m.predict import Predictor

from . import sections
from .dense_report import write_dense_report
from .fields import field_section
from .machine import describe_machine
from .page import write_page, written
from .run import Run, read_run

__all__ = ["write_report"]

# Anchor and name of each section, in the order of the page; the first five may be missing.
SECTIONS = {
    "accuracy": "Accuracy",
    "curves": "Training",
    "confusion": "Confusions",
    "examples": "Examples",
    "fields": "Receptive field",
    "use": "Use it",
    "run": "How it was made",
}


def write_report(
    run_directory: str | os.PathLike,
    *,
    output: str | os.PathLike | None = None,
    dataset: ImageDataset | None = None,
    field_images: int | None = None,
    examples: int = 10,
    device: str = "auto",
) -> Path:
    """Write the report of a run: one HTML file with everything in it.

    A run of detection or segmentation gets its own kind; see `write_dense_report`. What the run's
    folder lacks is left out of the report and named at its end.

    Args:
        run_directory: What `v2m train --output` wrote.
        output: Where to write; by default `report.html` in the run's folder.
        dataset: The test images, where they are not those of the run's configuration.
        field_images: Over how many test images the receptive fields are averaged; by default 64,
            on a CPU fewer for larger models.
        examples: How many right and wrong answers to show, at most.
        device: Where to measure the receptive fields.

    Returns:
        The file written.

    Raises:
        InputError: There is no trained model in the folder, one of its files is damaged, or the
            report cannot be written.
    """
    if field_images is not None and field_images < 1:
        raise InputError(f"`field_images` must be at least 1; got {field_images}.")
    if stored_task(run_directory) != "classify":
        target = None if output is None else Path(output)
        return write_dense_report(
            Path(run_directory), output=target, dataset=dataset, device=device
        )
    run = read_run(run_directory, dataset=dataset)
    predictor = Predictor.load(run.directory, device=device)
    shown = {
        "accuracy": sections.accuracy(run),
        "curves": sections.curves(run),
        "confusion": sections.confusion(run),
        "examples": sections.example_cards(run, examples),
        "fields": field_section(run, predictor, field_images),
    }
    there = {anchor: name for anchor, name in SECTIONS.items() if shown.get(anchor, True)}
    path = Path(output) if output is not None else run.directory / "report.html"
    write_page(
        "report.html.jinja",
        path,
        **shown,
        sections=there,
        model=run.model["architecture"],
        subtitle=_subtitle(run, predictor),
        uses=sections.uses(run),
        made=sections.how_made(run),
        configuration=[(key, written(value)) for key, value in run.settings.items()],
        versions=list((run.machine or describe_machine()).items()),
        missing=run.missing,
    )
    return path


def _subtitle(run: Run, predictor: Predictor) -> str:
    """Size and task of the model in a line."""
    channels, height, width = predictor.input_size
    parameters = sum(parameter.numel() for parameter in predictor.model.parameters())
    billions = count_multiply_adds(predictor.model, predictor.input_size) / 1e9
    data = run.dataset.name if run.dataset is not None else run.settings.get("data.name")
    colours = {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")
    size = f"{parameters / 1e6:.1f} M" if parameters >= 1e6 else f"{parameters:,}"
    return (
        f"{size} parameters, {billions:.2g} GFLOPs, {height} x {width} {colours} images, "
        f"{len(run.classes)} classes" + (f", trained on {data}" if data else "")
    )
