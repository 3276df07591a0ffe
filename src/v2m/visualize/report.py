"""The report of a training run: one HTML file that needs nothing else."""

from __future__ import annotations

import datetime
import os
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

import v2m
from v2m.data.datasets import ImageDataset
from v2m.errors import InputError
from v2m.models.table import count_multiply_adds
from v2m.predict import Predictor

from . import sections
from .fields import field_section
from .machine import describe_machine
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

    What the run's folder lacks is left out of the report and named at its end.

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
    page = _render(
        **shown,
        sections=there,
        model=run.model["architecture"],
        subtitle=_subtitle(run, predictor),
        uses=sections.uses(run),
        made=sections.how_made(run),
        configuration=[(key, _written(value)) for key, value in run.settings.items()],
        versions=list((run.machine or describe_machine()).items()),
        missing=run.missing,
        version=v2m.__version__,
        date=datetime.datetime.now().strftime("%d %B %Y, %H:%M"),
    )
    path = Path(output) if output is not None else run.directory / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report to {path}: {error.strerror}.") from error
    return path


def _render(**context: object) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = files("v2m.visualize")
    template = environment.from_string((folder / "report.html.jinja").read_text(encoding="utf-8"))
    style = (folder / "report.css").read_text(encoding="utf-8")
    return template.render(style=style, **context)


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


def _written(value: object) -> str:
    """A setting's value as `--set` takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
