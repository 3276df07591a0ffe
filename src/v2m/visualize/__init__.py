"""Seeing what a model does: effective receptive fields, and the report of a training run."""

from .figures import draw_curves, draw_receptive_field, draw_receptive_fields
from .receptive_field import (
    center_token,
    effective_receptive_field,
    gradient_share,
    quarter_means,
    with_scan,
)
from .report import write_report

__all__ = [
    "center_token",
    "draw_curves",
    "draw_receptive_field",
    "draw_receptive_fields",
    "effective_receptive_field",
    "gradient_share",
    "quarter_means",
    "with_scan",
    "write_report",
]
