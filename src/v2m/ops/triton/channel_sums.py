"""Sums over the channels of a program, for the gradients of B and C: a row a step of a chunk."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def no_sums(N: tl.constexpr, CHUNK: tl.constexpr, BY_DOT: tl.constexpr):
    """The sums of a chunk's steps before there are any."""
    ROWS: tl.constexpr = 16 if BY_DOT else triton.next_power_of_2(CHUNK)
    return tl.zeros([ROWS, N], tl.float32)


@triton.jit
def channel_sum(total, values, j, BY_DOT: tl.constexpr):
    """Put the sum of (E, N) values over their channels into row j of total.

    BY_DOT: on the tensor cores in tf32, as ones times the values; else by shuffles, in float32.
    """
    if BY_DOT:
        ones = tl.full([total.shape[0], values.shape[0]], 1.0, tl.float32)
        found = tl.dot(ones, values, input_precision="tf32")
    else:
        found = tl.sum(values, axis=0)[None, :]
    row = tl.arange(0, total.shape[0])[:, None]
    return tl.where(row == j, found, total)


@triton.jit
def store_sums(pointer, total, stride, n, N, alive):
    """Store the sums of a chunk's steps, `stride` elements apart."""
    row = tl.arange(0, total.shape[0])[:, None]
    mask = (row < alive) & (n < N)[None, :]
    tl.store((pointer + row * stride) + n[None, :], total.to(pointer.dtype.element_ty), mask)
