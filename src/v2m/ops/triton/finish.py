"""The second stage of every reduction. Small work, so what counts is the number of launches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scan import LN2


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
