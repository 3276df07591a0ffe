"""The mixer core on the CPU: two passes, each one launch over all lines of all its sweeps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core import Direction, PassWeights, Sweep, distinct_sweeps
from . import layout as at
from .backward import backward_kernel, backward_scratch
from .forward import forward_kernel, forward_scratch
from .jobs import (
    Job,
    gate_gradient,
    gate_of,
    grid,
    group_count,
    pad,
    run,
    sweep_row,
)
from .packing import pack_columns, pack_pass, padded_size, unpack_pass

__all__ = ["core_backward", "core_forward"]


def core_forward(
    u: Tensor,
    z: Tensor,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
) -> tuple[Tensor, Tensor]:
    """y (B, H, W, E), and y1 (F, B, H, W, E):

    The gated results of the F distinct first sweeps, for the backward.
    """
    dtype, channels = u.dtype, u.shape[3]
    u, gate = grid(u), gate_of(z)
    y1 = first_forward(u, gate, first, distinct_sweeps(directions))
    y = second_forward(y1, gate, second, directions)
    return y[..., :channels].to(dtype).contiguous(), y1[..., :channels].to(dtype).contiguous()


def pass_job(weights: PassWeights, u: Tensor, gate: Tensor, is_first: bool) -> Job:
    """What every launch of a pass has in common.

    U: (B, H, W, E), only its shape and dtype are used.
    """
    batch, height, width, channels = u.shape
    rank, states = weights.dt_proj.shape[1], weights.A_log.shape[1]
    columns, packed = weights.x_proj.shape[0], pack_pass(weights)
    return Job(
        SPLITS=1,
        IMAGES=batch,
        IMAGE_TOKENS=height * width,
        CHANNELS=channels,
        STATES=states,
        RANK=rank,
        COLUMNS=columns,
        PADDED_COLUMNS=padded_size(columns),
        B_COLUMN=rank if is_first else -1,
        C_COLUMN=-1 if is_first else rank,
        WIDTH=weights.conv_weight.shape[1],
        SOFTPLUS=True,
        BFLOAT16=u.dtype == torch.bfloat16,
        WEIGHTS=packed,
        WEIGHT_SIZE=packed.size,
        X_PROJ=pack_columns(weights.x_proj),
        GATE=gate,
    )


def line_count(shape, axis: int) -> int:
    """Lines of a batch of grids (B, H, W, E) along `axis`."""
    return shape[0] * shape[3 - axis]


def first_forward(
    u: Tensor, gate: Tensor, weights: PassWeights, sweeps: tuple[Sweep, ...]
) -> Tensor:
    """y1 (F, B, H, W, E) in the dtype of u."""
    job = pass_job(weights, u, gate, is_first=True)
    y1 = torch.empty(len(sweeps), *u.shape, dtype=u.dtype)
    rows = [sweep_row(u.shape, u, *sweep, OUT=out.data_ptr()) for sweep, out in zip(sweeps, y1)]
    lines = max(line_count(u.shape, sweep.axis) for sweep in sweeps)
    job.set(SWEEPS_PER_TASK=1, LINES=lines, OUT_BFLOAT16=u.dtype == torch.bfloat16)
    job.set_float("SCALE", 1.0)
    run(forward_kernel, job, rows, lines * len(sweeps), _scratch(job))
    return y1


def second_forward(
    y1: Tensor, gate: Tensor, weights: PassWeights, directions: tuple[Direction, ...]
) -> Tensor:
    """2 / K times the sum over the directions, mirrored, (B, H, W, E) in fp32."""
    shape = y1.shape[1:]
    sources = dict(zip(distinct_sweeps(directions), y1))
    y = torch.empty(shape, dtype=torch.float32)
    job = pass_job(weights, y1[0], gate, is_first=False)
    job.set_float("SCALE", 2 / len(directions))
    groups: dict[tuple, list] = {}
    for index, direction in enumerate(directions):
        axis, mirror = direction.second.axis, direction.mirror
        row = sweep_row(
            shape,
            sources[direction.first],
            *direction.second,
            OUT=y.data_ptr(),
            ADD_OUT=index > 0,
            MIRROR_STEPS=axis in mirror,
            MIRROR_LINES=(3 - axis) in mirror,
        )
        groups.setdefault((axis, mirror), []).append(row)
    for position, ((axis, _), rows) in enumerate(groups.items()):
        rows[0][at.ADD_OUT] = position > 0
        for row in rows[1:]:
            row[at.ADD_OUT] = 1
        lines = line_count(shape, axis)
        job.set(SWEEPS_PER_TASK=len(rows), LINES=lines)
        run(forward_kernel, job, rows, lines, _scratch(job))
    return y


def core_backward(
    dy: Tensor,
    u: Tensor,
    z: Tensor,
    y1: Tensor,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
) -> tuple[Tensor, Tensor, PassWeights, PassWeights]:
    """Gradients of u and z, (B, H, W, E), and of the parameters of both passes, in their dtypes."""
    dtype, channels = u.dtype, u.shape[3]
    u, gate, dy = grid(u), gate_of(z), pad(dy.detach().float()).contiguous()
    y1 = torch.stack([grid(part) for part in y1]) if needs_conversion(y1, u) else y1.detach()
    du, d_gate = torch.empty_like(dy), torch.empty_like(dy)
    dy1 = torch.empty(y1.shape, dtype=torch.float32)
    d_second = second_backward(dy, y1, gate, second, directions, dy1, d_gate)
    d_first = first_backward(dy1, u, gate, first, distinct_sweeps(directions), du, d_gate)
    du = du[..., :channels].to(dtype).contiguous()
    return du, gate_gradient(d_gate, z), d_first, d_second


def needs_conversion(y1: Tensor, u: Tensor) -> bool:
    """Whether the kernels can't read the saved results as they are."""
    return y1.dtype != u.dtype or y1.shape[1:] != u.shape or not y1.is_contiguous()


