"""The specification of the selective scan: plain loops over the steps of a line, in any dtype.

Equations: selective state space model of Mamba (arXiv 2312.00752, eq. 2 with the zero-order hold of
A and the Euler step of B), run along one axis of a grid as in V2M (arXiv 2410.10382). It is slow,
differentiable, and exact to the dtype it is given: in float64 it is what every other backend is
measured against.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["selective_scan"]


def selective_scan(
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
    """Arguments as in `v2m.ops.selective_scan`; returns (B, H, W, E) in the dtype of the state."""
    state_dtype = torch.promote_types(u.dtype, torch.float32)
    A = A.to(state_dtype)
    length = u.shape[axis]

    def steps(grid: Tensor | None) -> tuple[Tensor | None, ...]:
        """The grid cut into `length` tensors of shape (B, lines, E or N)."""
        return (None,) * length if grid is None else grid.to(state_dtype).unbind(axis)

    us, dts, Bs, Cs, zs = steps(u), steps(dt), steps(B), steps(C), steps(z)
    ys: list[Tensor] = [us[0]] * length
    h = torch.zeros(*us[0].shape, A.shape[1], dtype=state_dtype, device=u.device)

    for i in reversed(range(length)) if reverse else range(length):
        # A window begins at a multiple of its width; seen from the other end, just before one.
        if window is not None and ((i + 1) if reverse else i) % window == 0:
            h = torch.zeros_like(h)
        dt_i = dts[i] if dt_bias is None else dts[i] + dt_bias.to(state_dtype)
        if softplus:
            dt_i = F.softplus(dt_i)
        B_i = 1.0 if Bs[i] is None else Bs[i].unsqueeze(-2)  # (B, lines, 1, N)
        C_i = 1.0 if Cs[i] is None else Cs[i].unsqueeze(-2)
        h = torch.exp(dt_i.unsqueeze(-1) * A) * h + (dt_i * us[i]).unsqueeze(-1) * B_i
        y = (C_i * h).sum(-1)  # (B, lines, E)
        if D is not None:
            y = y + D.to(state_dtype) * us[i]
        if zs[i] is not None:
            y = y * F.silu(zs[i])
        ys[i] = y
    return torch.stack(ys, dim=axis)  # (B, H, W, E)
