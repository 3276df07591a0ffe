"""The adjoints of a line's gate, step sizes, projections and convolution."""

from __future__ import annotations

import math

from numba import float32

from . import layout as at
from .functions import ZERO, device, load_token
from .layout import FLOAT, TOKENS_AT_ONCE, VECTOR
from .lines import locate, scale_of, slot, store_four, weights_at
from .vector import LANES, broadcast, fma, load, splat, store

__all__ = ["deconvolve", "gate_gradients", "project_back", "time_step_gradients"]

LN_2 = float32(math.log(2))


@device
def _add(address, value):
    store(address, value + load(address))


@device
def _add_product(address, a, b):
    store(address, fma(a, b, load(address)))


@device
def gate_gradients(job, sweep, line, e, g, d_out):
    """g, the gradient before the gate, and `d_out`, the one after it."""
    channels, gate = slot(job, at.CHANNELS), slot(job, at.GATE)
    token, step = locate(job, sweep, line, False)
    out_token, out_step = locate(job, sweep, line, True)
    scale = splat(scale_of(job))
    for t in range(slot(sweep, at.LENGTH)):
        index = (out_token + out_step * t) * channels + e
        gradient = load(slot(sweep, at.D_OUT) + FLOAT * index) * scale
        if gate:
            store(d_out + VECTOR * t, gradient)
            gradient = gradient * load(gate + FLOAT * ((token + step * t) * channels + e))
        store(g + VECTOR * t, gradient)


@device
def time_step_gradients(
    job, sweep, line, e, u, du, rows, dt, dt_slope, g, d_out, y, dx, ddt, row_sums, sums
):
    """From the recurrence's gradients to those of gate, u, D, dt and dt_proj; for one vector."""
    channels, columns = slot(job, at.CHANNELS), slot(job, at.COLUMNS)
    rank, padded = slot(job, at.RANK), slot(job, at.PADDED_COLUMNS)
    token, step = locate(job, sweep, line, False)
    _, _, _, dt_proj, dt_bias, _, skip = weights_at(job)
    skip_weight = load(slot(job, at.WEIGHTS) + skip + FLOAT * e)
    d_skip, d_bias = splat(ZERO), splat(ZERO)
    d_gate, add_gate = slot(job, at.D_GATE), slot(sweep, at.ADD_GATE)
    d_dt, add_dt = slot(job, at.D_DT), slot(sweep, at.ADD_SOURCE)
    for t in range(slot(sweep, at.LENGTH)):
        at_t, index = VECTOR * t, FLOAT * ((token + step * t) * channels + e)
        value, gradient = load(u + FLOAT * (t * channels + e)), load(g + at_t)
        if d_gate:
            change = fma(skip_weight, value, load(y + at_t)) * load(d_out + at_t)
            store(d_gate + index, change + load(d_gate + index) if add_gate else change)
        d_skip = fma(gradient, value, d_skip)
        through = load(dx + at_t)
        store(
            du + FLOAT * (t * channels + e), fma(through, load(dt + at_t), skip_weight * gradient)
        )
        change = fma(load(ddt + at_t), splat(LN_2), through * value) * load(dt_slope + at_t)
        store(ddt + at_t, change)
        d_bias = d_bias + change
        if d_dt:
            store(d_dt + index, change + load(d_dt + index) if add_dt else change)
    _add(sums + skip + FLOAT * e, d_skip)
    _add(sums + dt_bias + FLOAT * e, d_bias)
    for r in range(rank):
        offset = dt_proj + FLOAT * (r * channels + e)
        weight, d_weight = load(slot(job, at.WEIGHTS) + offset), splat(ZERO)
        for t in range(slot(sweep, at.LENGTH)):
            change = load(ddt + VECTOR * t)
            d_weight = fma(change, broadcast(rows + FLOAT * (t * padded + r)), d_weight)
            _add_product(row_sums + VECTOR * (t * columns + r), change, weight)
        _add(sums + offset, d_weight)


@device
def project_back(job, length, u, du, d_rows, sums):
    """du += d_rows @ x_proj, and the gradient of x_proj; works on whole groups of tokens."""
    channels, columns = slot(job, at.CHANNELS), slot(job, at.COLUMNS)
    _, _, x_proj, _, _, _, _ = weights_at(job)
    row, d_row = FLOAT * channels, FLOAT * columns
    for e in range(0, channels, LANES):
        weight = slot(job, at.WEIGHTS) + x_proj + FLOAT * e
        for t in range(0, length, TOKENS_AT_ONCE):
            _project_back_tokens(weight, du + row * t + FLOAT * e, row, d_rows + d_row * t, columns)
        _project_back_weight(length, columns, u + FLOAT * e, row, d_rows, sums + x_proj + FLOAT * e)


@device
def _project_back_tokens(weight, out, row, numbers, columns):
    """du += d_rows @ x_proj for one vector of channels of `TOKENS_AT_ONCE` tokens."""
    d_row, half, d_half = FLOAT * columns, out + 4 * row, numbers + 4 * FLOAT * columns
    g0, g1, g2, g3 = load(out), load(out + row), load(out + 2 * row), load(out + 3 * row)
    g4, g5, g6, g7 = load(half), load(half + row), load(half + 2 * row), load(half + 3 * row)
    for _ in range(columns):
        w = load(weight)
        g0, g1 = fma(broadcast(numbers), w, g0), fma(broadcast(numbers + d_row), w, g1)
        g2 = fma(broadcast(numbers + 2 * d_row), w, g2)
        g3 = fma(broadcast(numbers + 3 * d_row), w, g3)
        g4, g5 = fma(broadcast(d_half), w, g4), fma(broadcast(d_half + d_row), w, g5)
        g6 = fma(broadcast(d_half + 2 * d_row), w, g6)
        g7 = fma(broadcast(d_half + 3 * d_row), w, g7)
        weight += row
        numbers += FLOAT
        d_half += FLOAT
    store_four(out, row, g0, g1, g2, g3)
    store_four(half, row, g4, g5, g6, g7)


