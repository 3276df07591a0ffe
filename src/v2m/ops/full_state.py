"""The mixer with the whole state handed from pass 1 to pass 2: the reduced Roesser model itself.

The published V2M mixer sums the N states of a channel between its two passes. A selective 2-D
state-space model in Roesser form without the coupling from columns to rows keeps them apart
(arXiv 2410.10382, section 3):

    h1[i, j] = exp(dt1 A1) h1[i, j-1] + dt1 B1 u1[i, j]
    h2[i, j] = exp(dt2 A2) h2[i-1, j] + h1[i, j]
    y[i, j]  = (C2 . h2[i, j] + D1 u1[i, j]) * silu(z)

with u1 = silu(conv(u)), dt1 and B1 from x_proj(u1), dt2 and C2 from x_proj_2(u1). It is written in
vectorised PyTorch for every device; its memory is N times that of the published mixer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import is_exporting
from .core import Direction, PassWeights, Sweep, causal_conv, distinct_sweeps

__all__ = ["full_state_core"]


def full_state_core(
    u: Tensor,
    z: Tensor | None,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
    *,
    transpose: bool = False,
) -> Tensor:
    """2 / K times the sum over the K directions; shapes as in `mixer_core`.

    Of `second` only `x_proj`, `dt_proj`, `dt_bias` and `A_log` are used.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    gate = None if z is None else F.silu(z.to(dtype))
    row_pass = {sweep: _first_pass(u, first, sweep) for sweep in distinct_sweeps(directions)}
    total: Tensor | None = None
    for direction in directions:
        u1, h1 = row_pass[direction.first]
        dt, C = _step_and_projection(u1, second)
        h2 = _recurrence(dt, h1, second.A_log, direction.second)
        y = (h2 * C.to(dtype).unsqueeze(-2)).sum(-1) + first.D.to(dtype) * u1.to(dtype)
        y = y if gate is None else y * gate
        y = y.flip(direction.mirror) if direction.mirror else y
        total = y if total is None else total + y
    total = (total * (2 / len(directions))).to(u.dtype)
    return total.transpose(1, 2) if transpose else total


def _first_pass(u: Tensor, weights: PassWeights, sweep: Sweep) -> tuple[Tensor, Tensor]:
    """u1 (B, H, W, E) and the states h1 (B, H, W, E, N)."""
    if weights.conv_weight is not None:
        u = F.silu(causal_conv(u, weights.conv_weight, weights.conv_bias, *sweep[:2])).to(u.dtype)
    dt, B = _step_and_projection(u, weights)
    x = (dt * u).unsqueeze(-1) * B.to(dt.dtype).unsqueeze(-2)  # (B, H, W, E, N)
    return u, _recurrence(dt, x, weights.A_log, sweep)


def _step_and_projection(u: Tensor, weights: PassWeights) -> tuple[Tensor, Tensor]:
    """dt (B, H, W, E) after softplus, in the dtype of the state, and B or C (B, H, W, N)."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    rank = weights.dt_proj.shape[1]
    low_rank, projection = F.linear(u, weights.x_proj.to(u.dtype)).split(
        [rank, weights.x_proj.shape[0] - rank], dim=-1
    )
    dt = F.linear(low_rank, weights.dt_proj.to(u.dtype)).to(dtype)
    return F.softplus(dt + weights.dt_bias.to(dtype)), projection


def _recurrence(dt: Tensor, x: Tensor, A_log: Tensor, sweep: Sweep) -> Tensor:
    """Every h_i = exp(dt_i A) h_{i-1} + x_i along the sweep, (B, H, W, E, N)."""
    axis, reverse, window = sweep
    A = -torch.exp(A_log.to(dt.dtype))  # (E, N)
    if is_exporting():
        from .exported import state_recurrence  # an exported loop would have a fixed length

        return state_recurrence(dt, x, A, axis, reverse, window)
    dts, xs = dt.unsqueeze(-1).unbind(axis), x.unbind(axis)
    length = len(xs)
    hs = list(xs)
    h = None
    for i in range(length - 1, -1, -1) if reverse else range(length):
        if window and (i + 1 if reverse else i) % window == 0:
            h = None
        h = xs[i] if h is None else torch.addcmul(xs[i], torch.exp(dts[i] * A), h)
        hs[i] = h
    return torch.stack(hs, dim=axis)
