"""What the scan's backward holds of a few steps at a time: rows of its grids."""

# Tuples of tensors grow by +: the kernel language has no star.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_steps(pointer, stride, lanes, size, alive, COUNT: tl.constexpr, MASK: tl.constexpr):
    """(size,) rows of COUNT steps, `stride` elements apart; zeros beyond `alive` steps.

    pointer: (size,), to the elements of the first row.

    MASK: 0 where every lane and step is there, 1 where every lane is.
    """
    rows = ()
    for j in tl.static_range(COUNT):
        at = pointer + j * stride
        if MASK == 0:
            rows = rows + (tl.load(at),)
        elif MASK == 1:
            rows = rows + (tl.load(at, j < alive, 0.0),)
        else:
            rows = rows + (tl.load(at, lanes < tl.where(j < alive, size, 0), 0.0),)
    return rows


@triton.jit
def load_rows(pointer, stride, N, alive, PADDED_N: tl.constexpr, COUNT: tl.constexpr):
    """COUNT rows of N as one tile that the lanes share, a column each; beyond `alive` zeros.

    For three rows it has four columns.
    """
    n = tl.arange(0, PADDED_N)[:, None]
    j = tl.arange(0, 4 if COUNT == 3 else COUNT)[None, :]
    return tl.load(pointer + j * stride + n, (n < N) & (j < alive), 0.0)


@triton.jit
def columns(tile):
    """The columns of a tile of 2 or 4, as `load_rows` loads them."""
    if tile.shape[1] == 2:
        found = tl.split(tile)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        found = first, second, third, fourth
    return found


@triton.jit
def floats(rows):
    found = ()
    for j in tl.static_range(len(rows)):
        found = found + (rows[j].to(tl.float32),)
    return found
