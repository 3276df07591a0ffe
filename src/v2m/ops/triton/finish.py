"""The second stage of every reduction. Small work, so what counts is the number of launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scan import LN2


class Shares(NamedTuple):
    """What programs have each summed, to be added up."""

    partial: Tensor  # (parts, rows, E)
    turned: int = 0  # so many of the rows are wanted as (E, turned)
    factor: Tensor | None = None  # (turned, E), A log2(e), by which they are multiplied, ln(2) too


@triton.jit
def add_up(
    partial, factor, out, row, parts, rows, turned, E, PARTS: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One row of `Shares`, in a fixed order; the rows that are not turned lie behind the others."""
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


SIZES = [f"{name}{i}" for i in (1, 2, 3) for name in ("parts", "rows", "turned")]


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    partial1, factor1, parts1, rows1, turned1,
    partial2, factor2, parts2, rows2, turned2,
    partial3, factor3, parts3, rows3, turned3,
    out, E,
    PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Up to three `Shares`, a program a row and block of channels."""
    row = tl.program_id(0)
    if row < rows1:
        add_up(partial1, factor1, out, row, parts1, rows1, turned1, E, PARTS, BLOCK_E)
    elif row < rows1 + rows2:
        if partial2 is not None:
            out += rows1 * E
            row -= rows1
            add_up(partial2, factor2, out, row, parts2, rows2, turned2, E, PARTS, BLOCK_E)
    else:
        if partial3 is not None:
            out += (rows1 + rows2) * E
            row -= rows1 + rows2
            add_up(partial3, factor3, out, row, parts3, rows3, turned3, E, PARTS, BLOCK_E)


def finish(*shares: Shares) -> list[tuple[Tensor, Tensor]]:
    """The sums of up to three, all of E channels: of each, its turned rows and the rest."""
    channels, device = shares[0].partial.shape[2], shares[0].partial.device
    rows = [share.partial.shape[1] for share in shares]
    out = torch.empty(sum(rows) * channels, dtype=torch.float32, device=device)
    arguments = []
    for share in shares:
        arguments += [share.partial, share.factor, *share.partial.shape[:2], share.turned]
    arguments += [None, None, 0, 0, 0] * (3 - len(shares))
    finish_kernel[sum(rows), triton.cdiv(channels, 32)](
        *arguments, out, channels, PARTS=128, BLOCK_E=32, num_warps=4
    )
    found = []
    for share, piece in zip(shares, out.split([count * channels for count in rows])):
        turned, rest = piece.split([share.turned * channels, len(piece) - share.turned * channels])
        found.append((turned.view(channels, share.turned), rest.view(-1, channels)))
    return found
