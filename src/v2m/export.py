"""Models as single files that run without this library: ONNX and `torch.export` (.pt2).

The file takes prepared images, `images` (B, C, H, W) float32, and gives `logits` (B, K). It carries
its description, the `config.json` of the model: preprocessing (`pretrained_cfg`: size, crop,
interpolation, mean, std), class names (`label_names`) and architecture.

The batch is dynamic, and so are height and width: multiples of the patch for plain models, any size
for hierarchical ones. The scans become loops of dynamic length (`Scan` in ONNX, `scan` in torch).
Where torch does not go: it takes a side of one token for a constant, so dynamic sides begin at two
patches (plain) and 33 pixels (hierarchical, whose last stage then has two rows), and sizes that a
model would pad (`dynamic_img_pad`) or that its geometry does not take (`scan="release"`, square
grids alone) are exported at the model's own size. A .pt2 is best run by `run_exported`, or as
`torch.export.load(path).module(check_guards=False)`: torch notes memory layouts it met as guards,
and these would refuse some sizes that the program computes rightly.
"""

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from v2m.errors import InputError
from v2m.models.checkpoint import hub_config
from v2m.models.plain import Plain

__all__ = ["FORMATS", "export_model", "parity", "read_description", "run_exported", "sample_sizes"]

FORMATS = ("onnx", "pt2")
DESCRIPTION = "v2m_config.json"  # the extra file in .pt2, the metadata property in ONNX
LARGEST_SIDE = 4096  # pixels


def export_model(
    model: nn.Module, path: str | Path, *, format: str | None = None, dynamic_size: bool = True
) -> Path:
    """Write the model to one file, on the CPU, in float32 and evaluation mode.

    Args:
        model: a model of this library.
        path: the file; .onnx or .pt2 by its format.
        format: "onnx" or "pt2"; by default from the suffix of `path`.
        dynamic_size: take any height and width as above; False fixes the model's own size.

    Raises:
        InputError: an unknown format, a package that is missing, or a model of another library.
    """
    path = Path(path)
    format = _format(path, format)
    _check_packages(format)
    if not hasattr(model, "config"):
        raise InputError(f"`model` must be a model of v2m; got a {type(model).__name__}.")
    program = _trace(model, dynamic_size)
    description = json.dumps(hub_config(model))
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "pt2":
        torch.export.save(program, path, extra_files={DESCRIPTION: description})
    else:
        _save_onnx(program, path, description)
    return path


def read_description(path: str | Path) -> dict[str, Any]:
    """The description that an exported file carries."""
    path = Path(path)
    if _format(path, None) == "pt2":
        extra = {DESCRIPTION: ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[DESCRIPTION])
    import onnx

    properties = onnx.load(path, load_external_data=False).metadata_props
    return json.loads(next(item.value for item in properties if item.key == DESCRIPTION))


def run_exported(path: str | Path):
    """A function from images (B, C, H, W) to logits (B, K) that runs the file on the CPU."""
    path = Path(path)
    if _format(path, None) == "pt2":
        return torch.export.load(path).module(check_guards=False)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def parity(model: nn.Module, path: str | Path, sizes: list[tuple[int, int, int]]) -> float:
    """The largest |file - model| relative to the largest logit, over (B, H, W) of random images."""
    run, model = run_exported(path), _prepared(model)
    worst = 0.0
    for seed, (batch, height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(batch, model.config.in_chans, height, width, generator=generator)
        expected = model(images)
        error = (run(images) - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        worst = max(worst, float(error))
    return worst


def sample_sizes(model: nn.Module, *, dynamic_size: bool = True) -> list[tuple[int, int, int]]:
    """Five (B, H, W) that the exported file takes: the model's own size and others around it."""
    height, width = model.config.img_size
    if not (dynamic_size and _takes_any_size(model)):
        return [(batch, height, width) for batch in (1, 2, 3, 4, 5)]
    patch = model.config.patch_size if isinstance(model, Plain) else 1
    least = 2 * patch if patch > 1 else 33
    height, width = max(height, least), max(width, least)
    others = [(1, height, 2 * width), (3, least, width), (2, height + patch, least + 3 * patch)]
    return [(2, height, width), *others, (1, least, least + patch)]


def _format(path: Path, format: str | None) -> str:
    format = path.suffix.removeprefix(".") if format is None else format
    if format not in FORMATS:
        raise InputError(f"`format` must be one of {', '.join(FORMATS)}; got {format!r}.")
    return format


def _check_packages(format: str) -> None:
    if format == "onnx":
        try:
            import onnxscript  # noqa: F401  (what torch.onnx needs)
        except ImportError as error:
            raise InputError(
                "the format onnx needs the packages onnx, onnxscript and onnxruntime. Install them"
                " with `pip install 'v2m[export]'`, or use --format pt2."
            ) from error


def _prepared(model: nn.Module) -> nn.Module:
    """A copy to trace: without gradients, whose saved tensors would become part of the program."""
    return deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)


def _takes_any_size(model: nn.Module) -> bool:
    config = model.config
    return getattr(config, "scan", "") != "release" and not getattr(
        config, "dynamic_img_pad", False
    )


def _trace(model: nn.Module, dynamic_size: bool) -> ExportedProgram:
    model = _prepared(model)
    sizes: dict[int, Any] = {0: Dim("batch")}
    height, width = model.config.img_size
    if dynamic_size and _takes_any_size(model):
        if isinstance(model, Plain):
            patch = model.config.patch_size
            rows, columns = (Dim(name, min=2, max=LARGEST_SIDE) for name in ("rows", "columns"))
            sizes |= {2: patch * rows, 3: patch * columns}
            height, width = 5 * patch, 6 * patch  # none of them the model's own, nor equal
        else:
            sizes |= {2: Dim("height", min=33), 3: Dim("width", min=33)}
            height, width = 80, 96
    images = torch.zeros(2, model.config.in_chans, height, width)
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=(sizes,))


def _save_onnx(program: ExportedProgram, path: Path, description: str) -> None:
    logging.getLogger("onnxscript").setLevel(
        logging.ERROR
    )  # it warns of each Split it leaves alone
    onnx_program = torch.onnx.export(
        program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
    )
    onnx_program.model.metadata_props[DESCRIPTION] = description
    onnx_program.save(path, external_data=False)
