"""The recurrence of one vector of channels along a line: the inner loops, four states (or one) at
a time.

The state and its decay stay in registers from the first step to the last; per step they load dt,
dt * u and the sum so far, and per state one number of B or C. `b` and `c` are addresses of the
first step's numbers, or None for the constant 1, which numba compiles into code of its own.
`state` and `adjoint` are the addresses of one vector a state.
"""

from __future__ import annotations

from .functions import ZERO, device
from .layout import VECTOR
from .powers import exp2
from .vector import broadcast, fma, load, splat, store

__all__ = ["advance_four", "advance_one", "retreat_four", "retreat_one"]

SLOT = 8 * VECTOR  # what four states save a step: four decays, four states
HALF = 4 * VECTOR


@device
def _driven(decay, h, x, b):
    """decay * h + b * x."""
    if b is None:
        return fma(decay, h, x)
    return fma(decay, h, x * broadcast(b))


@device
def _read(y, h, c):
    """y + c * h."""
    if c is None:
        return y + h
    return fma(broadcast(c), h, y)


@device
def _at(address, offset):
    if address is None:
        return None
    return address + offset


@device
def advance_four(steps, dt, x, y, rate, stride, state, b, c, row, restart, window, saved):
    """y_t += sum over four states of c h_t.

    `stride`: bytes between two states' rates; `row`: between steps of b, c.
    The state restarts before step `restart` and every `window` steps after. With `saved` (an
    address, or 0) each step's decays and states are written there, from slot 1; slot 0 keeps the
    state before the first.
    """
    a0, a1 = load(rate), load(rate + stride)
    a2, a3 = load(rate + 2 * stride), load(rate + 3 * stride)
    h0, h1 = load(state), load(state + VECTOR)
    h2, h3 = load(state + 2 * VECTOR), load(state + 3 * VECTOR)
    zero = splat(ZERO)
    if saved:
        store(saved + HALF, h0)
        store(saved + HALF + VECTOR, h1)
        store(saved + HALF + 2 * VECTOR, h2)
        store(saved + HALF + 3 * VECTOR, h3)
    for t in range(steps):
        d, driven, total = load(dt + VECTOR * t), load(x + VECTOR * t), load(y + VECTOR * t)
        p0, p1, p2, p3 = exp2(d * a0), exp2(d * a1), exp2(d * a2), exp2(d * a3)
        if t == restart:
            h0 = h1 = h2 = h3 = zero
            p0 = p1 = p2 = p3 = zero
            restart += window
        h0 = _driven(p0, h0, driven, _at(b, row * t))
        h1 = _driven(p1, h1, driven, _at(b, row * t + 4))
        h2 = _driven(p2, h2, driven, _at(b, row * t + 8))
        h3 = _driven(p3, h3, driven, _at(b, row * t + 12))
        total = _read(total, h0, _at(c, row * t))
        total = _read(total, h1, _at(c, row * t + 4))
        total = _read(total, h2, _at(c, row * t + 8))
        total = _read(total, h3, _at(c, row * t + 12))
        store(y + VECTOR * t, total)
        if saved:
            slot = saved + SLOT * (t + 1)
            store(slot, p0)
            store(slot + VECTOR, p1)
            store(slot + 2 * VECTOR, p2)
            store(slot + 3 * VECTOR, p3)
            store(slot + HALF, h0)
            store(slot + HALF + VECTOR, h1)
            store(slot + HALF + 2 * VECTOR, h2)
            store(slot + HALF + 3 * VECTOR, h3)
    store(state, h0)
    store(state + VECTOR, h1)
    store(state + 2 * VECTOR, h2)
    store(state + 3 * VECTOR, h3)


@device
def advance_one(steps, dt, x, y, rate, state, b, b_row, c, c_row, restart, window, saved):
    """`advance_four` for a single state; B and C are always there, their steps perhaps 0 apart."""
    a, h, zero = load(rate), load(state), splat(ZERO)
    if saved:
        store(saved + HALF, h)
    for t in range(steps):
        p = exp2(load(dt + VECTOR * t) * a)
        if t == restart:
            h = p = zero
            restart += window
        h = fma(p, h, load(x + VECTOR * t) * broadcast(b + b_row * t))
        store(y + VECTOR * t, fma(broadcast(c + c_row * t), h, load(y + VECTOR * t)))
        if saved:
            store(saved + SLOT * (t + 1), p)
            store(saved + SLOT * (t + 1) + HALF, h)
    store(state, h)


@device
def _accumulate(address, a, b):
    """Add a * b to the vector at `address`; nothing where the address is None."""
    if address is not None:
        store(address, fma(a, b, load(address)))


@device
def _from_output(adjoint, gradient, c):
    """The state's adjoint plus what comes from this step's output."""
    if c is None:
        return adjoint + gradient
    return fma(broadcast(c), gradient, adjoint)


