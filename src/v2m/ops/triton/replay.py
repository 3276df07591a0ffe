"""The walk forwards of the scan's backward: it leaves the states that the walk back starts from."""

from __future__ import annotations

import triton
import triton.language as tl

from .chunks import columns, floats, load_rows, load_steps, store_state
from .ptx import far_rows, fetch, opaque
from .scan import step_size


@triton.jit
def replay_steps(
    h, saved, xs, raw, Bs, next_B, left, A_block, bias, live, place, stride_n, n, N,
    MORE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACE: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Some steps of `replay`: the state behind them, and where it was saved.

    xs, raw, Bs: their rows. MORE: rows of B at next_B, as many, take the place of those used.
    """
    next_Bs = ()
    for j in tl.static_range(len(xs)):
        step = step_size(raw[j], bias, SOFTPLUS)
        B_now = live
        if next_B is not None:
            B_now = Bs[j].to(tl.float32)[None, :]
            if MORE:
                next_Bs = next_Bs + load_steps(
                    next_B + n + j * stride_n, 0, n, N, left - j, 1, EVEN
                )
        h = tl.exp2(step[:, None] * A_block) * h + (step * xs[j])[:, None] * B_now
        if j % CHUNK == CHUNK - 1:
            saved += PLACE
            store_state(saved + place, h, PACKED)
    return h, saved, next_Bs


@triton.jit
def replay(
    u, dt, B, A_block, bias, live, saved, place, steps,
    stride_e, stride_n, e, E, n, N,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PLACE: tl.constexpr,
    PACKED: tl.constexpr,
    AHEAD: tl.constexpr,
    FETCH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Walk a line forwards and save the state after every chunk but the last.

    u, dt: (E,) pointers to the line's first row, B: to that row's first state; saved: to the state
    before it, and place: where its elements lie from there. A line is touched here first, in the
    slowest memory, so its rows are loaded GROUP chunks ahead, and fetched two such groups before
    that. AHEAD: rows of B as a tile that the lanes share.
    """
    STEPS: tl.constexpr = CHUNK * GROUP
    N_PAD: tl.constexpr = A_block.shape[1]
    h = tl.zeros(A_block.shape, tl.float32)
    groups = tl.cdiv(steps - CHUNK, STEPS)
    if groups > 0:
        u = opaque(u)
        dt = opaque(dt)
        us = load_steps(u, stride_e, e, E, steps, STEPS, EVEN)
        dts = load_steps(dt, stride_e, e, E, steps, STEPS, EVEN)
        Bs = ()
        if B is not None:
            if AHEAD:
                B_rows = load_rows(B, stride_n, N, steps, N_PAD, STEPS)
            else:
                Bs = load_steps(B + n, stride_n, n, N, steps, STEPS, EVEN)
        if FETCH:
            far, far_step = far_rows((u, dt), (stride_e, stride_e), 3 * STEPS, STEPS)
        for g in range(1, groups):
            xs = floats(us)
            raw = floats(dts)
            left = steps - g * STEPS
            u += STEPS * stride_e
            dt += STEPS * stride_e
            if FETCH:
                later = 2 * STEPS + tl.arange(0, 32) % STEPS
                fetch(far, (tl.arange(0, 32) < 2 * STEPS) & (later < left))
                far += far_step
            now_Bs = Bs
            if B is not None:
                B += STEPS * stride_n
                if AHEAD:
                    now_Bs = columns(B_rows)
                    B_rows = load_rows(B, stride_n, N, left, N_PAD, STEPS)
            us = load_steps(u, stride_e, e, E, left, STEPS, EVEN)
            dts = load_steps(dt, stride_e, e, E, left, STEPS, EVEN)
            h, saved, next_Bs = replay_steps(
                h, saved, xs, raw, now_Bs, B, left, A_block, bias, live, place, stride_n, n, N,
                not AHEAD, SOFTPLUS, CHUNK, PLACE, PACKED, EVEN,
            )  # fmt: skip
            if not AHEAD:
                Bs = next_Bs
        if AHEAD and B is not None:
            Bs = columns(B_rows)
        replay_steps(
            h, saved, floats(us), floats(dts), Bs, B, 0, A_block, bias, live, place, stride_n, n, N,
            False, SOFTPLUS, CHUNK, PLACE, PACKED, EVEN,
        )  # fmt: skip
