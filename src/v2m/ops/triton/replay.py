"""The walk forwards of the scan's backward: it leaves the states that the walk back starts from.

It has every state in float32, and instructions to spare beside its exponentials. So what depends on
the states alone, the gradients of C and of the gate, is done here, unless B is there as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_sums import store_channel_sum
from .chunks import columns, floats, load_rows, load_steps
from .ptx import far_rows, fetch, opaque
from .scan import nonzero_gate, sigmoid, step_size
from .states import place_behind, place_near, store_state


@triton.jit
def through_gate(g_out, gate, scale, LEAST_GATE: tl.constexpr):
    """Gradient of what comes before gate and scale, from that of y; the gate and its sigmoid."""
    gate = nonzero_gate(gate, LEAST_GATE)
    open_ = sigmoid(gate)
    return g_out * (scale * gate * open_), gate, open_


@triton.jit
def store_output_gradients(
    j, h, x, g_out, C_now, z, dz, dC, skip, ones, stride_e, stride_z, stride_share,
    e, E, n, N, alive, scale,
    ADD: tl.constexpr,
    LEAST_GATE: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Store the gradients of gate and C, those there are, of step j behind the pointers' rows;
    returns that of what comes before the gate.

    h: the state behind the step; x, g_out, C_now: its rows of u, dy and C.
    """
    if z is not None:
        inside = e < tl.where(alive, E, 0) if MASK else None
        out = scale * g_out * (tl.sum(h * C_now, axis=1) + skip * x)
        gate = tl.load(z + j * stride_z, inside)
        g_out, gate, open_ = through_gate(g_out, gate, scale, LEAST_GATE)
        dgate = out * open_ * (1.0 + gate * (1.0 - open_))
        dz += j * stride_e
        if ADD:
            dgate += tl.load(dz, inside).to(tl.float32)
        tl.store(dz, dgate.to(dz.dtype.element_ty), inside)
    if dC is not None:
        store_channel_sum(
            dC + j * stride_share, h * g_out[:, None], ones, n, N, alive, SUM_BY_PRODUCT, MASK
        )
    return g_out


