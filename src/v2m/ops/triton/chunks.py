"""What the scan's backward holds of a few steps at a time: rows of its grids, packed states."""

# Tuples of tensors grow by +: the kernel language has no star.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_steps(pointer, stride, lanes, size, alive, COUNT: tl.constexpr, EVEN: tl.constexpr):
    """(size,) rows of COUNT steps, `stride` elements apart; zeros beyond `alive` steps.

    pointer: (size,), to the elements of the first row.

    EVEN: every lane and step is there, so nothing is masked.
    """
    rows = ()
    for j in tl.static_range(COUNT):
        at = pointer + j * stride
        if EVEN:
            rows = rows + (tl.load(at),)
        else:
            rows = rows + (tl.load(at, lanes < tl.where(j < alive, size, 0), 0.0),)
    return rows


@triton.jit
def load_rows(pointer, stride, N, alive, PADDED_N: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK rows of N as one tile (N, CHUNK) that the lanes share, zeros beyond `alive`."""
    n = tl.arange(0, PADDED_N)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    return tl.load(pointer + j * stride + n, (n < N) & (j < alive), 0.0)


@triton.jit
def far_rows(pointers, strides, first, COUNT: tl.constexpr):
    """Addresses of COUNT rows from the `first` on of some grids, one a lane, and steps to the next.

    pointers: to the grids' rows 0, strides: elements between rows.
    """
    lane = tl.arange(0, 32)
    at = tl.zeros([32], tl.int64)
    step = tl.zeros([32], tl.int64)
    for i in tl.static_range(len(pointers)):
        row = strides[i].to(tl.int64) * (pointers[i].dtype.element_ty.primitive_bitwidth // 8)
        mine = lane // COUNT == i
        at = tl.where(mine, pointers[i].to(tl.int64) + (first + lane % COUNT) * row, at)
        step = tl.where(mine, COUNT * row, step)
    return at, step


@triton.jit
def fetch(addresses, wanted):
    """Have what lies at the wanted addresses brought to the L2 cache, without waiting for it."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r", [addresses, wanted.to(tl.int32)], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def floats(rows):
    found = ()
    for j in tl.static_range(len(rows)):
        found = found + (rows[j].to(tl.float32),)
    return found


@triton.jit
def packed(h):
    """(E, N) states as (E, N / 2) pairs of bfloat16: half the bytes, and rounded to nearest."""
    low, high = tl.split(tl.reshape(h, [h.shape[0], h.shape[1] // 2, 2]))
    # One conversion for two; the language's own takes one each, from the unit of the exponentials.
    return tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], tl.uint32, True, 1
    )


@triton.jit
def unpacked(pairs):
    """What `packed` was given, in float32."""
    low = (pairs << 16).to(tl.float32, bitcast=True)
    high = (pairs & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(low, high), [pairs.shape[0], 2 * pairs.shape[1]])
