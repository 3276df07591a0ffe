"""`v2m evaluate`: measure a trained model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from v2m.errors import InputError

__all__ = ["add_parser", "run"]

TASKS = ("classify", "detect", "segment")

DESCRIPTION = """\
Measure a trained model on a data set: top-1, top-5, accuracy of each class and the confusions; of a
detector COCO's average precision, of a segmenter the mean IoU.

MODEL is the folder of a run (finished, or still going: then its last checkpoint), or any
checkpoint that v2m reads.
"""

EPILOG = """\
examples:
  v2m evaluate runs/demo --data fashion-mnist-small
  v2m evaluate runs/demo --data photos/ --split validation --json
  v2m evaluate runs/demo --data fashion-mnist-small --shuffle-patches
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `v2m evaluate` to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a trained model on a data set",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, help="the folder of a run, or a checkpoint")
    add("--data", metavar="D", required=True, help="a name of `v2m data`, or a folder of images")
    add("--task", choices=TASKS, help="refuse a model of another task (default: the model's own)")
    add("--split", choices=("train", "validation", "test"), default="test", help="(default: test)")
    add(
        "--batch-size",
        metavar="N",
        type=int,
        help="images at once (default: 128; 1 for dense tasks)",
    )
    add("--workers", metavar="N", type=int, default=2, help="loader processes (default: 2)")
    add("--device", metavar="DEVICE", default="auto", help="auto (default), cpu, cuda or mps")
    add("--shuffle-patches", action="store_true", help="put each image's patches in random order")
    add("--seed", metavar="N", type=int, default=0, help="seed of that order (default: 0)")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    add("--multi-scale", action="store_true", help="segmentation: six scales and mirrored images")
    add("--window", metavar="N", type=int, help="segmentation: slide a window of N pixels")
    add("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print the figures."""
    for name, least in (("batch_size", 1), ("workers", 0), ("seed", 0), ("window", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {least}.")
    from v2m.engine.progress import ConsoleReporter, Reporter
    from v2m.evaluation.dense_run import stored_task
    from v2m.evaluation.run import evaluate_on, model_folder

    console = None if arguments.json else Console()
    reporter = ConsoleReporter(console, epochs=1, steps=1) if console else Reporter()
    folder = model_folder(arguments.model, reporter)
    task = stored_task(folder)
    if arguments.task not in (None, task):
        raise InputError(f"--task {arguments.task}: {arguments.model} was trained to {task}.")
    if task != "classify":
        return _run_dense(arguments, folder, console)
    for name in ("multi_scale", "window"):
        if getattr(arguments, name):
            raise InputError(f"--{name.replace('_', '-')} is for models of --task segment.")
    figures = evaluate_on(
        folder,
        arguments.data,
        split=arguments.split,
        batch_size=arguments.batch_size or 128,
        workers=arguments.workers,
        device=arguments.device,
        shuffled=arguments.shuffle_patches,
        seed=arguments.seed,
        on_error="skip" if arguments.skip_bad else "raise",
        console=console,
    )
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        _print(Console(), figures)
    return 0


def _run_dense(arguments: argparse.Namespace, folder: Path, console: Console | None) -> int:
    from v2m.evaluation.dense_run import evaluate_dense

    if arguments.shuffle_patches:
        raise InputError("--shuffle-patches is for classifiers.")
    figures = evaluate_dense(
        folder,
        arguments.data,
        split=arguments.split,
        batch_size=arguments.batch_size or 1,
        workers=arguments.workers,
        device=arguments.device,
        on_error="skip" if arguments.skip_bad else "raise",
        multi_scale=arguments.multi_scale,
        window=arguments.window,
        console=console,
    )
    if console is None:
        print(json.dumps(figures, indent=2))
    else:
        _print_dense(console, figures)
    return 0


def _print_dense(console: Console, figures: dict[str, Any]) -> None:
    console.print(
        f"{figures['images']} images of {escape(figures['data'])} ({figures['split']})",
        highlight=False,
    )
    if figures["skipped"]:
        console.print(f"{figures['skipped']} bad entries were left out", style="yellow")
    names = {name for row in figures["classes"].values() for name in row}
    columns = [name for name in ("box_ap", "mask_ap", "iou") if name in names]
    table = Table(box=None, pad_edge=False)
    table.add_column("figure", overflow="fold")
    table.add_column("value", justify="right")
    shown = {k: v for k, v in figures.items() if isinstance(v, float)}
    for name, value in shown.items():
        table.add_row(name, f"{value:.4f}" if name == "loss" else f"{value:.2%}")
    console.print(table)
    table = Table(box=None, pad_edge=False)
    table.add_column("class", overflow="fold")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for name, row in figures["classes"].items():
        values = (row.get(column) for column in columns)
        table.add_row(escape(name), *("" if v is None else f"{v:.2%}" for v in values))
    console.print(table)


def _print(console: Console, figures: dict[str, Any]) -> None:
    shuffled = ", patches shuffled" if figures["shuffled_patches"] else ""
    console.print(
        f"[bold]{figures['top1']:.2%}[/] top-1, {figures['top5']:.2%} top-5, loss "
        f"{figures['loss']:.4f} on "
        f"{figures['images']} images of {escape(figures['data'])} ({figures['split']}{shuffled})",
        highlight=False,
    )
    if figures["skipped"]:
        console.print(f"{figures['skipped']} images could not be read", style="yellow")
    table = Table(box=None, pad_edge=False)
    table.add_column("class", overflow="fold")
    for title in ("images", "accuracy"):
        table.add_column(title, justify="right")
    table.add_column("most often taken for", overflow="fold")
    for row in figures["classes"]:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.2%}"
        mistakes = ", ".join(f"{escape(m['class'])} ({m['images']})" for m in row["mistakes"])
        table.add_row(escape(row["class"]), str(row["images"]), accuracy, mistakes)
    console.print(table)
