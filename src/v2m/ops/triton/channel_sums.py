"""Sums over the channels of a program, for the gradients of B and C: a row of N a step.

By shuffles in float32, or on the tensor cores without shared memory. There each lane of a warp has
all states of one channel in registers, and two products a group of 8 states add up the 32 lanes.
The first takes the values, in bfloat16, for its right operand, where a lane has four elements of
column lane // 4: its left operand is ones wherever the element's state is the row's, so that row n
of the result is state n, summed over the four lanes of a column. That lies in the registers as a
left operand does, and the second product, with ones, sums over the columns: as its operand a row's
odd columns are those of the row 8 below, so the two are added, and since the rows 8 to 15 repeat
the others, each counts half. (Where a lane's elements lie: PTX ISA, fragments of `mma.m16n8k16`
and `mma.m16n8k8`.)
"""

# Tuples of tensors grow by +: the kernel language has no star.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl


def _program() -> str:
    """8 results, all the same, from 8 values and the eight words of `picks`.

    In the lanes 4 n .. 4 n + 3 it is the sum of state n.
    """
    first = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    second = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    # Behind 8 results and 8 values; each is there 8 times.
    lower, upper = (", ".join(f"${16 + 8 * i}" for i in group) for group in (range(4), range(4, 8)))
    return f"""{{
        .reg .b32 v<4>, s<4>, half; .reg .f32 a<4>, c<4>, zero;
        mov.f32 zero, 0f00000000; mov.b32 half, 0x3f000000;
        cvt.rn.bf16x2.f32 v0, $9, $8; cvt.rn.bf16x2.f32 v1, $11, $10;
        cvt.rn.bf16x2.f32 v2, $13, $12; cvt.rn.bf16x2.f32 v3, $15, $14;
        {first} {{a0, a1, a2, a3}}, {{{lower}}}, {{v0, v1}}, {{zero, zero, zero, zero}};
        {first} {{a0, a1, a2, a3}}, {{{upper}}}, {{v2, v3}}, {{a0, a1, a2, a3}};
        {" ".join(f"mov.b32 s{i}, a{i};" for i in range(4))}
        {second} {{c0, c1, c2, c3}}, {{s0, s1, s2, s3}}, {{half, half}}, {{zero, zero, zero, zero}};
        add.f32 $0, c0, c2;
        {" ".join(f"mov.f32 ${i}, $0;" for i in range(1, 8))}
    }}"""


_PROGRAM = tl.constexpr(_program())
_REGISTERS = tl.constexpr(",".join(["=f"] * 8 + ["f"] * 8 + ["r"] * 64))


@triton.jit
def picks(LANES: tl.constexpr):
    """The first product's ones, (LANES, 1) words of two bfloat16: four for the states 0 to 3 of a
    group and four for the others. Rows 8 to 15 repeat the rows 0 to 7, and so do words; but those
    that the compiler knows to be equal it would copy together at every use."""
    found = ()
    row = tl.arange(0, LANES)[:, None] // 4
    for n in tl.static_range(0, 8, 2):
        here = (row >= n) & (row < n + 2)
        found = found + (tl.where(row == n, 0x3F80, 0) + tl.where(row == n + 1, 0x3F800000, 0),)
        found = found + (tl.where(here, 0x3F80 << (16 * (row & 1)), 0),)
    return found


@triton.jit
def _the_first(a, b):
    return a


@triton.jit
def store_channel_sum(
    pointer, values, ones, n, N, alive, BY_PRODUCT: tl.constexpr, MASK: tl.constexpr
):
    """Store the sums of (E, N) values over their channels, unless the step is not alive.

    MASK: 0 where it is, and N states are all there.

    pointer: to the first of the N sums; ones: of `picks`.
    """
    if BY_PRODUCT:
        E: tl.constexpr = values.shape[0]
        GROUPS: tl.constexpr = values.shape[1] // 8
        sums = tl.inline_asm_elementwise(
            _PROGRAM, _REGISTERS, (values,) + ones, tl.float32, True, 8
        )
        sums = tl.reduce(tl.reshape(sums, [E, GROUPS, 8]), 2, _the_first)
        lane = tl.arange(0, E)[:, None]
        state = lane // 4 + 8 * tl.arange(0, GROUPS)[None, :]
        mask = lane % 4 == 0
        if MASK:
            mask = mask & alive & (state < N)
        tl.store(pointer + state, sums.to(pointer.dtype.element_ty), mask)
    else:
        sums = tl.sum(values, axis=0)
        tl.store(pointer + n, sums.to(pointer.dtype.element_ty), alive & (n < N))
