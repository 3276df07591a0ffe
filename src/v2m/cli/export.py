"""`v2m export`: a trained model as one file that runs without this library."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from v2m.errors import InputError

__all__ = ["add_parser", "run"]

DESCRIPTION = """\
Write a trained model as one ONNX or torch.export (.pt2) file. It takes prepared images (B, C, H, W)
in float32 and gives logits; batch, height and width are dynamic. It carries the preprocessing and
the class names. The file is then run at five sizes and compared with the model.
"""

EPILOG = """\
examples:
  v2m export runs/demo --format onnx
  v2m export runs/demo --format pt2 --output demo.pt2 --fixed-size
"""

TOLERANCE = 1e-4


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `v2m export` to the command line."""
    parser = subparsers.add_parser(
        "export",
        help="write a trained model as an ONNX or torch.export file",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", metavar="DIR", type=Path, help="the folder of a run, or a checkpoint")
    add("--format", choices=("onnx", "pt2"), help="default: by --output, else onnx")
    add("--output", metavar="FILE", type=Path, help="default: model.onnx or model.pt2 in DIR")
    add("--fixed-size", action="store_true", help="the model's own height and width alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, compare, and say where the file is; 0, or InputError."""
    from v2m.engine.progress import ConsoleReporter
    from v2m.evaluation.dense_run import stored_task
    from v2m.evaluation.run import model_folder
    from v2m.export import FORMATS, export_model, parity, sample_sizes
    from v2m.predict import load_model

    format = args.format or (args.output.suffix[1:] if args.output else "onnx")
    folder = args.model if args.model.is_dir() else args.model.parent
    path = args.output or folder / f"model.{format}"
    if format not in FORMATS or path.suffix != f".{format}":
        ending = f".{format}" if format in FORMATS else ".onnx or .pt2"
        raise InputError(f"--output {path}: the name of the file must end in {ending}.")
    source = model_folder(args.model, ConsoleReporter(Console(stderr=True), epochs=1, steps=1))
    if (task := stored_task(source)) != "classify":
        raise InputError(f"{args.model} was trained to {task}: v2m export is for classifiers.")
    model = load_model(source)
    dynamic_size = not args.fixed_size
    sizes = sample_sizes(model, dynamic_size=dynamic_size)
    draft = _draft(path)
    try:
        export_model(model, draft, format=format, dynamic_size=dynamic_size)
        error = parity(model, draft, sizes)
        if error > TOLERANCE:
            raise InputError(
                f"the exported file differs from the model by {error:.1e} of its largest logit,"
                f" more than {TOLERANCE:.0e}, and was removed. Please report the versions of torch"
                " and onnxruntime."
            )
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    shapes = ", ".join(f"{batch} x {height} x {width}" for batch, height, width in sizes)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"wrote {escape(str(path))}, {path.stat().st_size / 1e6:.1f} MB")
    console.print(f"compared with the model at {shapes}: largest difference {error:.1e}")
    return 0


def _draft(path: Path) -> Path:
    """An empty file beside `path`, to be moved there when it is right; exporting takes minutes."""
    draft = path.with_name(f".{path.stem}.draft{path.suffix}")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.touch()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error
    return draft