@device
def retreat_four(
    steps, dt, x, g, dx, ddt, rate, stride, adjoint, d_rate, b, c, row, db, dc, d_row, restart,
    window, saved,
):  # fmt: skip
    """The adjoint of `advance_four`, from the last step to the first, out of what it saved.

    `g` is the gradient of y. Adds to `dx` and to `ddt` (the latter through the decays alone), to
    `d_rate`, and, lane by lane, to `db` and `dc`, whose steps lie `d_row` bytes apart. `restart`:
    the last step before which the state restarts; nothing passes there, not even a NaN.
    """
    a0, a1 = load(rate), load(rate + stride)
    a2, a3 = load(rate + 2 * stride), load(rate + 3 * stride)
    g0, g1 = load(adjoint), load(adjoint + VECTOR)
    g2, g3 = load(adjoint + 2 * VECTOR), load(adjoint + 3 * VECTOR)
    r0 = r1 = r2 = r3 = zero = splat(ZERO)
    for t in range(steps - 1, -1, -1):
        slot = saved + SLOT * (t + 1)
        before = saved + SLOT * t + HALF
        d, driven, gradient = load(dt + VECTOR * t), load(x + VECTOR * t), load(g + VECTOR * t)
        _accumulate(_at(dc, d_row * t), gradient, load(slot + HALF))
        _accumulate(_at(dc, d_row * t + VECTOR), gradient, load(slot + HALF + VECTOR))
        _accumulate(_at(dc, d_row * t + 2 * VECTOR), gradient, load(slot + HALF + 2 * VECTOR))
        _accumulate(_at(dc, d_row * t + 3 * VECTOR), gradient, load(slot + HALF + 3 * VECTOR))
        g0 = _from_output(g0, gradient, _at(c, row * t))
        g1 = _from_output(g1, gradient, _at(c, row * t + 4))
        g2 = _from_output(g2, gradient, _at(c, row * t + 8))
        g3 = _from_output(g3, gradient, _at(c, row * t + 12))
        _accumulate(_at(db, d_row * t), g0, driven)
        _accumulate(_at(db, d_row * t + VECTOR), g1, driven)
        _accumulate(_at(db, d_row * t + 2 * VECTOR), g2, driven)
        _accumulate(_at(db, d_row * t + 3 * VECTOR), g3, driven)
        through = _read(load(dx + VECTOR * t), g0, _at(b, row * t))
        through = _read(through, g1, _at(b, row * t + 4))
        through = _read(through, g2, _at(b, row * t + 8))
        store(dx + VECTOR * t, _read(through, g3, _at(b, row * t + 12)))
        g0, g1 = g0 * load(slot), g1 * load(slot + VECTOR)
        g2, g3 = g2 * load(slot + 2 * VECTOR), g3 * load(slot + 3 * VECTOR)
        q0, q1 = g0 * load(before), g1 * load(before + VECTOR)
        q2, q3 = g2 * load(before + 2 * VECTOR), g3 * load(before + 3 * VECTOR)
        if t == restart:
            g0 = g1 = g2 = g3 = q0 = q1 = q2 = q3 = zero
            restart -= window
        decays = fma(q1, a1, fma(q0, a0, load(ddt + VECTOR * t)))
        store(ddt + VECTOR * t, fma(q3, a3, fma(q2, a2, decays)))
        r0, r1, r2, r3 = fma(q0, d, r0), fma(q1, d, r1), fma(q2, d, r2), fma(q3, d, r3)
    store(adjoint, g0)
    store(adjoint + VECTOR, g1)
    store(adjoint + 2 * VECTOR, g2)
    store(adjoint + 3 * VECTOR, g3)
    store(d_rate, load(d_rate) + r0)
    store(d_rate + stride, load(d_rate + stride) + r1)
    store(d_rate + 2 * stride, load(d_rate + 2 * stride) + r2)
    store(d_rate + 3 * stride, load(d_rate + 3 * stride) + r3)


@device
def retreat_one(
    steps,
    dt,
    x,
    g,
    dx,
    ddt,
    rate,
    adjoint,
    d_rate,
    b,
    b_row,
    c,
    c_row,
    db,
    db_row,
    dc,
    dc_row,
    restart,
    window,
    saved,
):
    """`retreat_four` for a single state.

    Where B or C is the constant 1, its gradient goes where nobody looks.
    """
    a, state, r, zero = load(rate), load(adjoint), splat(ZERO), splat(ZERO)
    for t in range(steps - 1, -1, -1):
        slot = saved + SLOT * (t + 1)
        gradient = load(g + VECTOR * t)
        _accumulate(dc + dc_row * t, gradient, load(slot + HALF))
        state = fma(broadcast(c + c_row * t), gradient, state)
        _accumulate(db + db_row * t, state, load(x + VECTOR * t))
        store(dx + VECTOR * t, fma(broadcast(b + b_row * t), state, load(dx + VECTOR * t)))
        state = state * load(slot)
        q = state * load(saved + SLOT * t + HALF)
        if t == restart:
            state = q = zero
            restart -= window
        store(ddt + VECTOR * t, fma(q, a, load(ddt + VECTOR * t)))
        r = fma(q, load(dt + VECTOR * t), r)
    store(adjoint, state)
    store(d_rate, load(d_rate) + r)