@triton.jit
def replay_steps(
    h, chunk, at, places, far, near, within, xs, raw, g_outs, Bs, next_B, C, z, dz, dC, left,
    A_block, skip, bias, live, ones, stride_e, stride_n, stride_z, stride_share, e, E, n, N, scale,
    MORE: tl.constexpr,
    ADD: tl.constexpr,
    LEAST_GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACE: tl.constexpr,
    NEAR: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Some steps of `replay`, from a chunk on: the state behind them, the next chunk, its place.

    xs, raw, g_outs, Bs: their rows of u, dt, dy, B; C, z, dz, dC: pointers to those of the first.
    left: how many there are to the line's end. MORE: rows of B at next_B, as many, take the place
    of those used.
    """
    next_Bs = ()
    for j in tl.static_range(len(xs)):
        step = step_size(raw[j], bias, SOFTPLUS)
        B_now = live
        if Bs is not None:
            B_now = Bs[j].to(tl.float32)[None, :]
            if MORE:
                next_Bs = next_Bs + load_steps(
                    next_B + n + j * stride_n, 0, n, N, left - len(xs) - j, 1, MASK
                )
        h = tl.exp2(step[:, None] * A_block) * h + (step * xs[j])[:, None] * B_now
        if j % CHUNK == CHUNK - 1:
            chunk += 1
            at = place_behind(at, far, near, NEAR)
            store_state(h, chunk, at, places, far, within, PLACE, NEAR)
        if g_outs is not None:
            C_now = live
            if z is not None and C is not None:
                C_row = load_steps(C + n + j * stride_n, 0, n, N, left - j, 1, MASK)[0]
                C_now = C_row.to(tl.float32)[None, :]
            store_output_gradients(
                j, h, xs[j], g_outs[j], C_now, z, dz, dC, skip, ones,
                stride_e, stride_z, stride_share,
                e, E, n, N, j < left, scale, ADD, LEAST_GATE, SUM_BY_PRODUCT, MASK,
            )  # fmt: skip
    return h, chunk, at, next_Bs


@triton.jit
def replay(
    u, dt, dy, B, C, z, dz, dC, last_us, last_dts, last_dys, A_block, skip, bias, live, ones,
    places, far, near, within, steps, stride_e, stride_y, stride_n, stride_z,
    stride_share, e, E, n, N, scale,
    ADD: tl.constexpr,
    LEAST_GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    PLACE: tl.constexpr,
    NEAR: tl.constexpr,
    AHEAD: tl.constexpr,
    FETCH: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Walk a line forwards and save the state before every chunk; store what gradients of gate and
    C there are (B is none then). Without them the walk ends before the last chunk.

    u, dt, dy, z, dz: (E,) pointers to the line's first row; B, C, dC: to that row's first state;
    places, far, near, within: where states wait, see `store_state`; last_us, last_dts,
    last_dys: the rows of the last chunk. A line is touched here first, in the slowest memory, so
    its rows are loaded GROUP chunks ahead, and fetched two such groups before that. AHEAD: rows of
    B as a tile that the lanes share.
    """
    OUTPUTS: tl.constexpr = z is not None or dC is not None
    STEPS: tl.constexpr = CHUNK * GROUP
    WITHIN: tl.constexpr = MASK if MASK == 2 else 0  # before its last chunk a line has whole ones
    N_PAD: tl.constexpr = A_block.shape[1]
    h = tl.zeros(A_block.shape, tl.float32)
    first = (tl.cdiv(steps, CHUNK) - 1) * CHUNK
    groups = tl.cdiv(steps - CHUNK, STEPS)
    u_at = opaque(u)
    dt_at = opaque(dt)
    dy_at = opaque(dy) if OUTPUTS else dy
    B_at = B
    C_at = C
    z_at = z
    dz_at = dz
    dC_at = dC
    us = load_steps(u_at, stride_e, e, E, steps, STEPS, WITHIN)
    dts = load_steps(dt_at, stride_e, e, E, steps, STEPS, WITHIN)
    dys = load_steps(dy_at, stride_y, e, E, steps, STEPS, WITHIN) if OUTPUTS else None
    Bs = None
    if B is not None:
        if AHEAD:
            B_rows = load_rows(B, stride_n, N, steps, N_PAD, STEPS)
        else:
            Bs = load_steps(B + n, stride_n, n, N, steps, STEPS, WITHIN)
    if FETCH:
        grids = (u, dt, dy) if OUTPUTS else (u, dt)
        strides = (stride_e, stride_e, stride_y) if OUTPUTS else (stride_e, stride_e)
        to_fetch, fetch_step = far_rows(grids, strides, 3 * STEPS, STEPS)
    left = steps
    chunk = 0
    at = place_near(0, near, NEAR)
    store_state(h, chunk, at, places, far, within, PLACE, NEAR)
    for g in range(groups):
        xs = floats(us)
        raw = floats(dts)
        g_outs = floats(dys) if OUTPUTS else None
        then = left - STEPS
        on = tl.where(g < groups - 1, STEPS, 0)  # the last rows are loaded again: none come after
        u_at += on * stride_e
        dt_at += on * stride_e
        if FETCH:
            later = 2 * STEPS + tl.arange(0, 32) % STEPS
            fetch(to_fetch, (tl.arange(0, 32) < len(grids) * STEPS) & (later < then))
            to_fetch += fetch_step
        now_Bs = Bs
        if B is not None:
            B_at += on * stride_n
            if AHEAD:
                now_Bs = columns(B_rows)
                B_rows = load_rows(B_at, stride_n, N, then, N_PAD, STEPS)
        us = load_steps(u_at, stride_e, e, E, then, STEPS, WITHIN)
        dts = load_steps(dt_at, stride_e, e, E, then, STEPS, WITHIN)
        if OUTPUTS:
            dy_at += on * stride_y
            dys = load_steps(dy_at, stride_y, e, E, then, STEPS, WITHIN)
        h, chunk, at, next_Bs = replay_steps(
            h, chunk, at, places, far, near, within, xs, raw, g_outs, now_Bs, B_at, C_at,
            z_at, dz_at, dC_at, left, A_block, skip, bias, live, ones, stride_e, stride_n,
            stride_z, stride_share, e, E, n, N, scale, not AHEAD, ADD, LEAST_GATE, SOFTPLUS,
            SUM_BY_PRODUCT, CHUNK, PLACE, NEAR, WITHIN,
        )  # fmt: skip
        if B is not None and not AHEAD:
            Bs = next_Bs
        if C is not None:
            C_at += STEPS * stride_n
        if z is not None:
            z_at += STEPS * stride_z
            dz_at += STEPS * stride_e
        if dC is not None:
            dC_at += STEPS * stride_share
        left = then
    if OUTPUTS:  # noqa: SIM102 (this is known when compiled)
        if groups * STEPS == first:
            replay_steps(
                h, chunk, at, places, far, near, within, floats(last_us), floats(last_dts),
                floats(last_dys), None, None, C_at, z_at, dz_at, dC_at, left, A_block, skip, bias,
                live, ones, stride_e, stride_n, stride_z, stride_share, e, E, n, N, scale,
                False, ADD, LEAST_GATE, SOFTPLUS, SUM_BY_PRODUCT, CHUNK, PLACE, NEAR, MASK,
            )  # fmt: skip
