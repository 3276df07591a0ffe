"""What `eager` becomes while `torch.export` traces: few loops, each one `scan` operator.

A Python loop over a line is frozen at the length it was exported with; `scan` is not, and becomes a
real `Scan` in ONNX. A mixer has two of them, one a pass, with its directions side by side in the
batch: a program with one for each direction takes three times as long to write and to run.
"""

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

from . import eager
from .core import Direction, PassWeights, Sweep, distinct_sweeps, one_pass, pass_inputs

__all__ = ["compose", "recurrence", "state_recurrence"]


def compose(
    u: Tensor,
    z: Tensor | None,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
) -> Tensor:
    """`mixer_core` by `eager`, the directions of a pass side by side; arguments as there."""
    sweeps = distinct_sweeps(directions)
    ys = _passes([u] * len(sweeps), z, first, sweeps, is_first=True)
    handed_over = {sweep: y.to(u.dtype) for sweep, y in zip(sweeps, ys)}
    starts = [handed_over[direction.first] for direction in directions]
    ys = _passes(starts, z, second, [d.second for d in directions], is_first=False)
    ys = [y.flip(d.mirror) if d.mirror else y for y, d in zip(ys, directions)]
    return (sum(ys) * (2 / len(directions))).to(u.dtype)


def _passes(
    grids: list[Tensor], z: Tensor | None, weights: PassWeights, sweeps, *, is_first: bool
) -> list[Tensor]:
    """The pass of each grid (B, H, W, E) along its sweep, in the dtype of the state."""
    families: dict[
        Sweep, list[int]
    ] = {}  # one scan each, where those in reverse read flipped grids
    for index, sweep in enumerate(sweeps):
        # A window is aligned to the grid, which flipping would change.
        key = sweep._replace(reverse=sweep.reverse and sweep.window > 0)
        families.setdefault(key, []).append(index)
    found: dict[int, Tensor] = {}
    for key, members in families.items():
        flips = [sweeps[i].reverse and not key.reverse for i in members]
        together = _side_by_side([grids[i] for i in members], flips, key.axis)
        gate = None if z is None else _side_by_side([z] * len(members), flips, key.axis)
        inputs = pass_inputs(together, weights, key)
        y = one_pass(eager.selective_scan, inputs, gate, weights, key, is_first=is_first)
        for i, part, flip in zip(members, y.unflatten(0, (len(members), -1)).unbind(), flips):
            found[i] = part.flip(key.axis) if flip else part
    return [found[i] for i in range(len(grids))]


def _side_by_side(grids: list[Tensor], flips: list[bool], axis: int) -> Tensor:
    """Grids (B, H, W, E), some flipped, in one batch."""
    turned = [grid.flip(axis) if flip else grid for grid, flip in zip(grids, flips)]
    return turned[0] if len(turned) == 1 else torch.stack(turned).flatten(0, 1)


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
        h = torch.where(now["keep"], torch.exp(now["dt"].unsqueeze(-1) * A) * h, 0.0) + x
        return h, ((h * now["C"].unsqueeze(-2)) if "C" in now else h).sum(-1)

    return _run(step, dt, A, steps, axis, reverse)


def state_recurrence(
    dt: Tensor, x: Tensor, A: Tensor, axis: int, reverse: bool, window: int | None
) -> Tensor:
    """Every h = exp(dt A) h + x along `axis`: dt (B, H, W, E), x (B, H, W, E, N)."""
    steps = {"dt": dt, "x": x, "keep": _keep(dt, axis, reverse, window)}

    def step(h: Tensor, now: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        h = torch.where(now["keep"], torch.exp(now["dt"].unsqueeze(-1) * A) * h, 0.0) + now["x"]
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
    """(length, 1) bool: whether the state goes on; false where a window begins, in scan order."""
    position = torch.arange(dt.shape[axis], device=dt.device) + int(reverse)
    begins = position % window == 0 if window else torch.zeros_like(position, dtype=torch.bool)
    return ~begins.unsqueeze(-1)
