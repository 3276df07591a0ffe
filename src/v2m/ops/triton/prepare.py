"""Weights as the big kernels take them: decay rates, and projections in the grids' precision.

One launch for both passes, and again in the backward, which is less than keeping them would be.

Every tile of a projection reads its weights whole: in 16 bits and padded with zeros they take half
the loads and no masks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device, padded
from .scan import LOG2E

_BLOCK_E = 64


class Prepared(NamedTuple):
    """Of one pass."""

    rates: Tensor  # (N, E), A log2(e), float32
    taps: Tensor  # (padded width, E), of the convolution, transposed, float32
    x_proj: Tensor  # (padded R + padded N, E), zeros where there is no row
    dt_proj: Tensor  # (padded R, E), transposed


@triton.jit
def store_rates(a, out, e, E, N, IS_LOG: tl.constexpr, PADDED_N: tl.constexpr):
    """out: (N, E) float32, A log2(e); a: (E, N), A or, if IS_LOG, log(-A)."""
    n = tl.arange(0, PADDED_N)[:, None]
    mask = (e < E)[None, :] & (n < N)
    value = tl.load(a + e[None, :] * N + n, mask, 0.0).to(tl.float32)
    if IS_LOG:
        value = -tl.exp2(value * LOG2E)
    tl.store(out + n * E + e[None, :], value * LOG2E, mask)


@triton.jit
def store_rows(
    weight, out, e, E, rows, e_stride, row_stride, PADDED: tl.constexpr
):  # fmt: skip
    """out: (PADDED, E), zeros from `rows` on."""
    row = tl.arange(0, PADDED)[:, None]
    inside = (e < E)[None, :]
    value = tl.load(weight + e[None, :] * e_stride + row * row_stride, inside & (row < rows), 0.0)
    tl.store(out + row * E + e[None, :], value.to(out.dtype.element_ty), inside)


@triton.jit
def rates_kernel(a, out, E, N, IS_LOG: tl.constexpr, PADDED_N: tl.constexpr, BLOCK_E: tl.constexpr):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    store_rates(a, out, e, E, N, IS_LOG, PADDED_N)


@triton.jit
def prepare_kernel(
    A_log, conv_weight, x_proj, dt_proj, A_log2, conv_weight2, x_proj2, dt_proj2,
    rates, taps, weights, E, N, R,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
    PADDED_W: tl.constexpr,
    PADDED_R: tl.constexpr,
    PADDED_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Both passes: A_log (E, N), conv_weight (E, WIDTH), x_proj (R + N, E), dt_proj (E, R) of each;
    see `Prepared`."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    if tl.program_id(1) == 1:
        A_log, conv_weight, x_proj, dt_proj = A_log2, conv_weight2, x_proj2, dt_proj2
        rates += N * E
        taps += PADDED_W * E
        weights += (PADDED_R + PADDED_N + PADDED_R) * E
    store_rates(A_log, rates, e, E, N, True, STATES)
    store_rows(conv_weight, taps, e, E, WIDTH, WIDTH, 1, PADDED_W)
    store_rows(x_proj, weights, e, E, R, 1, E, PADDED_R)
    store_rows(x_proj + R * E, weights + PADDED_R * E, e, E, N, 1, E, PADDED_N)
    store_rows(dt_proj, weights + (PADDED_R + PADDED_N) * E, e, E, R, R, 1, PADDED_R)


def rates(A: Tensor) -> Tensor:
    """(E, N) decay rates as the scans take them: (N, E), times log2(e)."""
    channels, states = A.shape
    out = torch.empty(states, channels, dtype=torch.float32, device=A.device)
    with on_device(A):
        rates_kernel[(triton.cdiv(channels, _BLOCK_E),)](
            A.detach().contiguous(), out, channels, states, IS_LOG=False,
            PADDED_N=padded(states), BLOCK_E=_BLOCK_E, num_warps=2,
        )  # fmt: skip
    return out


def prepare(first, second, dtype: torch.dtype) -> tuple[Prepared, Prepared]:
    """The weights of both passes, projections in dtype, in one launch."""
    channels, states = first.A_log.shape
    rank, device = first.dt_proj.shape[1], first.A_log.device
    width, pads = first.conv_weight.shape[1], (padded(rank, 16), padded(states, 16))
    rates = torch.empty(2, states, channels, dtype=torch.float32, device=device)
    taps = torch.empty(2, padded(width), channels, dtype=torch.float32, device=device)
    weights = torch.empty(2, 2 * pads[0] + pads[1], channels, dtype=dtype, device=device)
    given = [
        x.detach().contiguous()
        for w in (first, second)
        for x in (w.A_log, w.conv_weight, w.x_proj, w.dt_proj)
    ]
    prepare_kernel[triton.cdiv(channels, _BLOCK_E), 2](
        *given, rates, taps, weights, channels, states, rank,
        WIDTH=width, STATES=padded(states), PADDED_W=padded(width), PADDED_R=pads[0],
        PADDED_N=pads[1], BLOCK_E=_BLOCK_E, num_warps=2,
    )  # fmt: skip
    return tuple(
        Prepared(rates[i], taps[i], *weights[i].split([pads[0] + pads[1], pads[0]]))
        for i in range(2)
    )
