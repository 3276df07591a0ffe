"""Launches of the kernels: allocation, grids, and the second stage of every reduction."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from v2m.errors import InputError

from .finish import Shares
from .gate import gate_kernel, least_gate
from .launch import (
    MOST_STEP,
    SCRATCH_BYTES,
    Grid,
    Scan,
    Tile,
    groups,
    pack,
    padded,
    pick,
    precision,
    processors,
    room_near,
    speaks_ptx,
)
from .prepare import Prepared
from .project import project_kernel
from .project_backward import (
    conv_backward_kernel,
    project_backward_kernel,
    project_backward_low_kernel,
)
from .scan import scan_forward_kernel
from .scan_backward import scan_backward_kernel


class ScanInputs(NamedTuple):
    """Operands of the scans of a pass; a slab a scan where (S, ...) stands."""

    u: Tensor  # (S, tokens, E)
    dt: Tensor  # (S, tokens, E)
    decay: Tensor  # (N, E), A log2(e), float32
    B: Tensor | None  # (S, tokens, N)
    C: Tensor | None  # (S, tokens, N)
    D: Tensor | None  # (E,)
    dt_bias: Tensor | None  # (E,)
    z: Tensor | None  # (tokens, E)
    z_stride: int  # elements from one token of z to the next
    softplus: bool  # to be applied by the scan
    softplus_done: bool = False  # dt has been through it; gradients are returned before it
    least_gate: float = 0.0


class ScanGradients(NamedTuple):
    du: Tensor  # (S, tokens, E)
    ddt: Tensor  # (S, tokens, E)
    dB: Tensor | None  # (S, tokens, blocks of channels, N), bfloat16 if u is, else float32
    dC: Tensor | None
    shares: Shares  # of dA (E, N), or of that of log(-A), and of dD and ddt_bias


def scan_forward(
    inputs: ScanInputs,
    grid: Grid,
    scans: list[Scan],
    y: Tensor,
    *,
    summed: bool,
    scale: float = 1.0,
    shared: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Run the scans of a pass into y: (tokens, E) if summed, else (S, tokens, E).

    shared: the operands have a slab for each of the scans' sources, not for each scan.
    """
    states = inputs.decay.shape[0]
    families = groups(scans)
    for number, (scan, members) in enumerate(families):
        lines = grid.lines(scan.axis, scan.window)
        chosen = tile or pick("scan_forward", states, lines["window"])
        blocks = triton.cdiv(grid.channels, chosen.channels)
        scan_forward_kernel[lines.pop("segments"), blocks, 1 if summed else len(members)](
            inputs.u, inputs.dt, inputs.decay, inputs.B, inputs.C, inputs.D, inputs.dt_bias,
            inputs.z, y, grid.channels, states, grid.tokens, **lines,
            height=grid.height, width=grid.width, z_stride=inputs.z_stride, scale=scale,
            sources=pack([scans[i].source if shared else i for i in members], 4),
            slots=pack(members, 4), reverses=pack([scans[i].reverse for i in members], 1),
            SCANS=len(members) if summed else 1, SUMMED=summed,
            ADD=summed and number > 0, GATE_SUM=summed and len(families) == 1 and not scan.mirror,
            LEAST_GATE=inputs.least_gate, MIRROR_H=1 in scan.mirror, MIRROR_W=2 in scan.mirror,
            SOFTPLUS=_softplus(inputs), FETCH=chosen.fetch and speaks_ptx(),
            PADDED_N=padded(states), BLOCK_E=chosen.channels,
            **chosen.options,
        )  # fmt: skip
    return y