def second_backward(dy, y1, gate, weights, directions, dy1, d_gate) -> PassWeights:
    """Fills dy1 (F, B, H, W, E) and d_gate (B, H, W, E), both fp32;

    Returns the parameters' gradients.
    """
    job = pass_job(weights, y1[0], gate, is_first=False)
    job.set(D_GATE=d_gate)
    job.set_float("SCALE", 2 / len(directions))
    index = {sweep: f for f, sweep in enumerate(distinct_sweeps(directions))}
    rows, written = [], set()
    for direction in sorted(directions, key=lambda direction: direction.second.axis):
        f, axis = index[direction.first], direction.second.axis
        row = sweep_row(
            y1.shape[1:],
            y1[f],
            *direction.second,
            D_OUT=dy.data_ptr(),
            MIRROR_STEPS=axis in direction.mirror,
            MIRROR_LINES=(3 - axis) in direction.mirror,
            D_SOURCE=dy1[f].data_ptr(),
            ADD_SOURCE=f in written,
            ADD_GATE=bool(written),
        )
        written.add(f)
        rows.append((axis, row))
    return _run_backward(job, weights, y1.shape[1:], rows)


def first_backward(dy1, u, gate, weights, sweeps, du, d_gate) -> PassWeights:
    """Fills du, adds to d_gate, both (B, H, W, E) in fp32; returns the parameters' gradients."""
    job = pass_job(weights, u, gate, is_first=True)
    job.set(D_GATE=d_gate)
    job.set_float("SCALE", 1.0)
    rows = []
    for sweep, gradient in sorted(zip(sweeps, dy1), key=lambda pair: pair[0].axis):
        row = sweep_row(
            u.shape,
            u,
            *sweep,
            D_OUT=gradient.data_ptr(),
            D_SOURCE=du.data_ptr(),
            ADD_SOURCE=bool(rows),
            ADD_GATE=True,
        )
        rows.append((sweep.axis, row))
    return _run_backward(job, weights, u.shape, rows)


def _run_backward(job: Job, weights: PassWeights, shape, rows: list) -> PassWeights:
    """One launch for each axis, as all sweeps of a launch share its lines."""
    sums = []
    for axis in sorted({axis for axis, _ in rows}):
        lines = line_count(shape, axis)
        groups = group_count(lines)
        gradients = np.zeros(
            (groups, job.get("WEIGHT_SIZE") // job.get("CHANNELS"), job.get("CHANNELS")), np.float32
        )
        job.set(LINES=lines, GROUPS=groups, GRADIENTS=gradients)
        sizes = (job.get(name) for name in ("CHANNELS", "COLUMNS", "PADDED_COLUMNS"))
        scratch = backward_scratch(shape[axis], *sizes)
        sweeps = [row for row_axis, row in rows if row_axis == axis]
        run(backward_kernel, job, sweeps, groups, scratch)
        sums.append(gradients.sum(0))
    return unpack_pass(sum(sums[1:], sums[0]), weights)


def _scratch(job: Job) -> int:
    return forward_scratch(*(job.get(name) for name in ("CHANNELS", "STATES", "PADDED_COLUMNS")))
