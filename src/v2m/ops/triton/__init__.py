"""The Triton backend: the scan and the whole mixer core, forward and backward.

Called by `v2m.ops.library` only, which validates, registers and differentiates. Channels-last
grids, state and step sizes in float32, everything deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v2m.errors import InputError

from ..core import Direction, PassWeights, distinct_sweeps
from . import launchers
from .finish import finish
from .gate import least_gate
from .launch import Scan, grid_of, on_device, token_rows
from .launchers import Gate, ScanInputs
from .norm import rms_norm_backward, rms_norm_forward
from .prepare import prepare, rates

__all__ = [
    "core_backward", "core_forward", "rms_norm_backward", "rms_norm_forward", "scan_backward",
    "scan_forward", "scans_backward", "scans_forward",
]  # fmt: skip

_MOST_SCANS = 7  # as many 4-bit slots as a kernel argument holds


def scan_forward(u, dt, A, B, C, D, z, dt_bias, softplus, axis, reverse, window) -> Tensor:
    """One selective scan; arguments as in `v2m.ops.selective_scan`. Returns (B, H, W, E)."""
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    if u.numel() == 0:
        return y
    inputs, scan = _scan_inputs(u, dt, A, B, C, D, z, dt_bias, softplus, axis, reverse, window)
    with on_device(u):
        return launchers.scan_forward(inputs, grid_of(u), [scan], y, summed=True)


def scan_backward(dy, u, dt, A, B, C, D, z, dt_bias, softplus, axis, reverse, window):
    """Gradients (du, ddt, dA, dB, dC, dD, dz, ddt_bias) of `scan_forward`, None for None."""
    inputs, scan = _scan_inputs(u, dt, A, B, C, D, z, dt_bias, softplus, axis, reverse, window)
    if u.numel() == 0:
        originals = (u, dt, A, B, C, D, z, dt_bias)
        return tuple(None if x is None else torch.zeros_like(x) for x in originals)
    dz = None if z is None else torch.empty(u.shape, dtype=z.dtype, device=u.device)
    with on_device(u):
        grads = launchers.scan_backward(
            dy.contiguous(), inputs, grid_of(u), [scan], dz, dy_slots=False
        )
        ((dA, (dD, ddt_bias)),) = finish(grads.shares)
    projected = [
        None if x is None else grad.sum(2).view(x.shape).to(x.dtype)
        for x, grad in ((B, grads.dB), (C, grads.dC))
    ]
    return (
        grads.du.view(u.shape), grads.ddt.view(u.shape).to(dt.dtype), dA.to(A.dtype),
        *projected, None if D is None else dD.to(D.dtype), dz,
        None if dt_bias is None else ddt_bias.to(dt_bias.dtype),
    )  # fmt: skip


def scans_forward(u, dt, A, B, C, D, dt_bias, scans, summed) -> Tensor:
    """Scans of one pass together: see `v2m.ops.ungated`. Returns (B, H, W, E), or (S, ...)."""
    shape = u.shape[1:] if summed else (len(scans), *u.shape[1:])
    y = torch.empty(shape, dtype=u.dtype, device=u.device)
    if u.numel() == 0:
        return y
    inputs, listed = _several(u, dt, A, B, C, D, dt_bias, scans)
    with on_device(u):
        launchers.scan_forward(inputs, grid_of(u[0]), listed, y, summed=summed, shared=True)
    return y


def scans_backward(dy, u, dt, A, B, C, D, dt_bias, scans, summed):
    """Gradients (du, ddt, dA, dB, dC, dD, ddt_bias) of `scans_forward`, None for None."""
    if u.numel() == 0:
        originals = (u, dt, A, B, C, D, dt_bias)
        return tuple(None if x is None else torch.zeros_like(x) for x in originals)
    inputs, listed = _several(u, dt, A, B, C, D, dt_bias, scans)
    with on_device(u):
        grads = launchers.scan_backward(
            dy.contiguous(), inputs, grid_of(u[0]), listed, None,
            dy_slots=not summed, shared=True,
        )  # fmt: skip
        du, ddt = (_by_source(x, listed, len(u)).view(u.shape) for x in (grads.du, grads.ddt))
        dB, dC = (
            None if x is None else _by_source(x.sum(2), listed, len(u)).view(like.shape)
            for x, like in ((grads.dB, B), (grads.dC, C))
        )
        ((dA, (dD, ddt_bias)),) = finish(grads.shares)
    return du, ddt, dA, dB, dC, dD, ddt_bias


def _several(u, dt, A, B, C, D, dt_bias, scans) -> tuple[ScanInputs, list[Scan]]:
    _check_dtype(u)
    if len(scans) > _MOST_SCANS:
        raise InputError(
            f"backend 'triton' takes up to {_MOST_SCANS} directions; got {len(scans)}."
            " Use backend='eager'."
        )
    u, dt, D, dt_bias = (x.contiguous() for x in (u, dt, D, dt_bias))
    B, C = (None if x is None else x.contiguous() for x in (B, C))
    listed = [Scan(source, *sweep, mirror) for source, sweep, mirror in scans]
    return ScanInputs(u, dt, rates(A), B, C, D, dt_bias, None, 0, softplus=True), listed


def _by_source(slabs: Tensor, scans: list[Scan], sources: int) -> Tensor:
    """The sum of the slabs of each source's scans, (sources, ...)."""
    order = [scan.source for scan in scans]
    each = len(order) // sources
    if order == [i // each for i in range(len(order))]:
        return slabs.view(sources, each, *slabs.shape[1:]).sum(1)
    found = [[i for i, source in enumerate(order) if source == wanted] for wanted in range(sources)]
    return torch.stack([slabs[indices].sum(0) for indices in found])


def core_forward(
    u: Tensor, z: Tensor, first: PassWeights, second: PassWeights, directions: tuple[Direction, ...]
) -> tuple[Tensor, Tensor]:
    """`v2m.ops.core.mixer_core` without the transposition, and the gated first-pass results.

    Returns y (B, H, W, E) and y1 (F, B, H, W, E), F the number of distinct first sweeps.
    """
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    scans1, scans2 = _scans(directions)
    y1 = torch.empty(len(scans1), *u.shape, dtype=u.dtype, device=u.device)
    if u.numel() == 0:
        return y, y1
    grid = grid_of(u)
    with on_device(u):
        x, x_stride = token_rows(u)
        gate, z_stride = token_rows(z)
        prepared = prepare(first, second, u.dtype)
        inputs, _ = _pass_inputs(
            x, x_stride, gate, z_stride, first, prepared[0], grid, scans1, True, False
        )
        launchers.scan_forward(inputs, grid, scans1, y1, summed=False)
        inputs, _ = _pass_inputs(
            y1, grid.channels, gate, z_stride, second, prepared[1], grid, scans2, False, False
        )
        launchers.scan_forward(inputs, grid, scans2, y, summed=True, scale=2 / len(directions))
    return y, y1


def core_backward(
    dy: Tensor,
    u: Tensor,
    z: Tensor,
    y: Tensor,
    y1: Tensor,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
) -> tuple[Tensor, Tensor, PassWeights, PassWeights]:
    """Gradients of u, z and of both passes' weights; dy is that of y, and y, y1 as returned."""
    if u.numel() == 0:
        zeros = [PassWeights(*map(torch.zeros_like, weights)) for weights in (first, second)]
        return torch.zeros_like(u), torch.zeros_like(z), *zeros
    scans1, scans2 = _scans(directions)
    grid, scale = grid_of(u), 2 / len(directions)
    dz = torch.empty(u.shape, dtype=z.dtype, device=u.device)
    with on_device(u):
        dy = dy.contiguous()
        x, x_stride = token_rows(u)
        z, z_stride = token_rows(z)
        prepared = prepare(first, second, u.dtype)
        inputs, low_rank = _pass_inputs(
            y1, grid.channels, z, z_stride, second, prepared[1], grid, scans2, False, True
        )
        if any(scan.mirror for scan in scans2):
            grads = launchers.scan_backward(
                dy, inputs, grid, scans2, dz, dy_slots=False, scale=scale, of_log=True
            )
            before = Gate(z, z_stride, dz, None, None)
        else:
            ungated = launchers.gate(dy, z, z_stride, grid, scale)
            inputs = inputs._replace(z=None)
            grads = launchers.scan_backward(
                ungated, inputs, grid, scans2, None, dy_slots=False, of_log=True
            )
            before = Gate(z, z_stride, dz, dy, y)
        dy1, dsecond = _weight_gradients(
            grads, y1, grid.channels, low_rank, second, prepared[1], grid, scans2, len(scans1),
            before,
        )  # fmt: skip
        del grads
        inputs, low_rank = _pass_inputs(
            x, x_stride, z, z_stride, first, prepared[0], grid, scans1, True, True
        )
        inputs = inputs._replace(z=None)
        grads = launchers.scan_backward(dy1, inputs, grid, scans1, None, dy_slots=True, of_log=True)
        du, dfirst = _weight_gradients(
            grads, x, x_stride, low_rank, first, prepared[0], grid, scans1, 1, None
        )
    return du.view(u.shape), dz, dfirst, dsecond


def _weight_gradients(
    grads, x, x_stride, low_rank, weights, prepared, grid, scans, sources, gate
) -> tuple[Tensor, PassWeights]:
    """Gradients of a pass's input, (sources, tokens, E), and weights."""
    dprojected = grads.dC if grads.dB is None else grads.dB
    dx, *shares = launchers.project_backward(
        x, x_stride, low_rank, grads.du, grads.ddt, dprojected, weights, prepared, grid, scans,
        sources, gate,
    )  # fmt: skip
    scan, conv, projections = finish(grads.shares, *shares)
    (A_log, (D, dt_bias)), (conv_weight, (conv_bias,)), (dt_proj, x_proj) = scan, conv, projections
    found = PassWeights(conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D)
    return dx, PassWeights(*(grad.to(weight.dtype) for grad, weight in zip(found, weights)))


def _pass_inputs(x, x_stride, z, z_stride, weights, prepared, grid, scans, is_first, save):
    """The scans' operands from a pass's input, and the low-rank projection if it is to be saved."""
    u, dt, projected, low_rank = launchers.project(
        x, x_stride, weights, prepared, grid, scans, save=save
    )
    B, C = (projected, None) if is_first else (None, projected)
    inputs = ScanInputs(
        u, dt, prepared.rates, B, C, weights.D, None, z, z_stride,
        softplus=False, softplus_done=True, least_gate=least_gate(u.dtype),
    )  # fmt: skip
    return inputs, low_rank


def _scan_inputs(u, dt, A, B, C, D, z, dt_bias, softplus, axis, reverse, window):
    _check_dtype(u)
    u, dt = u.contiguous(), dt.contiguous()
    B, C = (None if x is None else x.contiguous() for x in (B, C))
    z, z_stride = (None, 0) if z is None else token_rows(z)
    D, dt_bias = (None if x is None else x.contiguous() for x in (D, dt_bias))
    inputs = ScanInputs(u, dt, rates(A), B, C, D, dt_bias, z, z_stride, softplus=softplus)
    return inputs, Scan(0, axis, reverse, window or 0)


def _scans(directions: tuple[Direction, ...]) -> tuple[list[Scan], list[Scan]]:
    """The scans of the first pass and, reading their results, of the second."""
    sweeps = distinct_sweeps(directions)
    if len(directions) > _MOST_SCANS:
        raise InputError(
            f"backend 'triton' takes up to {_MOST_SCANS} directions; got {len(directions)}."
            " Use backend='eager'."
        )
    first = [Scan(0, *sweep) for sweep in sweeps]
    second = [Scan(sweeps.index(d.first), *d.second, tuple(d.mirror)) for d in directions]
    return first, second


def _check_dtype(u: Tensor) -> None:
    if u.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(
            f"backend 'triton' takes float32, float16 and bfloat16; got {u.dtype}."
            " Use backend='eager'."
        )
