"""`v2m predict`: the classes of an image, or of all images in a folder."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from v2m.errors import InputError

__all__ = ["add_parser", "run"]

FORMATS = ("table", "csv", "json")
TASKS = ("classify", "detect", "segment")
DESCRIPTION = """\
Classify an image, or all images in a folder and the folders in it, with the preprocessing and the
class names that are stored with the model. Of a detector or a segmenter, draw what it finds into
the folder --output, and write COCO JSON or PNG maps.
"""
EPILOG = """\
examples:
  v2m predict runs/demo picture.png
  v2m predict runs/demo photos/ --top 1 --output classes.csv
  v2m predict runs/found photos/ --output found/ --score 0.3
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `v2m predict` to the command line."""
    parser = subparsers.add_parser(
        "predict",
        help="classify an image or a folder of images",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="directory that training wrote, or a checkpoint")
    add("images", metavar="IMAGES", type=Path, help="image file, or folder")
    add("--top", metavar="N", type=int, help="classes per image (default: 5)")
    add("--format", choices=FORMATS, help="default: by --output, else table")
    add(
        "--output", metavar="FILE", type=Path, help="write to this file, or pictures to this folder"
    )
    add("--batch-size", metavar="N", type=int, default=32, help="images at once (default: 32)")
    add("--device", metavar="DEVICE", default="auto", help="cpu, cuda, mps or auto (default)")
    add("--skip-bad", action="store_true", help="go on past images that cannot be read")
    add("--task", choices=TASKS, help="refuse a model of another task (default: the model's own)")
    add("--score", metavar="P", type=float, help="least score drawn (default: 0.5)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Classify, and print or write the result; 0, or InputError."""
    from v2m.engine.progress import ConsoleReporter
    from v2m.evaluation.dense_run import stored_task
    from v2m.evaluation.run import model_folder
    from v2m.predict import Predictor, find_images

    messages = Console(stderr=True)
    args.model = model_folder(args.model, ConsoleReporter(messages, epochs=1, steps=1))
    task = stored_task(args.model)
    if args.task not in (None, task):
        raise InputError(f"--task {args.task}: {args.model} was trained to {task}.")
    if task != "classify":
        return _run_dense(args)
    _refuse(args, "score", "for detectors and segmenters")
    if args.output is not None and args.output.is_dir():
        raise InputError(
            f"--output {args.output} is a folder: name a file in it, such as"
            f" {args.output / 'classes.csv'}."
        )
    form = _format(args.format, args.output)
    paths = find_images(args.images)
    predictor = Predictor.load(args.model, device=args.device)
    skipped: list[tuple[Path, str]] = []
    predictions = []
    with _progress(messages, disable=len(paths) <= args.batch_size) as progress:
        task = progress.add_task("classifying", total=len(paths))
        for prediction in predictor.predict(
            paths,
            top=5 if args.top is None else args.top,
            batch_size=args.batch_size,
            skipped=skipped if args.skip_bad else None,
        ):
            predictions.append(prediction)
            progress.update(task, completed=len(predictions) + len(skipped))
    for _, reason in skipped:
        messages.print(f"skipped: {reason}", style="yellow", markup=False, highlight=False)
    if skipped:
        messages.print(f"{len(skipped)} of {len(paths)} images could not be read", style="yellow")
    _write(predictions, form, args.output)
    return 0


def _run_dense(args: argparse.Namespace) -> int:
    """Draw what a detector or a segmenter finds into the folder --output."""
    from v2m.predict import find_images
    from v2m.predict_dense import DensePredictor, predict_to_folder

    _refuse(args, "top", "for classifiers")
    _refuse(args, "format", "for classifiers")
    score = 0.5 if args.score is None else args.score
    if args.output is None:
        raise InputError("--output is missing: name the folder for the pictures and results.")
    if args.output.is_file():
        raise InputError(f"--output {args.output} is a file: name a folder.")
    if not 0 <= score <= 1:
        raise InputError(f"--score {score}: expected a number from 0 to 1.")
    paths = find_images(args.images)
    predictor = DensePredictor(args.model, device=args.device)
    skipped: list[tuple[Path, str]] = []
    messages = Console(stderr=True)
    with _progress(messages, disable=len(paths) == 1) as progress:
        task = progress.add_task("predicting", total=len(paths))
        kept = skipped if args.skip_bad else None
        written = predict_to_folder(predictor, paths, args.output, score=score, skipped=kept)
        done = 0
        for done, _ in enumerate(written, 1):
            progress.update(task, completed=done + len(skipped))
    for _, reason in skipped:
        messages.print(f"skipped: {reason}", style="yellow", markup=False, highlight=False)
    Console().print(f"{done} of {len(paths)} images are in {escape(str(args.output))}")
    return 0


def _refuse(args: argparse.Namespace, option: str, what: str) -> None:
    """InputError for an option that would do nothing."""
    if getattr(args, option) is not None:
        raise InputError(f"--{option} is {what}; {args.model} is none.")


def _format(name: str | None, output: Path | None) -> str:
    if name is not None:
        return name
    suffix = output.suffix.lower().lstrip(".") if output is not None else ""
    return suffix if suffix in FORMATS else "table"


def _progress(console: Console, *, disable: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=disable
    )


def _write(predictions: Sequence, form: str, output: Path | None) -> None:
    if form == "table":
        if output is None:
            Console().print(_table(predictions))
            return
        console = Console(file=io.StringIO(), width=160)
        console.print(_table(predictions))
        text = console.file.getvalue()
    else:
        text = _csv(predictions) if form == "csv" else _json(predictions)
    if output is None:
        print(text, end="")
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}.") from error


def _table(predictions: Sequence) -> Table:
    """A row a class for one image; a row an image, best first, for several."""
    if len(predictions) == 1:
        (only,) = predictions
        table = Table(title=escape(str(only.path)), box=None, pad_edge=False)
        table.add_column("class")
        table.add_column("probability", justify="right")
        table.add_column("")
        for label, probability in zip(only.labels, only.probabilities):
            bar = "█" * round(30 * probability)
            table.add_row(escape(label), f"{100 * probability:.1f} %", f"[cyan]{bar}[/]")
        return table
    table = Table(box=None, pad_edge=False)
    table.add_column("image", overflow="fold")
    ranks = max((len(prediction.labels) for prediction in predictions), default=0)
    for rank in range(ranks):
        table.add_column(f"{rank + 1}.", style="bold" if rank == 0 else "dim", overflow="fold")
    for prediction in predictions:
        guesses = zip(prediction.labels, prediction.probabilities)
        cells = (f"{escape(label)} {100 * probability:.1f} %" for label, probability in guesses)
        table.add_row(escape(str(prediction.path)), *cells)
    return table


def _rows(prediction) -> list[dict]:
    guesses = zip(prediction.classes, prediction.labels, prediction.probabilities)
    return [
        {"rank": rank, "class": index, "label": label, "probability": probability}
        for rank, (index, label, probability) in enumerate(guesses, 1)
    ]


def _csv(predictions: Sequence) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "rank", "class", "label", "probability"))
    for prediction in predictions:
        for row in _rows(prediction):
            writer.writerow((prediction.path, *row.values()))
    return text.getvalue()


def _json(predictions: Sequence) -> str:
    records = [{"path": str(p.path), "predictions": _rows(p)} for p in predictions]
    return json.dumps(records, indent=2, ensure_ascii=False) + "\n"
