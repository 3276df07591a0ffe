"""The parts of a kernel that make a line ready for the recurrence:

Where it lies, convolution, projections, dt.
"""

from __future__ import annotations

from numba import float32

from . import layout as at
from .functions import ZERO, device, load_token, sigmoid, softplus
from .layout import FLOAT, TOKENS_AT_ONCE, VECTOR
from .vector import LANES, broadcast, fma, load, load_float, load_int, splat, store

__all__ = [
    "channel_range",
    "convolve",
    "first_restart",
    "later_restart",
    "locate",
    "project",
    "scale_of",
    "slot",
    "time_steps",
    "weights_at",
    "zero",
]


@device
def slot(table, index):
    """Entry `index` of a job or of a sweep."""
    return load_int(table + 8 * index)


@device
def scale_of(job):
    """The factor of the result."""
    return load_float(job + 8 * at.SCALE)


@device
def zero(address, vectors):
    """Fill memory with zeros."""
    for i in range(vectors):
        store(address + VECTOR * i, splat(ZERO))


@device
def channel_range(job, part):
    """First and last channel (exclusive) of one of the `SPLITS` parts, on vector boundaries."""
    vectors, parts = slot(job, at.CHANNELS) // LANES, slot(job, at.SPLITS)
    return LANES * (vectors * part // parts), LANES * (vectors * (part + 1) // parts)


@device
def locate(job, sweep, line, mirrored):
    """The token where a line's scan starts, and the tokens from one step to the next."""
    length, lines = slot(sweep, at.LENGTH), slot(sweep, at.IMAGE_LINES)
    image, index, reverse = line // lines, line % lines, slot(sweep, at.REVERSE)
    if mirrored:
        if slot(sweep, at.MIRROR_LINES):
            index = lines - 1 - index
        if slot(sweep, at.MIRROR_STEPS):
            reverse = 1 - reverse
    step = slot(sweep, at.STEP)
    token = image * slot(job, at.IMAGE_TOKENS) + index * slot(sweep, at.LINE_STEP)
    if reverse:
        return token + step * (length - 1), -step
    return token, step


@device
def first_restart(sweep):
    """The first step, after step 0, before which the state restarts:

    Windows lie on the grid, not on the scan.
    """
    length, window = slot(sweep, at.LENGTH), slot(sweep, at.WINDOW)
    if slot(sweep, at.REVERSE) and length % window:
        return length % window
    return window


@device
def later_restart(restart, window, steps):
    """The next restart as seen from `steps` steps later."""
    if restart < steps:
        restart += (steps - restart + window - 1) // window * window
    return restart - steps


@device
def weights_at(job):
    """Offsets of the packed conv_weight, conv_bias, x_proj, dt_proj, dt_bias, decay rates and D."""
    channels, width = FLOAT * slot(job, at.CHANNELS), slot(job, at.WIDTH)
    columns = slot(job, at.COLUMNS) if width else 0
    conv_bias = width * channels
    x_proj = conv_bias + channels
    dt_proj = x_proj + columns * channels
    dt_bias = dt_proj + slot(job, at.RANK) * channels
    rate = dt_bias + channels
    return 0, conv_bias, x_proj, dt_proj, dt_bias, rate, rate + slot(job, at.STATES) * channels


@device
def convolve(job, sweep, token, step, start, steps, low, high, u, slope):
    """u = silu(causal convolution of the source), (steps, E); to `slope`, unless 0, silu's slope.

    Where there is no convolution, u is the source.
    """
    channels, width = slot(job, at.CHANNELS), slot(job, at.WIDTH)
    source, pitch = slot(sweep, at.SOURCE), slot(sweep, at.SOURCE_PITCH)
    bfloat16 = slot(job, at.BFLOAT16)
    weight = slot(job, at.WEIGHTS)
    one = splat(float32(1))
    for e in range(low, high, LANES):
        taps = weight + FLOAT * e
        for t in range(steps):
            out = FLOAT * (t * channels + e)
            if width == 0:
                index = (token + step * (start + t)) * pitch + e
                store(u + out, load_token(source, index, bfloat16))
                continue
            x = load(taps + FLOAT * width * channels)
            for tap in range(max(0, width - 1 - start - t), width):
                index = (token + step * (start + t - width + 1 + tap)) * pitch + e
                x = fma(load_token(source, index, bfloat16), load(taps + FLOAT * tap * channels), x)
            s = sigmoid(x)
            store(u + out, x * s)
            if slope:
                store(slope + out, s * fma(x, one - s, one))


@device
def project(job, u, steps, rows):
    """rows = u @ x_proj.T, (steps, padded columns);

    Works on whole groups of tokens, so past `steps` too.
    """
    channels, padded = slot(job, at.CHANNELS), slot(job, at.PADDED_COLUMNS)
    row = FLOAT * channels
    for t in range(0, steps, TOKENS_AT_ONCE):
        for column in range(0, padded, LANES):
            weight, token = slot(job, at.X_PROJ) + FLOAT * column, u + row * t
            r0 = r1 = r2 = r3 = splat(ZERO)
            for _ in range(channels):
                w = load(weight)
                r0 = fma(broadcast(token), w, r0)
                r1 = fma(broadcast(token + row), w, r1)
                r2 = fma(broadcast(token + 2 * row), w, r2)
                r3 = fma(broadcast(token + 3 * row), w, r3)
                weight += FLOAT * padded
                token += FLOAT
            out = rows + FLOAT * (t * padded + column)
            store(out, r0)
            store(out + FLOAT * padded, r1)
            store(out + FLOAT * 2 * padded, r2)
            store(out + FLOAT * 3 * padded, r3)


@device
def time_steps(job, token, step, start, steps, e, u, rows, dt, x, slope):
    """dt, and x = dt * u, of one vector of channels, (steps, LANES);

    With `slope` also the derivative of softplus.
    """
    channels, rank = slot(job, at.CHANNELS), slot(job, at.RANK)
    padded, given = slot(job, at.PADDED_COLUMNS), slot(job, at.DT)
    _, _, _, dt_proj, dt_bias, _, _ = weights_at(job)
    weight = slot(job, at.WEIGHTS) + FLOAT * e
    for t in range(steps):
        value = load(weight + dt_bias)
        if given:
            index = (token + step * (start + t)) * channels + e
            value = value + load_token(given, index, slot(job, at.BFLOAT16))
        for r in range(rank):
            low_rank = broadcast(rows + FLOAT * (t * padded + r))
            value = fma(low_rank, load(weight + dt_proj + FLOAT * r * channels), value)
        if slope:
            store(slope + VECTOR * t, splat(float32(1)))
        if slot(job, at.SOFTPLUS):
            if slope:
                store(slope + VECTOR * t, sigmoid(value))
            value = softplus(value)
        store(dt + VECTOR * t, value)
        store(x + VECTOR * t, value * load(u + FLOAT * (t * channels + e)))
