"""The core of a mixer that has neither gate nor causal convolutions, forward and backward.

So are the hierarchical models. What enters a scan then does not depend on its sense, and a pass is
two matrix products over its grids and then its scans:

    low rank, B or C = x x_proj,   dt = (low rank) dt_proj,   y = scans of x with dt and B or C

For the backward the grids x are kept, one for pass 1 and one for each first sweep; the products are
formed again. A backend may run the scans of a pass together (`scans_forward`, `scans_backward` of
its module); otherwise they are run one by one.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .core import Direction, PassWeights, Sweep, distinct_sweeps

__all__ = ["ScanOf", "ungated_backward", "ungated_forward"]


class ScanOf(NamedTuple):
    """A scan of one of a pass's grids, and the grid axes along which its result is mirrored."""

    source: int
    sweep: Sweep
    mirror: tuple[int, ...] = ()


def ungated_forward(
    backend: ModuleType,
    u: Tensor,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
) -> tuple[Tensor, Tensor]:
    """y (B, H, W, E) before the transposition, and the first pass's results (F, B, H, W, E)."""
    scans1, scans2 = _scans(directions)
    y1 = _forward(backend)(*_operands(u[None], first, 1.0, True)[0], scans1, False)
    scale = 2 / len(directions)
    y = _forward(backend)(*_operands(y1, second, scale, False)[0], scans2, True)
    return y, y1


def ungated_backward(
    backend: ModuleType,
    dy: Tensor,
    u: Tensor,
    y1: Tensor,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
) -> tuple[Tensor, PassWeights, PassWeights]:
    """Gradients of u and of both passes' weights."""
    scans1, scans2 = _scans(directions)
    scale = 2 / len(directions)
    dy1, dsecond = _pass_backward(backend, dy, y1, second, scale, scans2, False)
    du, dfirst = _pass_backward(backend, dy1, u[None], first, 1.0, scans1, True)
    return du[0], dfirst, dsecond


def _scans(directions: tuple[Direction, ...]) -> tuple[list[ScanOf], list[ScanOf]]:
    sweeps = distinct_sweeps(directions)
    first = [ScanOf(0, sweep) for sweep in sweeps]
    second = [ScanOf(sweeps.index(d.first), d.second, tuple(d.mirror)) for d in directions]
    return first, second


def _operands(
    x: Tensor, weights: PassWeights, scale: float, is_first: bool
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """x, dt, A, B, C, D, dt_bias of a pass's scans, and what dt was made of. The scale goes into
    what is linear: C and D."""
    rank = weights.dt_proj.shape[1]
    projected = F.linear(x, weights.x_proj.to(x.dtype))  # (F, B, H, W, R + N)
    low_rank, B_or_C = projected.split([rank, projected.shape[-1] - rank], dim=-1)
    dt = F.linear(low_rank, weights.dt_proj.to(x.dtype))
    A = -torch.exp(weights.A_log.float())
    D = weights.D * scale
    if is_first:
        return (x, dt, A, B_or_C, None, D, weights.dt_bias), low_rank
    return (x, dt, A, None, B_or_C * scale, D, weights.dt_bias), low_rank


def _pass_backward(backend, dy, x, weights, scale, scans, is_first) -> tuple[Tensor, PassWeights]:
    """Gradients of x (F, B, H, W, E) and of the weights of a pass."""
    operands, low_rank = _operands(x, weights, scale, is_first)
    dx, ddt, dA, dB, dC, dD, dt_bias = _backward(backend)(dy, *operands, scans, not is_first)
    A, low_rank = operands[2], low_rank.flatten(0, -2)
    dother = dB if is_first else dC * scale
    ddt = ddt.flatten(0, -2)
    dlow_rank = ddt @ weights.dt_proj.to(x.dtype)  # (tokens, R)
    dprojected = torch.cat([dlow_rank, dother.to(x.dtype).flatten(0, -2)], dim=-1)
    dx = torch.addmm(dx.flatten(0, -2), dprojected, weights.x_proj.to(x.dtype)).view(x.shape)
    found = PassWeights(
        None, None, dprojected.t() @ x.flatten(0, -2), ddt.t() @ low_rank, dt_bias, dA * A,
        dD * scale,
    )  # fmt: skip
    return dx, PassWeights(
        *(None if g is None else g.to(w.dtype).contiguous() for g, w in zip(found, weights))
    )


def _forward(backend: ModuleType):
    return getattr(backend, "scans_forward", None) or _one_by_one(backend.scan_forward)


def _backward(backend: ModuleType):
    return getattr(backend, "scans_backward", None) or _one_by_one_back(backend.scan_backward)


def _one_by_one(scan_forward):
    def run(u, dt, A, B, C, D, dt_bias, scans, summed):
        results = []
        for source, sweep, mirror in scans:
            b, c = (None if x is None else x[source] for x in (B, C))
            y = scan_forward(
                u[source], dt[source], A, b, c, D, None, dt_bias, True, *_options(sweep)
            )
            results.append(y.flip(mirror) if mirror else y)
        if not summed:
            return torch.stack(results)
        return sum(y.float() for y in results).to(u.dtype)

    return run


def _one_by_one_back(scan_backward):
    def run(dy, u, dt, A, B, C, D, dt_bias, scans, summed):
        grids = [None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in (u, dt)]
        rows = [None if x is None else torch.zeros_like(x, dtype=torch.float32) for x in (B, C)]
        small = [torch.zeros_like(x, dtype=torch.float32) for x in (A, D, dt_bias)]
        for number, (source, sweep, mirror) in enumerate(scans):
            gradient = dy if summed else dy[number]
            gradient = gradient.flip(mirror) if mirror else gradient
            b, c = (None if x is None else x[source] for x in (B, C))
            du, ddt, dA, dB, dC, dD, _, dbias = scan_backward(
                gradient.contiguous(), u[source], dt[source], A, b, c, D, None, dt_bias, True,
                *_options(sweep),
            )  # fmt: skip
            for total, part in zip((*grids, *rows), (du, ddt, dB, dC)):
                if part is not None:
                    total[source] += part
            for total, part in zip(small, (dA, dD, dbias)):
                total += part
        du, ddt = (x.to(u.dtype) for x in grids)
        return du, ddt, small[0], *rows, *small[1:]

    return run


def _options(sweep: Sweep) -> tuple:
    axis, reverse, window = sweep
    return axis, reverse, window or None
