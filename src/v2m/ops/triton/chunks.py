"""What the scan's backward holds of a few steps at a time: rows of its grids, packed states."""

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
def load_rows(pointer, stride, N, alive, PADDED_N: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK rows of N as one tile (N, CHUNK) that the lanes share, zeros beyond `alive`."""
    n = tl.arange(0, PADDED_N)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
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


@triton.jit
def place_of(pairs):
    """Where 8 pairs of each of 32 channels lie in a place of the scratch buffer: the first four of
    a channel side by side, the others 128 words on. All 8 have one address, that of the first.
    """
    # A zero from the pairs themselves: the addresses lie in the registers as they do.
    zero = tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [pairs], tl.int32, True, 1)
    return zero + 4 * tl.arange(0, 32)[:, None]


@triton.jit
def store_state(pointers, h, PACKED: tl.constexpr):
    """Store (E, N) states; packed, 16 bytes at a time, where the compiler would store 4."""
    if PACKED:
        tl.inline_asm_elementwise(
            "st.global.v4.b32 [$8], {$16, $17, $18, $19};"
            "st.global.v4.b32 [$8+512], {$20, $21, $22, $23};"
            "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
            "mov.b32 $4, 0; mov.b32 $5, 0; mov.b32 $6, 0; mov.b32 $7, 0;",
            "=r,=r,=r,=r,=r,=r,=r,=r,l,l,l,l,l,l,l,l,r,r,r,r,r,r,r,r",
            [pointers, packed(h)], tl.int32, False, 8,
        )  # fmt: skip
    else:
        tl.store(pointers, h)


@triton.jit
def load_state(pointers, PACKED: tl.constexpr):
    """What `store_state` stored; for `unpacked` if packed."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$8];"
            "ld.global.v4.b32 {$4, $5, $6, $7}, [$8+512];",
            "=r,=r,=r,=r,=r,=r,=r,=r,l,l,l,l,l,l,l,l", [pointers], tl.uint32, False, 8,
        )  # fmt: skip
    return tl.load(pointers)
