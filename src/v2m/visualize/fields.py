"""The report's section on receptive fields: trained and untrained weights, under both scans."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from v2m.models import create_model
from v2m.models.table import count_multiply_adds
from v2m.predict import Predictor

from .figures import draw_receptive_fields, themed_svg
from .receptive_field import (
    center_token,
    effective_receptive_field,
    gradient_share,
    quarter_means,
    with_scan,
)
from .run import Run

__all__ = ["field_section", "receptive_fields"]

SCANS = ("corners", "release")


def field_section(run: Run, predictor: Predictor, count: int | None) -> dict[str, Any] | None:
    """Receptive fields of the middle token over test images (noise where there are none).

    Args:
        run: What the report is about.
        predictor: Its model.
        count: Images to average over; None for as many, 4 to 64, as take about a minute.
    """
    model = predictor.model
    if not hasattr(getattr(model, "config", None), "scan"):
        run.missing.append(
            f"Receptive fields under both scans: {run.model['architecture']} has no scan."
        )
        return None
    images = _images(run, predictor, count or _affordable(predictor))
    grid = token_grid(model, images)
    scans = list(dict.fromkeys((model.config.scan, *SCANS)))
    if grid[0] != grid[1]:
        scans.remove("release")
        run.missing.append(
            "Receptive field under the scan “release”: it needs a square grid of tokens, and this "
            f"model's is {grid[0]} x {grid[1]}."
        )
    untrained = untrained_like(run, model)
    rows = {
        "trained": receptive_fields(model, images, scans),
        "at initialisation": receptive_fields(untrained, images, scans),
    }
    figure = draw_receptive_fields(list(rows.values()), list(rows), mark=_middle(grid, images))
    return {
        "svg": themed_svg(figure, "fields"),
        "sentences": _explain(run, rows, model, len(images), grid),
        "table": [
            {"weights": name, "scan": scan, **_figures(field, grid)}
            for name, row in rows.items()
            for scan, field in row.items()
        ],
    }


def receptive_fields(model: nn.Module, images: Tensor, scans: list[str]) -> dict[str, np.ndarray]:
    """The receptive field of the same weights under each scan, (H, W) each."""
    return {scan: effective_receptive_field(with_scan(model, scan), images) for scan in scans}


def untrained_like(run: Run, model: nn.Module) -> nn.Module:
    """The model with the fresh weights of the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.settings.get("run.seed", 0))
        fresh = create_model(run.model["architecture"], **run.model.get("model_args", {}))
    return fresh.to(next(model.parameters()).device).eval()


def token_grid(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Rows and columns of the model's last feature map: what begins a token has one."""
    reduction = model.feature_info[-1]["reduction"]
    height, width = (math.ceil(side / reduction) for side in images.shape[-2:])
    return height, width


def _affordable(predictor: Predictor) -> int:
    """64 images on an accelerator; on a CPU fewer, the larger the model is."""
    if predictor.device.type != "cpu":
        return 64
    return int(np.clip(1.6e10 / count_multiply_adds(predictor.model, predictor.input_size), 4, 64))


def _images(run: Run, predictor: Predictor, count: int) -> Tensor:
    """Prepared test images evenly over the set, (B, C, H, W)."""
    if run.dataset is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(count, *predictor.input_size, generator=generator)
        return noise.to(predictor.device)
    indices = np.linspace(0, len(run.dataset) - 1, min(count, len(run.dataset))).astype(int)
    images = [predictor.prepare(run.dataset[int(index)][0]) for index in indices]
    return torch.stack(images).to(predictor.device)


def _middle(grid: tuple[int, int], images: Tensor) -> tuple[float, float]:
    """Row and column of the middle token's own middle, in pixels."""
    sides = zip(center_token(*grid), images.shape[-2:], grid)
    row, column = ((token + 0.5) * side / tokens - 0.5 for token, side, tokens in sides)
    return row, column


def _figures(field: np.ndarray, grid: tuple[int, int]) -> dict[str, str]:
    means = quarter_means(field, grid)
    weakest, strongest = min(means, key=means.get), max(means, key=means.get)
    ratio = means[weakest] / means[strongest] if means[strongest] > 0 else float("nan")
    return {
        "quarters": f"{weakest}, {ratio:.2g} of the {strongest}",
        "share": f"{100 * gradient_share(field):.0f}\u00a0%",
    }


def _explain(
    run: Run, rows: dict, model: nn.Module, count: int, grid: tuple[int, int]
) -> list[str]:
    source = "test images" if run.dataset is not None else "images of noise"
    sentences = [
        "How strongly each pixel moves the token in the middle, marked by the cross: the gradient "
        f"of that token's features, averaged over {count} {source} (Luo et al. 2016), on a "
        "logarithmic scale. In a row the weights are the same and only the scan changes; this "
        f"model was trained with “{model.config.scan}”."
    ]
    untrained = rows["at initialisation"]
    if "release" in untrained:
        sentences.append(
            "“corners” starts from all four corners and maps every direction back to the pixel it "
            "came from. “release” is what the code published with the paper computes: it never "
            "starts in the lower right, and adds its directions up mirrored and transposed. "
            f"{_compare(untrained, grid)}"
        )
    return sentences


def _compare(row: dict[str, np.ndarray], grid: tuple[int, int]) -> str:
    """The quarter that loses most when the scan is switched, in words."""
    corners, release = (quarter_means(row[scan], grid) for scan in SCANS)
    kept = {name: release[name] / corners[name] for name in corners if corners[name] > 0}
    most = min(kept, key=kept.get)
    if kept[most] == 0:
        return f"At initialisation that makes the middle deaf to the {most} quarter of the image."
    fainter = 1 / kept[most]
    if fainter < 1.2:
        return (
            "In this model that changes little at initialisation: to the middle no quarter of the "
            "image is fainter under “release” by more than a fifth."
        )
    return (
        f"At initialisation that costs the {most} quarter most: under “release” the middle hears "
        f"it {fainter:.{0 if fainter >= 10 else 1}f} times more faintly than under “corners”."
    )