@device
def _project_back_weight(length, columns, u, row, d_rows, d_weight):
    """d_weight += d_rows.T @ u, for one vector of channels."""
    d_row, k = FLOAT * columns, 0
    while k + 4 <= columns:
        out = d_weight + row * k
        r0 = r1 = r2 = r3 = splat(ZERO)
        for t in range(length):
            value, numbers = load(u + row * t), d_rows + d_row * t + FLOAT * k
            r0 = fma(broadcast(numbers), value, r0)
            r1 = fma(broadcast(numbers + FLOAT), value, r1)
            r2 = fma(broadcast(numbers + 2 * FLOAT), value, r2)
            r3 = fma(broadcast(numbers + 3 * FLOAT), value, r3)
        _add(out, r0)
        _add(out + row, r1)
        _add(out + 2 * row, r2)
        _add(out + 3 * row, r3)
        k += 4
    while k < columns:
        r = splat(ZERO)
        for t in range(length):
            r = fma(broadcast(d_rows + d_row * t + FLOAT * k), load(u + row * t), r)
        _add(d_weight + row * k, r)
        k += 1


@device
def deconvolve(job, sweep, token, step, slope, du, sums):
    """Through silu and the convolution:

    The gradients of the source, of the taps and of the bias.
    """
    channels, length = slot(job, at.CHANNELS), slot(sweep, at.LENGTH)
    row = FLOAT * channels
    for e in range(0, channels, LANES):
        bias, line = splat(ZERO), du + FLOAT * e
        for t in range(length):
            change = load(line + row * t) * load(slope + row * t + FLOAT * e)
            store(line + row * t, change)
            bias = bias + change
        _add(sums + row * slot(job, at.WIDTH) + FLOAT * e, bias)
        if slot(job, at.WIDTH) == 4:
            _deconvolve_four(job, sweep, token, step, line, e, sums + FLOAT * e)
        else:
            _deconvolve_any(job, sweep, token, step, line, e, sums + FLOAT * e)


@device
def _deconvolve_four(job, sweep, token, step, line, e, d_taps):
    """Four taps of one vector of channels, from the last step to the first."""
    channels, bfloat16 = slot(job, at.CHANNELS), slot(job, at.BFLOAT16)
    source, pitch = slot(sweep, at.SOURCE), slot(sweep, at.SOURCE_PITCH)
    target, add = slot(sweep, at.D_SOURCE), slot(sweep, at.ADD_SOURCE)
    row = FLOAT * channels
    taps = slot(job, at.WEIGHTS) + FLOAT * e
    w0, w1, w2, w3 = load(taps), load(taps + row), load(taps + 2 * row), load(taps + 3 * row)
    d0 = d1 = d2 = d3 = c1 = c2 = c3 = splat(ZERO)
    for t in range(slot(sweep, at.LENGTH) - 1, -1, -1):
        c0, at_t = load(line + row * t), token + step * t
        x = load_token(source, at_t * pitch + e, bfloat16)
        d0, d1, d2, d3 = fma(c3, x, d0), fma(c2, x, d1), fma(c1, x, d2), fma(c0, x, d3)
        change = fma(c3, w0, fma(c2, w1, fma(c1, w2, c0 * w3)))
        out = target + FLOAT * (at_t * channels + e)
        store(out, change + load(out) if add else change)
        c3, c2, c1 = c2, c1, c0
    _add(d_taps, d0)
    _add(d_taps + row, d1)
    _add(d_taps + 2 * row, d2)
    _add(d_taps + 3 * row, d3)


@device
def _deconvolve_any(job, sweep, token, step, line, e, d_taps):
    """Any number of taps of one vector of channels."""
    channels, width = slot(job, at.CHANNELS), slot(job, at.WIDTH)
    source, pitch = slot(sweep, at.SOURCE), slot(sweep, at.SOURCE_PITCH)
    bfloat16, length = slot(job, at.BFLOAT16), slot(sweep, at.LENGTH)
    target, add = slot(sweep, at.D_SOURCE), slot(sweep, at.ADD_SOURCE)
    taps, row = slot(job, at.WEIGHTS) + FLOAT * e, FLOAT * channels
    for tap in range(width):
        back = width - 1 - tap
        change = splat(ZERO)
        for t in range(back, length):
            index = (token + step * (t - back)) * pitch + e
            value = load_token(source, index, bfloat16)
            change = fma(load(line + row * t), value, change)
        _add(d_taps + row * tap, change)
    for t in range(length):
        change = splat(ZERO)
        for tap in range(max(0, width - length + t), width):
            back = width - 1 - tap
            change = fma(load(taps + row * tap), load(line + row * (t + back)), change)
        index = FLOAT * ((token + step * t) * channels + e)
        store(target + index, change + load(target + index) if add else change)
