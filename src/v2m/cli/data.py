"""`v2m data`: the data sets there are, fetching one, and checking a folder of images."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from v2m.errors import InputError

__all__ = ["add_parser", "run"]

FOLDER_HINT = """\
A folder of images works as --data too:
  DIR/train/<class>/*.jpg, DIR/validation/<class>/..., DIR/test/<class>/...
or just DIR/<class>/*.jpg, which is then split. `v2m data check DIR` reads all of it.
Tar shards (webdataset) are wds:DIR, a Hugging Face data set on this disk hfds:DIR.\
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `v2m data` to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="list the data sets, fetch one, or check a folder of images",
        description="List the data sets, fetch one, or check a folder of images.",
    )
    parser.set_defaults(run=run, action=_list)
    actions = parser.add_subparsers(metavar="{list,download,check}")
    listing = actions.add_parser("list", help="show what there is (the default)")
    listing.set_defaults(action=_list)
    fetching = actions.add_parser(
        "download",
        help="fetch a data set",
        description="Fetch a data set from where its authors publish it, with its checksums "
        "verified. What is already there and intact is kept.",
    )
    fetching.add_argument("name", help="fashion-mnist")
    fetching.add_argument(
        "--directory",
        type=Path,
        help="where to (default: $V2M_DATA/NAME, else $XDG_CACHE_HOME/v2m/NAME, else "
        "~/.cache/v2m/NAME)",
    )
    fetching.add_argument("--source", help="address of a folder that has the files, a mirror")
    fetching.set_defaults(action=_download)
    checking = actions.add_parser(
        "check",
        help="read every image of a folder",
        description="Read every image of a folder and name the bad ones, empty classes and classes "
        "that differ between its splits. Ends with 2 if there is any.",
    )
    checking.add_argument("folder", type=Path)
    checking.set_defaults(action=_check)


def run(args: argparse.Namespace) -> int:
    """Do what was asked; 0, or InputError for what cannot be used."""
    return args.action(args)


def _list(args: argparse.Namespace) -> int:
    from v2m.data import describe

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("data set", style="cyan", no_wrap=True)
    table.add_column("train + test images", justify="right", no_wrap=True)
    table.add_column("classes", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("where", overflow="fold")
    for info in describe():
        channels, height, width = info.image_size
        if info.location is None:
            where = f"[yellow]not here yet: {escape(info.hint)}[/]"
        else:
            where = "part of v2m" if info.bundled else escape(str(info.location))
        table.add_row(
            info.name,
            " + ".join(f"{count:,}" for count in info.images.values()),
            str(len(info.classes)),
            f"{height} x {width} x {channels}",
            where,
        )
    console = Console()
    console.print(table)
    console.print()
    console.print(FOLDER_HINT, highlight=False, markup=False, soft_wrap=True)
    return 0


def _download(args: argparse.Namespace) -> int:
    from v2m.data.downloads import SOURCES, download
    from v2m.data.fashion_mnist import candidates

    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as display:
        tasks = {}

        def show(name: str, done: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = display.add_task(name, total=total)
            display.update(tasks[name], completed=done, total=total)

        sources = (args.source,) if args.source else SOURCES
        directory = download(args.name, args.directory, show, sources=sources)
    message = f"{args.name} is in {directory}"
    if directory not in candidates():
        message += f"; for v2m to find it, set V2M_DATA={directory}"
    console.print(message, highlight=False, markup=False, soft_wrap=True)
    return 0


def _check(args: argparse.Namespace) -> int:
    from v2m.data.check import check_folder

    console = Console()
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as display:
        task = display.add_task("reading", total=None)
        report = check_folder(
            args.folder, lambda done, total: display.update(task, completed=done, total=total)
        )
    for split, counts in report.images.items():
        sizes = f"{min(counts.values())} to {max(counts.values())} each" if counts else "none"
        total = sum(counts.values())
        console.print(f"{split}: {total:,} images in {len(counts)} classes ({sizes})")
    faults = [*report.problems, *report.bad]
    if faults:
        listed = textwrap.indent("\n".join(faults), "  ")
        raise InputError(
            f"{args.folder} has {len(report.bad)} unreadable images and {len(report.problems)} "
            f"other problems:\n{listed}"
        )
    console.print("every image can be read")
    return 0
