"""Pictures: receptive fields, curves, and figures that take the colours of the page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure

from v2m.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = [
    "COLORS",
    "draw_curves",
    "draw_receptive_field",
    "draw_receptive_fields",
    "themed_svg",
]

# What a figure is drawn with, and the colours of the page that `themed_svg` puts in their place.
COLORS = {
    "ink": ("#010203", "var(--ink)"),
    "faint": ("#040506", "var(--faint)"),
    "line": ("#070809", "var(--line)"),
    "first": ("#0a0b0c", "var(--first)"),
    "second": ("#0d0e0f", "var(--second)"),
}
INK, FAINT, LINE, FIRST, SECOND = (drawn for drawn, _ in COLORS.values())

_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def draw_receptive_field(
    field: np.ndarray,
    axes: Axes,
    *,
    scale: str = "log",
    floor: float = 1e-4,
    mark: tuple[float, float] | None = None,
    colormap: str = "magma",
) -> AxesImage:
    """Draw one receptive field and mark the middle of the image with a cross.

    Args:
        field: (H, W), with 1 its largest value, as ``effective_receptive_field`` returns it.
        axes: Where to draw.
        scale: "log" (fields span orders of magnitude), "sqrt" or "linear".
        floor: Lower end of the logarithmic scale, as a fraction of the largest value.
        mark: Row and column of the cross instead of the middle.
        colormap: Name of a matplotlib colour map.
    """
    norms = {
        "log": LogNorm(floor, 1.0, clip=True),
        "sqrt": PowerNorm(0.5, 0.0, 1.0),
        "linear": Normalize(0.0, 1.0),
    }
    if scale not in norms:
        raise InputError(f"`scale` must be one of {', '.join(norms)}; got {scale!r}.")
    shown = np.maximum(field, floor) if scale == "log" else field
    image = axes.imshow(shown, norm=norms[scale], cmap=colormap, interpolation="none")
    height, width = field.shape
    row, column = mark if mark is not None else ((height - 1) / 2, (width - 1) / 2)
    arm = 0.05 * max(height, width)
    for color, thickness in (("black", 2.4), ("white", 1.1)):
        style = {"color": color, "linewidth": thickness, "solid_capstyle": "butt"}
        axes.plot([column - arm, column + arm], [row, row], **style)
        axes.plot([column, column], [row - arm, row + arm], **style)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return image


def draw_receptive_fields(
    fields: Sequence[Mapping[str, np.ndarray]],
    rows: Sequence[str],
    *,
    scale: str = "log",
    floor: float | None = None,
    mark: tuple[float, float] | None = None,
    colormap: str = "magma",
    width: float = 4.8,
) -> Figure:
    """Draw a grid of receptive fields that share one colour bar.

    Args:
        fields: One mapping a row, from the title of a panel to its field (H, W). Equal keys make a
            column; a field left out leaves its place empty.
        rows: The name of each row.
        scale, mark, colormap: As in :func:`draw_receptive_field`.
        floor: Likewise; by default the power of ten below all but the faintest 2 % of pixels.
        width: Width of the figure in inches.
    """
    titles = list(dict.fromkeys(title for row in fields for title in row))
    shapes = [field.shape for row in fields for field in row.values()]
    aspect = max(height / width for height, width in shapes)
    panel = (width - 0.95) / len(titles)
    if floor is None:
        floor = _floor([field for row in fields for field in row.values()])
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, panel * aspect * len(rows) + 0.4), layout="constrained")
        panels = figure.subplots(len(rows), len(titles), squeeze=False)
        for index, (row, name, line) in enumerate(zip(fields, rows, panels)):
            for title, axes in zip(titles, line):
                if title not in row:
                    axes.set_axis_off()
                    continue
                image = draw_receptive_field(
                    row[title], axes, scale=scale, floor=floor, mark=mark, colormap=colormap
                )
                if index == 0:
                    axes.set_title(title, fontsize="medium")
            line[0].set_ylabel(name, color=INK)
        bar = figure.colorbar(image, ax=panels, fraction=0.045, pad=0.02, aspect=32)
        bar.outline.set_visible(False)
        bar.minorticks_off()
        tall = figure.get_figheight() > 3  # else the longer words would be cut off
        bar.set_label("gradient, relative to the largest" if tall else "relative gradient")
    return figure


def _floor(fields: Sequence[np.ndarray]) -> float:
    """The power of ten below all but the faintest 2 % of the values that are not zero."""
    values = np.concatenate([field[field > 0] for field in fields])
    faint = np.quantile(values, 0.02) if values.size else 1e-4
    return float(10 ** np.clip(np.floor(np.log10(faint)), -8, -2))


def draw_curves(
    epochs: Sequence[float],
    curves: Mapping[str, Sequence[float | None]],
    *,
    percent: bool = False,
    label: str = "epoch",
    width: float = 4.8,
    height: float = 2.7,
) -> Figure:
    """Draw up to two curves, each in its colour with its name in a legend without a box.

    Args:
        epochs: Where the points lie.
        curves: Name and values; None where an epoch has no value.
        label: What lies along the horizontal axis.
        percent: Values are fractions, to be written as percentages.
        width, height: Size of the figure in inches.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        for (name, values), color in zip(curves.items(), (FIRST, SECOND)):
            points = [(x, y) for x, y in zip(epochs, values) if y is not None]
            marker = "o" if len(points) < 3 else ""
            axes.plot(*zip(*points), color=color, linewidth=1.8, marker=marker, label=name)
        axes.set_xlabel(label)
        axes.xaxis.get_major_locator().set_params(integer=label == "epoch")
        axes.margins(x=0.02)
        if percent:
            axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        axes.legend(loc="best", labelcolor="linecolor", handlelength=1.2)
    return figure


def themed_svg(figure: Figure, name: str) -> str:
    """A figure as inline SVG whose text and lines take the page's colours and font.

    Args:
        figure: Drawn in the colours of ``COLORS``.
        name: Different for each figure of a page: it keeps their inner ids apart.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    unused_ids = r' id="(?:image\w+|[\w.]+_\d+)"'
    for clutter in (r"<metadata>.*?</metadata>", r"<style.*?</style>", unused_ids):
        svg = re.sub(clutter, "", svg, flags=re.DOTALL)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for drawn, shown in COLORS.values():
        svg = svg.replace(drawn, shown)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