def scan_backward(
    dy: Tensor,
    inputs: ScanInputs,
    grid: Grid,
    scans: list[Scan],
    dz: Tensor | None,
    *,
    dy_slots: bool,
    scale: float = 1.0,
    shared: bool = False,
    of_log: bool = False,
    tile: Tile | None = None,
) -> ScanGradients:
    """Gradients of `scan_forward`, a slab a scan; with a gate, dz (tokens, E) is written.

    dy is the gradient of y; without a gate, of what comes before the gate and the scale. of_log:
    the gradient of log(-A) takes the place of that of A.
    """
    states, channels = inputs.decay.shape[0], grid.channels
    device, dtype = dy.device, inputs.u.dtype
    grids = len(scans), grid.tokens, channels
    du, ddt = (torch.empty(grids, dtype=x.dtype, device=device) for x in (inputs.u, inputs.dt))
    launches = _plan_backward(inputs, grid, scans, device, tile)
    blocks = triton.cdiv(channels, launches[0].tile.channels)
    # Sums over a block's channels, to be added up: in half precision they might be too large.
    projected = (len(scans), grid.tokens, blocks, states)
    narrow = dtype if dtype == torch.bfloat16 else torch.float32
    dB, dC = (
        None if x is None else torch.empty(projected, dtype=narrow, device=device)
        for x in (inputs.B, inputs.C)
    )
    parts = [launch.programs for launch in launches]
    partial = torch.empty(sum(parts), states + 2, channels, dtype=torch.float32, device=device)
    short = dtype == torch.bfloat16 and padded(states) >= 8 and speaks_ptx()
    for number, (launch, share) in enumerate(zip(launches, partial.split(parts))):
        scan, members, tile, lines, near, places, programs, scratch = launch
        checkpoints = torch.empty(scratch, dtype=torch.float32, device=device) if scratch else None
        scan_backward_kernel[programs, blocks](
            dy, inputs.u, inputs.dt, inputs.decay, inputs.B, inputs.C, inputs.D, inputs.dt_bias,
            inputs.z, du, ddt, share, dB, dC, share[:, states], share[:, states + 1], dz,
            checkpoints, channels, states, grid.tokens, **lines,
            height=grid.height, width=grid.width,
            z_stride=inputs.z_stride, share=(states + 2) * channels, scale=scale,
            places=places, scans=len(members),
            sources=pack([scans[i].source if shared else i for i in members], 4), SHARED=shared,
            slots=pack(members, 4),
            reverses=pack([scans[i].reverse for i in members], 1), DY_SLOTS=dy_slots,
            ADD=number > 0, LEAST_GATE=inputs.least_gate,
            MIRROR_H=1 in scan.mirror, MIRROR_W=2 in scan.mirror,
            SOFTPLUS=_softplus(inputs), SOFTPLUS_DONE=inputs.softplus_done,
            SUM_BY_PRODUCT=short and tile.channels == 32 and tile.warps == 1,
            CHUNK=tile.tokens, GROUP=tile.group, NEAR=near,
            FETCH=tile.fetch and speaks_ptx(),
            PADDED_N=padded(states), BLOCK_E=tile.channels,
            CHANNELS_PER_THREAD=max(1, tile.channels // (32 * tile.warps)),
            MASK=_mask(grid, tile, lines, states),
            **tile.options,
        )  # fmt: skip
    shares = Shares(partial, states, inputs.decay if of_log else None)
    return ScanGradients(du, ddt, dB, dC, shares)


def _mask(grid: Grid, tile: Tile, lines: dict[str, int], states: int) -> int:
    """What a launch of the scan's backward has to mask: see its kernel."""
    if grid.channels % tile.channels or states != padded(states):
        return 2
    return max(tile.mask(lines["window"]), tile.mask(lines["length"] % lines["window"]))


def _softplus(inputs: ScanInputs) -> int:
    """Which softplus the scan applies: see `scan.step_size`."""
    return int(inputs.softplus) * (1 if inputs.dt.dtype == torch.float32 else 2)


class _BackwardLaunch(NamedTuple):
    """One launch of the scan's backward: scans that share axis, window and mirror."""

    scan: Scan  # one of them
    members: list[int]
    tile: Tile
    lines: dict[str, int]
    near: int  # states that one program keeps in shared memory
    places: int  # and in scratch
    programs: int
    scratch: int  # float32 elements for all programs


def _plan_backward(
    inputs: ScanInputs, grid: Grid, scans: list[Scan], device, tile: Tile | None
) -> list[_BackwardLaunch]:
    states = padded(inputs.decay.shape[0])
    # Scans that add to one dz follow each other; else one launch balances all of them.
    families = groups(scans)
    walk = "C" if inputs.B is None else "B" if inputs.C is None else "BC"
    if inputs.z is not None:
        walk = "BC"
        families = [(scan, [index]) for index, scan in enumerate(scans)]
    launches = []
    for scan, members in families:
        lines = grid.lines(scan.axis, scan.window)
        if lines["inner"] * grid.channels >= MOST_STEP:
            raise InputError(
                f"backend 'triton' takes gradients of grids with fewer than 2^28 elements in a row;"
                f" got {grid.width} tokens of {grid.channels} channels. Use backend='eager'."
            )
        chosen = tile or pick("scan_backward", states, lines["window"], walk)
        blocks = triton.cdiv(grid.channels, chosen.channels)
        places = triton.cdiv(lines["window"], chosen.tokens) + 1
        near = room_near(places, chosen, states, inputs.u.dtype, device)
        if places <= near:
            places = 0
        size = blocks * places * states * chosen.channels // (2 if near else 1)
        most = chosen.resident * processors(device) // blocks
        if places:
            most = min(most, SCRATCH_BYTES // (4 * size))
        programs = balanced(lines["segments"] * len(members), max(1, most))
        launches.append(
            _BackwardLaunch(scan, members, chosen, lines, near, places, programs, programs * size)
        )
    return launches


def balanced(lines: int, most: int) -> int:
    """Programs, at most so many, that share the lines evenly."""
    return triton.cdiv(lines, triton.cdiv(lines, min(lines, most)))


def project(
    x: Tensor, x_stride: int, weights, prepared: Prepared, grid: Grid, scans: list[Scan], *, save
):
    """Scan inputs of a pass from its input x (sources, tokens, E), rows x_stride apart.

    Returns u, dt (S, tokens, E), B or C (S, tokens, N) in float32, and if they are to be saved, low
    rank (S, tokens, padded R), else None.
    """
    count, tokens, channels = len(scans), grid.tokens, grid.channels
    states, dtype, device = weights.A_log.shape[1], x.dtype, x.device
    pads = _pads(prepared)
    u, dt = (torch.empty(count, tokens, channels, dtype=dtype, device=device) for _ in "ud")
    projected = torch.empty(count, tokens, states, dtype=torch.float32, device=device)
    low_rank = None
    if save:
        low_rank = torch.empty(count, tokens, pads["PADDED_R"], dtype=dtype, device=device)
    tile = pick("project")
    project_kernel[triton.cdiv(tokens, tile.tokens), count](
        x, weights.conv_weight, weights.conv_bias, prepared.x_proj, prepared.dt_proj,
        weights.dt_bias, u, dt, low_rank, projected,
        tokens, channels, states, grid.height, grid.width, x_stride,
        **_scan_bits(scans), WIDTH=weights.conv_weight.shape[1], **pads, BLOCK_T=tile.tokens,
        BLOCK_E=tile.channels, PRECISION=precision(dtype), EVEN=_even(grid, tile), **tile.options,
    )  # fmt: skip
    return u, dt, projected, low_rank


def gate(dy: Tensor, z: Tensor, z_stride: int, grid: Grid, scale: float) -> Tensor:
    """dy silu(z) scale."""
    out = torch.empty_like(dy)
    tile = pick("gate")
    tiles = triton.cdiv(grid.tokens, tile.tokens), triton.cdiv(grid.channels, tile.channels)
    gate_kernel[tiles](
        dy, z, out, grid.tokens, grid.channels, z_stride, scale, LEAST=least_gate(dy.dtype),
        BLOCK_T=tile.tokens, BLOCK_E=tile.channels, **tile.options,
    )  # fmt: skip
    return out


class Gate(NamedTuple):
    """What the gradient of a gate before a pass needs; dy and y of the one after it, or None."""

    z: Tensor
    z_stride: int
    dz: Tensor
    dy: Tensor | None
    y: Tensor | None


def project_backward(
    x,
    x_stride,
    low_rank,
    du,
    ddt,
    dprojected,
    weights,
    prepared,
    grid,
    scans,
    sources,
    gate: Gate | None,
) -> tuple[Tensor, Shares, Shares]:
    """Gradients of `project`: of x (sources, tokens, E), and shares of those of the weights.

    Those are of conv_weight (turned) and conv_bias, and of dt_proj (turned) and x_proj. du is
    overwritten.
    """
    count, tokens, channels = len(scans), grid.tokens, grid.channels
    states, rank = weights.A_log.shape[1], weights.dt_proj.shape[1]
    width = weights.conv_weight.shape[1]
    dtype, device = du.dtype, du.device
    pads = _pads(prepared)
    dlow = torch.empty(count, tokens, sum(pads.values()), dtype=dtype, device=device)
    tile = pick("project_backward_low")
    project_backward_low_kernel[triton.cdiv(tokens, tile.tokens), count](
        ddt, prepared.dt_proj, dprojected, dlow, tokens, channels, states, dprojected.shape[2],
        **pads, BLOCK_T=tile.tokens, BLOCK_E=tile.channels, PRECISION=precision(dtype),
        EVEN=_even(grid, tile), **tile.options,
    )  # fmt: skip
    tile = pick("project_backward")
    blocks = triton.cdiv(channels, tile.channels)
    resident = 32 * processors(device) // (blocks * tile.warps)
    programs = min(triton.cdiv(tokens, tile.tokens), max(1, resident))
    partial = torch.empty(programs, 2 * rank + states, channels, dtype=torch.float32, device=device)
    project_backward_kernel[programs, blocks](
        x, prepared.taps, weights.conv_bias, prepared.x_proj, low_rank, ddt, dlow, du,
        partial, tokens, channels, states, rank, grid.height, grid.width, x_stride,
        scans=count, **_scan_bits(scans), WIDTH=width, **pads,
        BLOCK_T=tile.tokens, BLOCK_E=tile.channels, PRECISION=precision(dtype),
        EVEN=_even(grid, tile), **tile.options,
    )  # fmt: skip
    tile = pick("conv_backward")
    rows = max(1, tile.tokens // padded(sources))  # a thread holds a share for each source
    blocks = triton.cdiv(channels, tile.channels)
    dx = torch.empty(sources, tokens, channels, dtype=dtype, device=device)
    tiles = min(triton.cdiv(tokens, rows), max(1, 16 * processors(device) // (blocks * tile.warps)))
    shares = torch.empty(sources * tiles, width + 1, channels, dtype=torch.float32, device=device)
    z, z_stride, dz, dy, y = gate or (None, 0, None, None, None)
    conv_backward_kernel[tiles, blocks](
        du, x, weights.conv_weight, z, dy, y, dx, dz, shares,
        tokens, channels, grid.height, grid.width, x_stride, z_stride,
        COUNT=sources, SCANS=count, **_scan_bits(scans), LEAST_GATE=least_gate(dtype), WIDTH=width,
        BLOCK_T=rows, BLOCK_E=tile.channels, **tile.options,
    )  # fmt: skip
    return dx, Shares(shares, width), Shares(partial, rank)


def _pads(prepared: Prepared) -> dict[str, int]:
    rank = prepared.dt_proj.shape[0]
    return {"PADDED_R": rank, "PADDED_N": prepared.x_proj.shape[0] - rank}


def _even(grid: Grid, tile: Tile) -> bool:
    return grid.tokens % tile.tokens == 0 and grid.channels % tile.channels == 0


def _scan_bits(scans: list[Scan]) -> dict[str, int]:
    return {
        "sources": pack([scan.source for scan in scans], 4),
        "downs": pack([scan.axis == 1 for scan in scans], 1),
        "reverses": pack([scan.reverse for scan in scans], 1),
    }
