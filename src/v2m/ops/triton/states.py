"""Where the states of a scan's backward wait between the walk forwards and the walk back.

The state before a chunk waits in the place of that number. In the way of the grids' rows, through
the L1, states cost more than their bytes. So in bfloat16 they wait in shared memory, near; of a
line that has more of them than there is room for, the first ones far, in the program's slice of a
scratch buffer in global memory, and each comes near a whole round of places before it is wanted.
Else all are far, in float32.

Near, a place holds the 16 states of 32 channels as pairs of bfloat16, and a thread moves 16 bytes
at a time. Each reads what it has written itself, so that nobody waits for others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ptx import packed, unpacked

PLACE_BYTES = tl.constexpr(1024)


def _registers(words: bool) -> str:
    """8 results, addresses far and near, how many places behind the first near one, and words; all
    8 addresses are the same."""
    return ",".join(["=r"] * 8 + ["l"] * 8 + ["r"] * (24 if words else 16))


_NO_RESULTS = "".join(f"mov.b32 ${i}, 0;" for i in range(8))
_STORE = tl.constexpr(
    "{ .reg .pred far; setp.lt.s32 far, $24, 0;"
    "@far st.global.v4.b32 [$8], {$32, $33, $34, $35};"
    "@far st.global.v4.b32 [$8+512], {$36, $37, $38, $39};"
    "@!far st.shared.v4.b32 [$16], {$32, $33, $34, $35};"
    "@!far st.shared.v4.b32 [$16+512], {$36, $37, $38, $39};"
    f"{_NO_RESULTS} }}"
)
_BRING = tl.constexpr(
    "{ .reg .pred there; setp.ge.s32 there, $24, 0;"
    "@there cp.async.cg.shared.global [$16], [$8], 16;"
    "@there cp.async.cg.shared.global [$16+512], [$8+512], 16;"
    f"cp.async.commit_group; {_NO_RESULTS} }}"
)
_LOAD = tl.constexpr(
    "ld.shared.v4.b32 {$0, $1, $2, $3}, [$8]; ld.shared.v4.b32 {$4, $5, $6, $7}, [$8+512];"
)
_STORE_REGISTERS = tl.constexpr(_registers(words=True))
_BRING_REGISTERS = tl.constexpr(_registers(words=False))
_LOAD_REGISTERS = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 8))


@triton.jit
def near_places(zero, NEAR: tl.constexpr):
    """Address of NEAR places in shared memory. zero: a scalar, for form's sake."""
    return tl.inline_asm_elementwise(
        f"{{ .shared .align 16 .b8 places[{NEAR * PLACE_BYTES}]; mov.u32 $0, places; }}",
        "=r,r", [zero], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def within_place(pairs):
    """Where 8 pairs of each of 32 channels lie in a place, in words: the first four of a channel
    side by side, the others 128 words on. All 8 have one address, that of the first.
    """
    # A zero from the pairs themselves: the addresses lie in the registers as they do.
    zero = tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [pairs], tl.int32, True, 1)
    return zero + 4 * tl.arange(0, 32)[:, None]


@triton.jit
def place_near(place, near, NEAR: tl.constexpr):
    """Address of a place in the shared memory that begins at `near`."""
    return near + place % NEAR * PLACE_BYTES if NEAR else 0


@triton.jit
def place_behind(at, far, near, NEAR: tl.constexpr):
    """Address of the place behind that at `at`; with none far, there is no way round."""
    at += PLACE_BYTES
    if far is not None and NEAR:
        at = tl.where(at == near + NEAR * PLACE_BYTES, near, at)
    return at


@triton.jit
def place_before(at, far, near, NEAR: tl.constexpr):
    """Address of the place before that at `at`."""
    if far is not None and NEAR:
        at = tl.where(at == near, near + NEAR * PLACE_BYTES, at)
    return at - PLACE_BYTES


@triton.jit
def store_state(h, place, at, places, far, within, PLACE: tl.constexpr, NEAR: tl.constexpr):
    """Store (E, N) states in one of a line's places.

    at: its `place_near`; far: pointer to place 0 of the scratch buffer, or none if all are near;
    PLACE: elements of a place; within: where those of a thread lie in it.
    """
    if NEAR:
        far_at = tl.zeros([], tl.int64)
        behind = 0
        if far is not None:
            far_at = (far + place * PLACE + within).to(tl.int64)
            behind = place - (places - NEAR)
        tl.inline_asm_elementwise(
            _STORE, _STORE_REGISTERS, [far_at, at + 4 * within, behind, packed(h)],
            tl.int32, False, 8,
        )  # fmt: skip
    else:
        tl.store(far + place * PLACE + within, h)


@triton.jit
def load_state(place, at, behind, far, within, PLACE: tl.constexpr, NEAR: tl.constexpr):
    """What `store_state` stored. Places are asked for from the last but one to the first; behind:
    `place_near` of the one behind, which is free by now: there comes what is wanted NEAR - 1 places
    from here."""
    if NEAR:
        if far is not None:
            comes = place + 1 - NEAR
            far_at = (far + comes * PLACE + within).to(tl.int64)
            tl.inline_asm_elementwise(
                _BRING, _BRING_REGISTERS, [far_at, behind + 4 * within, comes], tl.int32, False, 8
            )
            tl.inline_asm_elementwise(
                f"cp.async.wait_group {NEAR - 1}; mov.b32 $0, 0;",
                "=r,r", [place], tl.int32, False, 1,
            )  # fmt: skip
        pairs = tl.inline_asm_elementwise(
            _LOAD, _LOAD_REGISTERS, [at + 4 * within], tl.uint32, False, 8
        )
        h = unpacked(pairs)
    else:
        h = tl.load(far + place * PLACE + within)
    return h
