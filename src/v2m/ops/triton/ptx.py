"""What PTX says and the kernel language cannot; where there is no PTX, left out or spelled out."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import speaks_ptx

PTX = tl.constexpr(speaks_ptx())


@triton.jit
def reciprocal(x):
    """1 / x within an ulp or two; a quotient takes five instructions, for sizes beyond 2^126."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    return 1.0 / x


@triton.jit
def hold(x):
    """x as it is, but not before what is written before it: the compiler would put what a matrix
    product wants in shared memory there right behind its load, and wait for one load at a time."""
    if PTX:
        each: tl.constexpr = 32 // x.dtype.primitive_bitwidth  # elements a register
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, each)
    return x


@triton.jit
def opaque(pointers):
    """The pointers as they are; but the compiler no longer sees how they were made.

    It would take a scalar and a lane apart and add them at every use, a quarter of the replay's
    instructions that compute nothing.
    """
    if PTX:
        known = tl.inline_asm_elementwise(
            "mov.b64 $0, $1;", "=l,l", [pointers.to(tl.int64)], tl.int64, True, 1
        )
        return known.to(pointers.dtype)
    return pointers


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
