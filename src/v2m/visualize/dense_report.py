"""The report of a run of detection or segmentation: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v2m.evaluation.matching import Thresholds, match_data_set
from v2m.predict_dense import DensePredictor

from . import dense_sections as sections
from .dense_examples import class_examples, legend, object_examples
from .dense_run import DenseDataset, DenseRun, read_dense_run
from .machine import describe_machine
from .page import write_page, written
from .sections import how_made

__all__ = ["write_dense_report"]

SECTIONS = {
    "headline": "Result",
    "curves": "Training",
    "classes": "Classes",
    "thresholds": "Scores",
    "examples": "Examples",
    "use": "Use it",
    "run": "How it was made",
}
TITLES = {"faster_rcnn": "Faster R-CNN", "mask_rcnn": "Mask R-CNN", "upernet": "UperNet"}
DEFAULT_SCORE = 0.5


def write_dense_report(
    run_directory: Path,
    *,
    output: Path | None = None,
    dataset: DenseDataset | None = None,
    examples: int = 6,
    device: str = "auto",
) -> Path:
    """Write the report of a run: figures, curves, classes, and test images with predictions.

    What the run's folder lacks is left out of the report and named at its end.

    Args:
        run_directory: What `v2m train --output` wrote.
        output: Where to write; by default `report.html` in the run's folder.
        dataset: The test images, where they are not those of the run's configuration.
        examples: How many images to show, at most.
        device: Where to run a segmenter on them; a detector's detections are stored.

    Raises:
        InputError: There is no trained model in the folder, one of its files is damaged, or the
            report cannot be written.
    """
    run = read_dense_run(run_directory, dataset=dataset)
    predictor = DensePredictor(run.directory, device=device)
    cards, found = _examples(run, predictor, examples)
    score = None if found is None or found.best is None else float(found.scores[found.best])
    shown: dict[str, Any] = {
        "headline": sections.headline(run),
        "curves": sections.curves(run),
        "classes": sections.class_table(run),
        "thresholds": sections.thresholds(found),
        "examples": cards,
    }
    there = {anchor: name for anchor, name in SECTIONS.items() if shown.get(anchor, True)}
    path = Path(output) if output is not None else run.directory / "report.html"
    write_page(
        "dense.html.jinja",
        path,
        **shown,
        sections=there,
        legend=legend(run),
        score=DEFAULT_SCORE if score is None else score,
        task=run.task,
        model=_title(run),
        subtitle=_subtitle(run, predictor),
        uses=sections.uses(run, score),
        made=how_made(run),
        configuration=[(key, written(value)) for key, value in run.settings.items()],
        versions=list((run.machine or describe_machine()).items()),
        missing=run.missing,
    )
    return path


def _examples(
    run: DenseRun, predictor: DensePredictor, count: int
) -> tuple[list[dict[str, Any]], Thresholds | None]:
    if run.dataset is None or not len(run.dataset):
        return [], None
    if run.task == "segment":
        return class_examples(run, predictor, count), None
    if run.rows is None:
        return [], None
    matches = match_data_set(run.dataset, run.rows)
    found = Thresholds.of(matches)
    score = DEFAULT_SCORE if found.best is None else float(found.scores[found.best])
    return object_examples(run, matches, score, count), found


def _title(run: DenseRun) -> str:
    return f"{TITLES[run.model['architecture']]}, {run.model['model_args']['backbone']}"


def _subtitle(run: DenseRun, predictor: DensePredictor) -> str:
    parameters = sum(parameter.numel() for parameter in predictor.model.parameters())
    backbone = sum(parameter.numel() for parameter in predictor.model.body.parameters())
    data = run.dataset.name if run.dataset is not None else run.settings.get("data.name")
    count = len(run.classes)
    return (
        f"{parameters / 1e6:.1f} M parameters, {backbone / 1e6:.1f} M of them in the backbone, "
        f"{count} {'class' if count == 1 else 'classes'}" + (f", trained on {data}" if data else "")
    )
