"""The selective scan on the CPU, with dt, B and C given: one launch over all lines."""

from __future__ import annotations

import torch
from torch import Tensor

from .backward import backward_kernel, backward_scratch
from .forward import forward_kernel, forward_scratch
from .jobs import (
    Job,
    decay_rates,
    gate_gradient,
    gate_of,
    grid,
    group_count,
    pack,
    pad,
    run,
    sweep_row,
    unpack,
)
from .packing import padded_size
from .vector import LANES

__all__ = ["scan_backward", "scan_forward", "scans_backward", "scans_forward"]

TASKS = 64  # where there are fewer lines, the channels are divided into about so many tasks


def scan_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    axis: int,
    reverse: bool,
    window: int | None,
) -> Tensor:
    """Arguments as in `v2m.ops.selective_scan`; returns (B, H, W, E) in the dtype of u."""
    gate = None if z is None else gate_of(z)
    weights = pack(_parts(A, D, dt_bias))
    y = _forward(u, dt, A.shape[1], weights, B, C, gate, softplus, axis, reverse, window)
    return y.to(u.dtype)


def scan_backward(
    dy: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
    axis: int,
    reverse: bool,
    window: int | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, dt, A, B, C, D, z and dt_bias, in their dtypes; None for what is None."""
    inputs = (u, dt, A, B, C, D, z, dt_bias)
    gate = None if z is None else gate_of(z)
    weights = pack(_parts(A, D, dt_bias))
    du, ddt, sums, d_rows, d_gate = _backward(
        dy, u, dt, A.shape[1], weights, B, C, gate, softplus, axis, reverse, window
    )
    dA, dD, d_bias = _weight_gradients(sums, A, D, dt_bias)
    dB, dC = _split_rows(d_rows, B, C)
    dz = None if z is None else gate_gradient(d_gate, z)
    gradients = (du, ddt, dA, dB, dC, dD, dz, d_bias)
    return tuple(
        None if value is None else gradient[..., : value.shape[-1]].to(value.dtype).contiguous()
        for value, gradient in zip(inputs, gradients)
    )


def scans_forward(u, dt, A, B, C, D, dt_bias, scans, summed: bool) -> Tensor:
    """The scans of a pass of `v2m.ops.ungated`: u, dt, B, C have a slab (B, H, W, ...) a source.

    Returns (B, H, W, E) if summed, else (scans, B, H, W, E).
    """
    weights = pack(_parts(A, D, dt_bias))
    results = []
    for source, (axis, reverse, window), mirror in scans:
        b, c = (None if x is None else x[source] for x in (B, C))
        y = _forward(
            u[source], dt[source], A.shape[1], weights, b, c, None, True, axis, reverse, window
        )
        results.append(y.flip(mirror) if mirror else y)
    if not summed:
        return torch.stack(results).to(u.dtype)
    return sum(y.float() for y in results).to(u.dtype)


def scans_backward(dy, u, dt, A, B, C, D, dt_bias, scans, summed: bool) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D and dt_bias of `scans_forward`; those of u and dt in its type,
    the others in float32."""
    weights = pack(_parts(A, D, dt_bias))
    parts: list = [None] * len(u)  # of each source: du, ddt and gradients of its rows
    sums = 0.0
    for number, (source, (axis, reverse, window), mirror) in enumerate(scans):
        gradient = dy if summed else dy[number]
        gradient = gradient.flip(mirror) if mirror else gradient
        b, c = (None if x is None else x[source] for x in (B, C))
        *grids, sum_, rows, _ = _backward(
            gradient, u[source], dt[source], A.shape[1], weights, b, c, None, True, axis,
            reverse, window,
        )  # fmt: skip
        found = [*grids, rows]
        sums = sums + sum_
        if parts[source] is None:
            parts[source] = found
        else:
            for total, part in zip(parts[source], found):
                total += part
    du, ddt, rows = (torch.stack(slabs) for slabs in zip(*parts))
    dB, dC = _split_rows(rows, B, C)
    channels = u.shape[-1]
    du, ddt = (x[..., :channels].to(u.dtype) for x in (du, ddt))
    dA, dD, d_bias = _weight_gradients(sums, A, D, dt_bias)
    return du, ddt, dA, None if B is None else dB, None if C is None else dC, dD, d_bias


def _forward(u, dt, states, weights, B, C, gate, softplus, axis, reverse, window) -> Tensor:
    """y (B, H, W, E), in the type in which u and dt are read."""
    channels = u.shape[3]
    u, dt = _grids(u, dt)
    job, lines = _job(u, dt, states, weights, B, C, gate, softplus, axis)
    y = torch.empty(u.shape, dtype=u.dtype)
    job.set(SWEEPS_PER_TASK=1, OUT_BFLOAT16=u.dtype == torch.bfloat16)
    row = sweep_row(u.shape, u, axis, reverse, window, OUT=y.data_ptr())
    scratch = forward_scratch(job.get("CHANNELS"), states, 0)
    run(forward_kernel, job, [row], lines * job.get("SPLITS"), scratch)
    return y[..., :channels].contiguous()


def _backward(
    dy, u, dt, states, weights, B, C, gate, softplus, axis, reverse, window
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of u and dt (B, H, W, padded E), of the packed weights, of the rows of B and C
    (B, H, W, columns) and of the gate, in float32."""
    u, dt = _grids(u, dt)
    dy = pad(dy.detach().float()).contiguous()
    job, lines = _job(u, dt, states, weights, B, C, gate, softplus, axis)
    splits, columns = job.get("SPLITS"), job.get("COLUMNS")
    groups = group_count(lines)
    du, ddt = torch.empty_like(dy), torch.empty_like(dy)
    d_gate = None if gate is None else torch.empty_like(dy)
    d_rows = torch.empty(splits, *u.shape[:3], columns)
    sums = torch.zeros(groups, job.get("WEIGHT_SIZE"))
    job.set(
        GROUPS=groups, GRADIENTS=sums, D_DT=ddt, D_ROWS=d_rows, D_GATE=0 if gate is None else d_gate
    )
    row = sweep_row(u.shape, u, axis, reverse, window, D_OUT=dy.data_ptr(), D_SOURCE=du.data_ptr())
    scratch = backward_scratch(u.shape[axis], u.shape[3], columns, 0)
    run(backward_kernel, job, [row], groups * splits, scratch)
    return du, ddt, sums.sum(0), d_rows.sum(0), d_gate


def _grids(u: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, bfloat16 only if both are."""
    u, dt = grid(u), grid(dt)
    if u.dtype != dt.dtype:
        u, dt = u.float(), dt.float()
    return u, dt.contiguous()


def _parts(A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> list[Tensor]:
    """What is packed: the bias of a convolution that there is not, dt_bias, decay rates, D."""
    nothing = torch.zeros(A.shape[0])
    return [
        nothing,
        nothing if dt_bias is None else dt_bias,
        decay_rates(A.detach().float()),
        nothing if D is None else D,
    ]


def _weight_gradients(sums: Tensor, A, D, dt_bias) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, D and dt_bias from those of what is packed."""
    parts = _parts(A, D, dt_bias)
    d_bias, dA, dD = unpack(sums[padded_size(A.shape[0]) :], parts[1:])
    return dA.t(), dD, d_bias


def _job(u, dt, states, weights, B, C, gate, softplus, axis) -> tuple[Job, int]:
    """What both kernels need, and the number of lines."""
    batch, height, width, channels = u.shape
    rows = [tensor.detach().float() for tensor in (B, C) if tensor is not None]
    if not rows:
        rows = [torch.ones(batch, height, width, states)]  # as C
    rows = torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0].contiguous()
    c_given = C is not None or B is None
    lines = batch * u.shape[3 - axis]
    job = Job(
        SPLITS=min(channels // LANES, max(1, TASKS // max(lines, 1))),
        IMAGES=batch,
        LINES=lines,
        IMAGE_TOKENS=height * width,
        CHANNELS=channels,
        STATES=states,
        COLUMNS=rows.shape[-1],
        B_COLUMN=-1 if B is None else 0,
        C_COLUMN=-1 if not c_given else 0 if B is None else states,
        SOFTPLUS=softplus,
        BFLOAT16=u.dtype == torch.bfloat16,
        WEIGHTS=weights,
        WEIGHT_SIZE=weights.numel(),
        GATE=0 if gate is None else gate,
        DT=dt,
        ROWS=rows,
    )
    job.set_float("SCALE", 1.0)
    return job, lines


def _split_rows(rows: Tensor, B: Tensor | None, C: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of B and of C out of those of the rows; whatever, where one is None."""
    if B is None or C is None:
        return rows, rows
    return rows.split(B.shape[-1], dim=-1)
