"""`v2m models`: the table of models."""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from v2m.errors import InputError

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `v2m models` to the command line."""
    parser = subparsers.add_parser(
        "models",
        help="list the models",
        description="List the models with their parameters, GFLOPs (1e9 multiply-adds for one "
        "image, counted on the model itself) and input size.",
    )
    parser.add_argument("filter", nargs="?", help="part of a name, or a pattern like '*tiny*'")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="format")
    form.add_argument("--csv", action="store_const", const="csv", dest="format")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print the models that match; 0, or InputError if there is none."""
    from v2m.models import list_models
    from v2m.models.table import model_table

    rows = model_table(_matching(list_models(), args.filter))
    if args.format == "json":
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif args.format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("name", "parameters", "multiply_adds", "input_size", "description"))
        for row in rows:
            size = "x".join(map(str, row.input_size))
            writer.writerow((row.name, row.parameters, row.multiply_adds, size, row.description))
    else:
        Console().print(_table(rows))
    return 0


def _matching(names: Sequence[str], pattern: str | None) -> list[str]:
    if pattern is None:
        return list(names)
    wildcard = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = fnmatch.filter(names, wildcard.lower())
    if not found:
        raise InputError(f"no model matches {pattern!r}; there are {', '.join(names)}.")
    return found


def _table(rows: Sequence) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", style="cyan", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("GFLOPs", justify="right", no_wrap=True)
    table.add_column("input", justify="right", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for row in rows:
        channels, height, width = row.input_size
        table.add_row(
            row.name,
            f"{row.parameters / 1e6:.2f} M",
            f"{row.multiply_adds / 1e9:.{2 if row.multiply_adds >= 1e8 else 3}f}",
            f"{height} x {width} x {channels}",
            row.description,
        )
    return table
