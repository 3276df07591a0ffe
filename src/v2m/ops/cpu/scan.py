"""The selective scan on the CPU, with dt, B and C given: one launch over all lines."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout as at
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
    x, dt = _grids(u, dt)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = [sweep_row(x.shape, x, axis, reverse, window, OUT=y.data_ptr())]
    _forward(x, dt, A.shape[1], weights, B, C, gate, softplus, rows, y.dtype)
    return y[..., : u.shape[3]].to(u.dtype).contiguous()


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
    parts = _parts(A, D, dt_bias)
    u, dt = _grids(u, dt)
    dy = pad(dy.detach().float()).contiguous()
    rows = [sweep_row(u.shape, u, axis, reverse, window, D_OUT=dy.data_ptr())]
    du, ddt, sums, d_rows, d_gate = _backward(
        u, dt, A.shape[1], pack(parts), B, C, gate, softplus, rows
    )
    dA, dD, d_bias = _weight_gradients(sums, parts)
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
    dtype = torch.bfloat16 if u.dtype == torch.bfloat16 and not summed else torch.float32
    slabs, channels = 1 if summed else len(scans), u.shape[-1]
    y = torch.empty(slabs, *u.shape[1:-1], padded_size(channels), dtype=dtype)
    written = False
    for source, numbers in _launches(scans):
        x, step_sizes = _grids(u[source], dt[source])
        rows = []
        for number in numbers:
            out = y[0 if summed else number].data_ptr()
            rows.append(_row(x, scans[number], OUT=out, ADD_OUT=summed and written))
            written = True
        b, c = (None if given is None else given[source] for given in (B, C))
        _forward(x, step_sizes, A.shape[1], weights, b, c, None, True, rows, dtype)
    return (y[0] if summed else y)[..., :channels].to(u.dtype).contiguous()


def scans_backward(dy, u, dt, A, B, C, D, dt_bias, scans, summed: bool) -> tuple[Tensor, ...]:
    """Gradients of u, dt, A, B, C, D and dt_bias of `scans_forward`; those of u and dt in its type,
    the others in float32."""
    parts = _parts(A, D, dt_bias)
    weights = pack(parts)
    dy = pad(dy.detach().float()).contiguous()
    found: list = [None] * len(u)  # of each source: du, ddt and gradients of its rows
    sums = 0.0
    for source, numbers in _launches(scans):
        x, step_sizes = _grids(u[source], dt[source])
        rows = []
        for number in numbers:
            gradient = dy if summed else dy[number]
            row = _row(x, scans[number], D_OUT=gradient.data_ptr(), ADD_SOURCE=bool(rows))
            rows.append(row)
        b, c = (None if given is None else given[source] for given in (B, C))
        du, ddt, sum_, d_rows, _ = _backward(
            x, step_sizes, A.shape[1], weights, b, c, None, True, rows
        )
        sums = sums + sum_
        if found[source] is None:
            found[source] = [du, ddt, d_rows]
        else:
            for total, part in zip(found[source], (du, ddt, d_rows)):
                total += part
    du, ddt, d_rows = (
        torch.stack(slabs) if len(slabs) > 1 else slabs[0][None] for slabs in zip(*found)
    )
    dB, dC = _split_rows(d_rows, B, C)
    channels = u.shape[-1]
    du, ddt = (x[..., :channels].to(u.dtype) for x in (du, ddt))
    dA, dD, d_bias = _weight_gradients(sums, parts)
    return du, ddt, dA, None if B is None else dB, None if C is None else dC, dD, d_bias


def _launches(scans) -> list[tuple[int, list[int]]]:
    """Sources, and the numbers of their scans that may share a launch: those on the same lines."""
    found: dict[tuple, list[int]] = {}
    for number, (source, sweep, mirror) in enumerate(scans):
        found.setdefault((source, sweep[0], mirror), []).append(number)
    return [(key[0], numbers) for key, numbers in found.items()]


def _row(x: Tensor, scan, **entries: int):
    """The table of a scan of the grid x (B, H, W, E)."""
    _, sweep, mirror = scan
    axis = sweep[0]
    lies = {"MIRROR_STEPS": axis in mirror, "MIRROR_LINES": (3 - axis) in mirror}
    return sweep_row(x.shape, x, *sweep, **lies, **entries)


def _forward(u, dt, states, weights, B, C, gate, softplus, rows, dtype) -> None:
    """Run sweeps of one grid along the same lines; they leave results of `dtype`."""
    job = _job(u, dt, states, weights, B, C, gate, softplus, rows[0])
    job.set(SWEEPS_PER_TASK=len(rows), OUT_BFLOAT16=dtype == torch.bfloat16)
    scratch = forward_scratch(job.get("CHANNELS"), states, 0)
    run(forward_kernel, job, rows, job.get("LINES") * job.get("SPLITS"), scratch)


def _backward(
    u, dt, states, weights, B, C, gate, softplus, rows
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients, summed over sweeps of one grid along the same lines, of u and dt (B, H, W, padded
    E), of the packed weights, of the rows of B and C (B, H, W, columns) and of the gate; float32.
    """
    job = _job(u, dt, states, weights, B, C, gate, softplus, rows[0])
    splits, columns = job.get("SPLITS"), job.get("COLUMNS")
    groups = group_count(job.get("LINES"))
    du, ddt = (torch.empty(u.shape, dtype=torch.float32) for _ in range(2))
    d_gate = None if gate is None else torch.empty(u.shape, dtype=torch.float32)
    d_rows = torch.empty(splits, *u.shape[:3], columns, dtype=torch.float32)
    sums = torch.zeros(groups, job.get("WEIGHT_SIZE"), dtype=torch.float32)
    job.set(
        GROUPS=groups, GRADIENTS=sums, D_DT=ddt, D_ROWS=d_rows, D_GATE=0 if gate is None else d_gate
    )
    for row in rows:
        row[at.D_SOURCE] = du.data_ptr()
    scratch = backward_scratch(int(rows[0][at.LENGTH]), u.shape[3], columns, 0)
    run(backward_kernel, job, rows, groups * splits, scratch)
    return du, ddt, sums.sum(0), d_rows.sum(0) if splits > 1 else d_rows[0], d_gate


