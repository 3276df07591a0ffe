"""The recurrence for exported programs: one `scan` operator instead of an unrolled loop.

A Python loop over a line is frozen at the length it was exported with; this is not, and becomes a
real `Scan` in ONNX. It is what `eager` uses while `torch.export` traces.
"""

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

__all__ = ["recurrence", "state_recurrence"]


def recurrence(
    dt: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    axis: int,
    reverse: bool,
    window: int | None,
) -> Tensor:
    """sum_n C h with h = exp(dt A) h + B x along `axis`: dt, x (B, H, W, E), B, C (B, H, W, N)."""
    steps = {"dt": dt, "x": x, "keep": _keep(dt, axis, reverse, window)}
    steps |= {name: grid for name, grid in (("B", B), ("C", C)) if grid is not None}

    def step(h: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = now["x"].unsqueeze(-1)
        x = x * now["B"].unsqueeze(-2) if "B" in now else x
        decay = torch.exp(now["dt"].unsqueeze(-1) * A) * now["keep"]
        h = decay * h + x
        return h, ((h * now["C"].unsqueeze(-2)) if "C" in now else h).sum(-1)

    return _run(step, dt, A, steps, axis, reverse)


def state_recurrence(
    dt: Tensor, x: Tensor, A: Tensor, axis: int, reverse: bool, window: int | None
) -> Tensor:
    """Every h = exp(dt A) h + x along `axis`: dt (B, H, W, E), x (B, H, W, E, N)."""
    steps = {"dt": dt, "x": x, "keep": _keep(dt, axis, reverse, window)}

    def step(h: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        h = torch.exp(now["dt"].unsqueeze(-1) * A) * now["keep"] * h + now["x"]
        return h, h.clone()  # a result may not be the carried tensor itself

    return _run(step, dt, A, steps, axis, reverse)


def _run(step, dt: Tensor, A: Tensor, steps: dict[str, Tensor], axis: int, reverse: bool) -> Tensor:
    batch, _, _, channels = dt.shape
    start = dt.new_zeros(batch, dt.shape[3 - axis], channels, A.shape[1])  # (B, lines, E, N)
    steps = {
        name: grid if name == "keep" else grid.movedim(axis, 0).contiguous()
        for name, grid in steps.items()
    }
    # Contiguous, since the strides of sums of permuted grids would tie the batch to the size.
    return scan(step, start, steps, reverse=reverse)[1].movedim(0, axis).contiguous()


def _keep(dt: Tensor, axis: int, reverse: bool, window: int | None) -> Tensor:
    """(length, 1) of 0 where a window begins, seen in scan order, and 1 elsewhere."""
    position = torch.arange(dt.shape[axis], device=dt.device) + int(reverse)
    begins = position % window == 0 if window else torch.zeros_like(position, dtype=torch.bool)
    return (~begins).to(dt.dtype).unsqueeze(-1)
