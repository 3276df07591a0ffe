"""`v2m report`: write the report of a training run again."""

from __future__ import annotations

import argparse
from pathlib import Path

from v2m.errors import InputError

__all__ = ["add_parser", "run"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `v2m report` to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="write the report of a training run again",
        description="Write the report of a training run: one HTML file that needs nothing else.",
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="what training wrote")
    parser.add_argument("--output", type=Path, help="default: report.html in that folder")
    parser.add_argument(
        "--field-images", type=int, help="test images to average the receptive fields over"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it lies; 0, or InputError."""
    from v2m.engine.rundir import CHECKPOINTS
    from v2m.visualize.report import write_report

    run = args.directory
    if (run / CHECKPOINTS).is_dir() and not (run / "config.json").exists():
        raise InputError(
            f"the run in {run} is not finished: it gets its report at the end. Go on with v2m train"
            " --resume."
        )
    path = write_report(
        args.directory, output=args.output, field_images=args.field_images, device=args.device
    )
    print(path)
    return 0