def _grids(u: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one type, bfloat16 only if both are."""
    u, dt = grid(u), grid(dt)
    if u.dtype != dt.dtype:
        u, dt = u.float(), dt.float()
    return u, dt.contiguous()


def _parts(A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> list[Tensor]:
    """What is packed: the bias of a convolution that there is not, dt_bias, decay rates, D."""
    nothing = torch.zeros(A.shape[0], dtype=torch.float32)
    return [
        nothing,
        nothing if dt_bias is None else dt_bias,
        decay_rates(A.detach().float()),
        nothing if D is None else D,
    ]


def _weight_gradients(sums: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, D and dt_bias from those of what is packed; no views, as an operator's
    results must not share memory."""
    d_bias, dA, dD = unpack(sums[padded_size(len(parts[0])) :], parts[1:])
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in (dA.t(), dD, d_bias))


def _job(u, dt, states, weights, B, C, gate, softplus, sweep) -> Job:
    """What both kernels need for sweeps along the same lines as `sweep`."""
    batch, height, width, channels = u.shape
    rows = [tensor.detach().float() for tensor in (B, C) if tensor is not None]
    if not rows:
        rows = [torch.ones(batch, height, width, states, dtype=torch.float32)]  # as C
    rows = torch.cat(rows, dim=-1) if len(rows) > 1 else rows[0].contiguous()
    c_given = C is not None or B is None
    lines = batch * int(sweep[at.IMAGE_LINES])
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
    return job


def _split_rows(rows: Tensor, B: Tensor | None, C: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of B and of C out of those of the rows; whatever, where one is None."""
    if B is None or C is None:
        return rows, rows
    parts = rows.split(B.shape[-1], dim=-1)
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in parts)
