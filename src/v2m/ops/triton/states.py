"""Where the states of a scan's backward wait between the walk forwards and the walk back.

The state before a chunk waits in the place of that number. Those that are wanted first, the last of
a line, wait near, in shared memory, as many as there is room for; the others far, in the program's
slice of a scratch buffer in global memory, and come near, a whole round of places ahead, as the
walk back makes room. In the way of the grids' rows, through the L1, states would cost more than
their bytes.

Packed, a place holds the 16 states of 32 channels as pairs of bfloat16, 16 bytes a thread at a
time, where the compiler would move 4. Only packed states are ever near. Each thread reads what it
has itself written, so nobody waits for others.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Operands, each in 8 registers, of which the first counts for addresses: results, an address far
# and one near, what tells which of them holds, and, to be stored, the words.
_STORE = tl.constexpr(
    "{ .reg .pred far; setp.lt.s32 far, $24, 0;"
    "@far st.global.v4.b32 [$8], {$32, $33, $34, $35};"
    "@far st.global.v4.b32 [$8+512], {$36, $37, $38, $39};"
    "@!far st.shared.v4.b32 [$16], {$32, $33, $34, $35};"
    "@!far st.shared.v4.b32 [$16+512], {$36, $37, $38, $39};"
    + "".join(f"mov.b32 ${i}, 0;" for i in range(8))  # results, for nobody
    + "}"
)
_STORE_REGISTERS = tl.constexpr(",".join(["=r"] * 8 + ["l"] * 8 + ["r"] * 24))
_LOAD_FAR = tl.constexpr(
    "ld.global.v4.b32 {$0, $1, $2, $3}, [$8]; ld.global.v4.b32 {$4, $5, $6, $7}, [$8+512];"
)
_LOAD_NEAR = tl.constexpr(
    "ld.shared.v4.b32 {$0, $1, $2, $3}, [$8]; ld.shared.v4.b32 {$4, $5, $6, $7}, [$8+512];"
)
_BRING = tl.constexpr(
    "{ .reg .pred far; setp.ge.s32 far, $24, 0;"
    "@far cp.async.cg.shared.global [$16], [$8], 16;"
    "@far cp.async.cg.shared.global [$16+512], [$8+512], 16;"
    "cp.async.commit_group;" + "".join(f"mov.b32 ${i}, 0;" for i in range(8)) + "}"
)
_BRING_REGISTERS = tl.constexpr(",".join(["=r"] * 8 + ["l"] * 8 + ["r"] * 16))
_FAR_REGISTERS = tl.constexpr(",".join(["=r"] * 8 + ["l"] * 8))
_NEAR_REGISTERS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 8))


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
def within_place(pairs):
    """Where 8 pairs of each of 32 channels lie in a place, in words: the first four of a channel
    side by side, the others 128 words on. All 8 have one address, that of the first.
    """
    # A zero from the pairs themselves: the addresses lie in the registers as they do.
    zero = tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [pairs], tl.int32, True, 1)
    return zero + 4 * tl.arange(0, 32)[:, None]


@triton.jit
def near_places(zero, NEAR: tl.constexpr):
    """Address of NEAR places in shared memory. zero: a scalar, for form's sake."""
    return tl.inline_asm_elementwise(
        f"{{ .shared .align 16 .b8 places[{NEAR * 1024}]; mov.u32 $0, places; }}",
        "=r,r", [zero], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def store_state(
    h,
    place,
    chunks,
    far,
    near,
    within,
    PLACE: tl.constexpr,
    PACKED: tl.constexpr,
    NEAR: tl.constexpr,
):
    """Store (E, N) states in a place of a line of so many chunks.

    far: pointer to place 0 of the scratch buffer, if any is there; near: address of the first of
    NEAR places; PLACE: elements of a place; within: where those of a thread lie in it.
    """
    if PACKED:
        far_at = tl.zeros([], tl.int64)
        near_at = 0
        if far is not None:
            far_at = (far + place * PLACE + within).to(tl.int64)
        if NEAR:
            near_at = near + place % NEAR * 1024 + 4 * within
        behind = 0 if far is None else place - (chunks + 1 - NEAR) if NEAR else -1
        tl.inline_asm_elementwise(
            _STORE, _STORE_REGISTERS, [far_at, near_at, behind, packed(h)], tl.int32, False, 8
        )
    else:
        tl.store(far + place * PLACE + within, h)


@triton.jit
def load_state(
    place, far, near, within, PLACE: tl.constexpr, PACKED: tl.constexpr, NEAR: tl.constexpr
):
    """What `store_state` stored, in float32, places being asked for from the last to the first."""
    if NEAR:
        if far is not None:
            came = place + 1 - NEAR
            tl.inline_asm_elementwise(
                _BRING,
                _BRING_REGISTERS,
                [
                    (far + came * PLACE + within).to(tl.int64),
                    near + (place + 1) % NEAR * 1024 + 4 * within,
                    came,
                ],
                tl.int32,
                False,
                8,
            )
            tl.inline_asm_elementwise(
                f"cp.async.wait_group {NEAR - 1}; mov.b32 $0, 0;",
                "=r,r",
                [place],
                tl.int32,
                False,
                1,
            )
        pairs = tl.inline_asm_elementwise(
            _LOAD_NEAR,
            _NEAR_REGISTERS,
            [near + place % NEAR * 1024 + 4 * within],
            tl.uint32,
            False,
            8,
        )
        return unpacked(pairs)
    elif PACKED:
        pairs = tl.inline_asm_elementwise(
            _LOAD_FAR,
            _FAR_REGISTERS,
            [(far + place * PLACE + within).to(tl.int64)],
            tl.uint32,
            False,
            8,
        )
        return unpacked(pairs)
    else:
        return tl.load(far + place * PLACE + within)
