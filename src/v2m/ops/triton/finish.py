"""What precedes and follows the big kernels: decay rates, and the second stage of every reduction.

Small work, so what counts is the number of launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device, padded
from .scan import LN2, LOG2E


@triton.jit
def decay_kernel(a, out, E, N, IS_LOG: tl.constexpr, PADDED_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """out: (N, E) float32, A log2(e); a: (E, N), A or, if IS_LOG, log(-A)."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, PADDED_N)[:, None]
    mask = (e < E)[None, :] & (n < N)
    value = tl.load(a + e[None, :] * N + n, mask, 0.0).to(tl.float32)
    if IS_LOG:
        value = -tl.exp2(value * LOG2E)
    tl.store(out + n * E + e[None, :], value * LOG2E, mask)


def decays(a: Tensor, *, is_log: bool) -> Tensor:
    """(E, N) decay rates, or the logarithms of their sizes, as the scans take them: (N, E)."""
    channels, states = a.shape
    out = torch.empty(states, channels, dtype=torch.float32, device=a.device)
    with on_device(a):
        decay_kernel[(triton.cdiv(channels, 128),)](
            a.detach().contiguous(), out, channels, states, IS_LOG=is_log,
            PADDED_N=padded(states), BLOCK_E=128, num_warps=2,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["parts", "rows", "turned"])
def finish_kernel(
    partial, factor, out, parts, rows, turned, E,
    PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Sums of partial, (parts, rows, E), in a fixed order; a program a row and block of channels.

    The first `turned` rows go to out as (E, turned), times factor (turned, E) ln(2) if there is
    one, and the others behind them as they are.
    """
    row = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.arange(0, PARTS)
    total = tl.zeros([PARTS, BLOCK_E], tl.float32)
    for first in range(0, parts, PARTS):
        at = (first + part).to(tl.int64)[:, None] * (rows * E) + (row * E + e)[None, :]
        total += tl.load(partial + at, (first + part < parts)[:, None] & (e < E)[None, :], 0.0)
    found = tl.sum(total, axis=0)
    if row < turned:
        if factor is not None:
            found *= tl.load(factor + row * E + e, e < E, 0.0) * LN2
        tl.store(out + e * turned + row, found, e < E)
    else:
        tl.store(out + row * E + e, found, e < E)


def finish(partial: Tensor, turned: int, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sum of (parts, rows, E) over the parts: its first `turned` rows as (E, turned), the rest.

    factor: (turned, E), A log2(e), by which the first are multiplied, without the log2(e).
    """
    parts, rows, channels = partial.shape
    out = torch.empty(rows * channels, dtype=torch.float32, device=partial.device)
    finish_kernel[rows, triton.cdiv(channels, 32)](
        partial, factor, out, parts, rows, turned, channels, PARTS=128, BLOCK_E=32, num_warps=4
    )
    first, rest = out.split([turned * channels, (rows - turned) * channels])
    return first.view(channels, turned), rest.view(rows - turned, channels)
