"""The selective scan in vectorised PyTorch: any device, differentiable, double-differentiable and
exportable. What does not depend on the state is computed for the whole grid at once; the loop over
a line carries only the recurrence.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import is_exporting

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
    u, dt, A = u.to(state_dtype), dt.to(state_dtype), A.to(state_dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(state_dtype)
    if softplus:
        dt = F.softplus(dt)

    y = _recurrence(
        dt, dt * u, A, _to(B, state_dtype), _to(C, state_dtype), axis, reverse, window
    )  # (B, H, W, E)
    if D is not None:
        y = torch.addcmul(y, u, D.to(state_dtype))
    return y if z is None else y * F.silu(z.to(state_dtype))


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _recurrence(
    dt: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor | None,
    C: Tensor | None,
    axis: int,
    reverse: bool,
    window: int | None,
) -> Tensor:
    """sum_n C h with h = exp(dt A) h + B x along `axis`, (B, H, W, E)."""
    if is_exporting():
        from .exported import recurrence  # an exported loop would have a fixed length

        return recurrence(dt, x, A, B, C, axis, reverse, window)
    length = dt.shape[axis]
    nothing = (None,) * length
    # unbind once: indexing inside the loop would make the backward quadratic in the length.
    dts, xs = dt.unsqueeze(-1).unbind(axis), x.unsqueeze(-1).unbind(axis)  # (B, lines, E, 1) each
    Bs = nothing if B is None else B.unsqueeze(-2).unbind(axis)  # (B, lines, 1, N) each
    Cs = nothing if C is None else C.unsqueeze(-2).unbind(axis)

    ys: list[Tensor] = [x] * length
    # The first step has nothing to decay. Where no step has, A still takes part: its gradient is 0.
    start = None if length > 1 and window != 1 else x.new_zeros(())
    h = start
    for i in range(length - 1, -1, -1) if reverse else range(length):
        if window is not None and (i + 1 if reverse else i) % window == 0:
            h = start
        x_i = xs[i].expand(*xs[i].shape[:-1], A.shape[1]) if Bs[i] is None else xs[i] * Bs[i]
        h = x_i if h is None else torch.addcmul(x_i, torch.exp(dts[i] * A), h)
        ys[i] = (h if Cs[i] is None else h * Cs[i]).sum(-1)
    return torch.stack(ys, dim=axis)
