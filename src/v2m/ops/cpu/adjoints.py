"""The adjoints of a line's gate, step sizes, projections and convolution."""

from __future__ import annotations

import math

from numba import float32

from . import layout as at
from .functions import ZERO, device, load_token, sigmoid
from .layout import FLOAT, TOKENS_AT_ONCE, VECTOR
from .lines import locate, scale_of, slot, weights_at
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
def gate_gradients(job, sweep, line, e, g, z_slope):
    """g, the gradient before the gate, and the factor from the value there to the gradient of z."""
    channels, bfloat16 = slot(job, at.CHANNELS), slot(job, at.BFLOAT16)
    token, step = locate(job, sweep, line, False)
    out_token, out_step = locate(job, sweep, line, True)
    z, pitch, scale = slot(job, at.Z), slot(job, at.Z_PITCH), splat(scale_of(job))
    one = splat(float32(1))
    for t in range(slot(sweep, at.LENGTH)):
        index = (out_token + out_step * t) * channels + e
        gradient = load(slot(sweep, at.D_OUT) + FLOAT * index) * scale
        if z:
            gate = load_token(z, (token + step * t) * pitch + e, bfloat16)
            s = sigmoid(gate)
            store(z_slope + VECTOR * t, gradient * (s * fma(gate, one - s, one)))
            gradient = gradient * (gate * s)
        store(g + VECTOR * t, gradient)


@device
def time_step_gradients(
    job, sweep, line, e, u, du, rows, dt, dt_slope, g, z_slope, y, dx, ddt, row_sums, sums
):
    """From the recurrence's gradients to those of z, u, D, dt and dt_proj; for one vector."""
    channels, columns = slot(job, at.CHANNELS), slot(job, at.COLUMNS)
    rank, padded = slot(job, at.RANK), slot(job, at.PADDED_COLUMNS)
    token, step = locate(job, sweep, line, False)
    _, _, _, dt_proj, dt_bias, _, skip = weights_at(job)
    skip_weight = load(slot(job, at.WEIGHTS) + skip + FLOAT * e)
    d_skip, d_bias = splat(ZERO), splat(ZERO)
    d_z, d_dt, add = slot(job, at.D_Z), slot(job, at.D_DT), slot(sweep, at.ADD_Z)
    for t in range(slot(sweep, at.LENGTH)):
        at_t, index = VECTOR * t, FLOAT * ((token + step * t) * channels + e)
        value, gradient = load(u + FLOAT * (t * channels + e)), load(g + at_t)
        if d_z:
            gate = fma(skip_weight, value, load(y + at_t)) * load(z_slope + at_t)
            store(d_z + index, gate + load(d_z + index) if add else gate)
        d_skip = fma(gradient, value, d_skip)
        through = load(dx + at_t)
        store(
            du + FLOAT * (t * channels + e), fma(through, load(dt + at_t), skip_weight * gradient)
        )
        change = fma(load(ddt + at_t), splat(LN_2), through * value) * load(dt_slope + at_t)
        store(ddt + at_t, change)
        d_bias = d_bias + change
        if d_dt:
            store(d_dt + index, change)
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
            out, numbers = du + row * t + FLOAT * e, d_rows + d_row * t
            g0, g1 = load(out), load(out + row)
            g2, g3 = load(out + 2 * row), load(out + 3 * row)
            for k in range(columns):
                w = load(weight + row * k)
                g0 = fma(broadcast(numbers + FLOAT * k), w, g0)
                g1 = fma(broadcast(numbers + d_row + FLOAT * k), w, g1)
                g2 = fma(broadcast(numbers + 2 * d_row + FLOAT * k), w, g2)
                g3 = fma(broadcast(numbers + 3 * d_row + FLOAT * k), w, g3)
            store(out, g0)
            store(out + row, g1)
            store(out + 2 * row, g2)
            store(out + 3 * row, g3)
        _project_back_weight(length, columns, u + FLOAT * e, row, d_rows, sums + x_proj + FLOAT * e)


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
    channels, width = slot(job, at.CHANNELS), slot(job, at.WIDTH)
    source, pitch = slot(sweep, at.SOURCE), slot(sweep, at.SOURCE_PITCH)
    bfloat16, length = slot(job, at.BFLOAT16), slot(sweep, at.LENGTH)
    target, add = slot(sweep, at.D_SOURCE), slot(sweep, at.ADD_SOURCE)
    row = FLOAT * channels
    for e in range(0, channels, LANES):
        taps, d_taps, line = slot(job, at.WEIGHTS) + FLOAT * e, sums + FLOAT * e, du + FLOAT * e
        bias = splat(ZERO)
        for t in range(length):
            change = load(line + row * t) * load(slope + row * t + FLOAT * e)
            store(line + row * t, change)
            bias = bias + change
        _add(d_taps + row * width, bias)
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
