"""Sums over the channels of a program, for the gradients of B and C: a row a step of a chunk.

SUMS 0: by shuffles, in float32. 1: on the tensor cores in tf32, ones times the values, which go
through shared memory. 2: likewise without it; the sums are then held transposed, (N, rows).
There the lanes of a warp hold a channel each, and the product takes the values from where they are:
it adds up fours of channels, a row picking a state, and shuffles add up what is left.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def channel_sum(total, values, j, SUMS: tl.constexpr):
    """Put the sum of (E, N) values over their channels into row j of total."""
    E: tl.constexpr = values.shape[0]
    N: tl.constexpr = values.shape[1]
    if SUMS == 2:
        pick = tl.where(tl.arange(0, N)[:, None] == tl.arange(0, 4 * N)[None, :] // 4, 1.0, 0.0)
        fours = tl.reshape(values, [E // 4, 4, N])
        fours = tl.reshape(tl.permute(fours, [2, 1, 0]), [4 * N, E // 4])
        found = tl.sum(tl.dot(pick, fours, input_precision="tf32"), axis=1)[:, None]
        row = tl.arange(0, total.shape[1])[None, :]
    else:
        row = tl.arange(0, total.shape[0])[:, None]
        if SUMS == 1:
            ones = tl.full([total.shape[0], E], 1.0, tl.float32)
            found = tl.dot(ones, values, input_precision="tf32")
        else:
            found = tl.sum(values, axis=0)[None, :]
    return tl.where(row == j, found, total)


@triton.jit
def no_sums(N: tl.constexpr, CHUNK: tl.constexpr, SUMS: tl.constexpr):
    """The sums of a chunk's steps before there are any."""
    ROWS: tl.constexpr = 16 if SUMS == 1 else triton.next_power_of_2(CHUNK)
    if SUMS == 2:
        return tl.zeros([N, ROWS], tl.float32)
    else:
        return tl.zeros([ROWS, N], tl.float32)


@triton.jit
def store_sums(pointer, total, stride, n, N, alive, SUMS: tl.constexpr):
    """Store the sums of a chunk's steps, `stride` elements apart."""
    if SUMS == 2:
        row = tl.arange(0, total.shape[1])[None, :]
        n = n[:, None]
    else:
        row = tl.arange(0, total.shape[0])[:, None]
        n = n[None, :]
    tl.store((pointer + row * stride) + n, total, (row < alive) & (n < N))
