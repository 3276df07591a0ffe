"""The parts of a kernel that make a line ready for the recurrence:

Where it lies, convolution, projections, dt.
"""

from __future__ import annotations

from numba import float32

from . import layout as at
from .functions import ZERO, device, load_token, sigmoid, softplus, softplus_and_slope
from .layout import CHUNK, FLOAT, TOKENS_AT_ONCE, VECTOR
from .vector import LANES, broadcast, fma, load, load_float, load_int, prefetch, splat, store

__all__ = [
    "channel_range",
    "convolve",
    "first_restart",
    "later_restart",
    "load_four",
    "locate",
    "prefetch_line",
    "project",
    "scale_of",
    "slot",
    "store_four",
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
    row = FLOAT * channels
    for e in range(low, high, LANES):
        if width == 4:
            _convolve_four(job, sweep, token, step, start, steps, e, u)
        else:
            _convolve_any(job, sweep, token, step, start, steps, e, u)
    if width == 0:
        return
    one = splat(float32(1))
    for e in range(low, high, LANES):
        out = FLOAT * e
        for _ in range(steps):
            x = load(u + out)
            s = sigmoid(x)
            store(u + out, x * s)
            if slope:
                store(slope + out, s * fma(x, one - s, one))
            out += row


@device
def _convolve_four(job, sweep, token, step, start, steps, e, out):
    """The convolution of four taps of one vector of channels, which slides along the line."""
    channels, bfloat16 = slot(job, at.CHANNELS), slot(job, at.BFLOAT16)
    source, pitch = slot(sweep, at.SOURCE), slot(sweep, at.SOURCE_PITCH)
    row = FLOAT * channels
    taps = slot(job, at.WEIGHTS) + FLOAT * e
    w0, w1, w2, w3 = load(taps), load(taps + row), load(taps + 2 * row), load(taps + 3 * row)
    bias = load(taps + 4 * row)
    index, step = (token + step * start) * pitch + e, step * pitch
    x0 = x1 = x2 = splat(ZERO)
    if start > 0:  # chunks are longer than the convolution
        x0 = load_token(source, index - 3 * step, bfloat16)
        x1 = load_token(source, index - 2 * step, bfloat16)
        x2 = load_token(source, index - step, bfloat16)
    for t in range(steps):
        x3 = load_token(source, index + step * t, bfloat16)
        y = fma(x0, w0, fma(x1, w1, fma(x2, w2, fma(x3, w3, bias))))
        store(out + row * t + FLOAT * e, y)
        x0, x1, x2 = x1, x2, x3


@device
def _convolve_any(job, sweep, token, step, start, steps, e, out):
    """The convolution, or the source if there is none, of one vector of channels."""
    channels, width = slot(job, at.CHANNELS), slot(job, at.WIDTH)
    source, pitch = slot(sweep, at.SOURCE), slot(sweep, at.SOURCE_PITCH)
    bfloat16, row = slot(job, at.BFLOAT16), FLOAT * channels
    taps = slot(job, at.WEIGHTS) + FLOAT * e
    for t in range(steps):
        index = (token + step * (start + t)) * pitch + e
        if width == 0:
            x = load_token(source, index, bfloat16)
        else:
            x = load(taps + row * width)
        for tap in range(max(0, width - 1 - start - t), width):
            back = step * (width - 1 - tap) * pitch
            x = fma(load_token(source, index - back, bfloat16), load(taps + row * tap), x)
        store(out + row * t + FLOAT * e, x)


@device
def project(job, u, steps, rows):
    """rows = u @ x_proj.T, (steps, padded columns);

    Works on whole groups of tokens, so past `steps` too.
    """
    channels, padded = slot(job, at.CHANNELS), slot(job, at.PADDED_COLUMNS)
    row = FLOAT * channels
    for t in range(0, steps, TOKENS_AT_ONCE):
        for column in range(0, padded, LANES):
            weight = slot(job, at.X_PROJ) + FLOAT * column
            _project_tokens(
                weight, u + row * t, channels, rows + FLOAT * (t * padded + column), padded
            )


@device
def _project_tokens(weight, token, channels, out, padded):
    """One vector of columns of `TOKENS_AT_ONCE` tokens."""
    row, half = FLOAT * channels, token + 4 * FLOAT * channels
    r0 = r1 = r2 = r3 = r4 = r5 = r6 = r7 = splat(ZERO)
    for _ in range(channels):
        w = load(weight)
        r0, r1 = fma(broadcast(token), w, r0), fma(broadcast(token + row), w, r1)
        r2, r3 = fma(broadcast(token + 2 * row), w, r2), fma(broadcast(token + 3 * row), w, r3)
        r4, r5 = fma(broadcast(half), w, r4), fma(broadcast(half + row), w, r5)
        r6, r7 = fma(broadcast(half + 2 * row), w, r6), fma(broadcast(half + 3 * row), w, r7)
        weight += FLOAT * padded
        token += FLOAT
        half += FLOAT
    store_four(out, FLOAT * padded, r0, r1, r2, r3)
    store_four(out + 4 * FLOAT * padded, FLOAT * padded, r4, r5, r6, r7)


@device
def store_four(address, row, a, b, c, d):
    """Write four vectors, `row` bytes apart."""
    store(address, a)
    store(address + row, b)
    store(address + 2 * row, c)
    store(address + 3 * row, d)


@device
def time_steps(job, token, step, start, steps, e, u, rows, dt, x, slope):
    """dt, and x = dt * u, of one vector of channels, (steps, LANES);

    With `slope` also the derivative of softplus.
    """
    channels, rank = slot(job, at.CHANNELS), slot(job, at.RANK)
    _, _, _, dt_proj, dt_bias, _, _ = weights_at(job)
    weights = slot(job, at.WEIGHTS) + FLOAT * e
    weight, row = weights + dt_proj, FLOAT * channels
    bias, pitch = load(weights + dt_bias), FLOAT * slot(job, at.PADDED_COLUMNS)
    for t in range(steps):
        store(dt + VECTOR * t, bias)
    for _ in range(rank % 4):
        w = load(weight)
        for t in range(steps):
            value = load(dt + VECTOR * t)
            store(dt + VECTOR * t, fma(broadcast(rows + pitch * t), w, value))
        weight += row
        rows += FLOAT
    for _ in range(rank // 4 - 1):
        w = load_four(weight, row)
        for t in range(steps):
            store(dt + VECTOR * t, _add_four(load(dt + VECTOR * t), rows + pitch * t, w))
        weight += 4 * row
        rows += 4 * FLOAT
    u += FLOAT * e
    if rank < 4:
        _soften(job, token, step, start, steps, e, u, rows, dt, x, slope, None)
    else:
        w = load_four(weight, row)
        _soften(job, token, step, start, steps, e, u, rows, dt, x, slope, w)


@device
def _add_four(value, numbers, weights):
    """value + the sum over four of number * weight."""
    w0, w1, w2, w3 = weights
    value = fma(broadcast(numbers), w0, value)
    value = fma(broadcast(numbers + FLOAT), w1, value)
    value = fma(broadcast(numbers + 2 * FLOAT), w2, value)
    return fma(broadcast(numbers + 3 * FLOAT), w3, value)


@device
def _soften(job, token, step, start, steps, e, u, rows, dt, x, slope, weights):
    """The end of `time_steps`: the last four columns of dt_proj, if any, and softplus."""
    given, bfloat16 = slot(job, at.DT), slot(job, at.BFLOAT16)
    channels, pitch = slot(job, at.CHANNELS), FLOAT * slot(job, at.PADDED_COLUMNS)
    soft = slot(job, at.SOFTPLUS)
    for t in range(steps):
        value = load(dt + VECTOR * t)
        if weights is not None:
            value = _add_four(value, rows + pitch * t, weights)
        elif given:
            index = (token + step * (start + t)) * channels + e
            value = value + load_token(given, index, bfloat16)
        if slope:
            derivative = splat(float32(1))
            if soft:
                value, derivative = softplus_and_slope(value)
            store(slope + VECTOR * t, derivative)
        elif soft:
            value = softplus(value)
        store(dt + VECTOR * t, value)
        store(x + VECTOR * t, value * load(u + FLOAT * channels * t))


@device
def load_four(address, row):
    """Four vectors, `row` bytes apart."""
    return load(address), load(address + row), load(address + 2 * row), load(address + 3 * row)


@device
def prefetch_line(job, sweep, line):
    """Ask for the grids that a line will read, up to a chunk of it."""
    token, step = locate(job, sweep, line, False)
    steps = min(slot(sweep, at.LENGTH), CHUNK)
    row = FLOAT * slot(job, at.CHANNELS)
    size = 2 if slot(job, at.BFLOAT16) else FLOAT
    pitch, width = size * slot(sweep, at.SOURCE_PITCH), size * slot(job, at.CHANNELS)
    _prefetch(slot(sweep, at.SOURCE), token, step, steps, pitch, width)
    _prefetch(slot(job, at.GATE), token, step, steps, row, row)
    if slot(sweep, at.D_OUT):
        _prefetch(slot(job, at.D_GATE), token, step, steps, row, row)
        _prefetch(slot(sweep, at.D_SOURCE), token, step, steps, row, row)
        token, step = locate(job, sweep, line, True)
        _prefetch(slot(sweep, at.D_OUT), token, step, steps, row, row)


@device
def _prefetch(grid, token, step, steps, pitch, width):
    for t in range(steps):
        address = grid + pitch * (token + step * t)
        for offset in range(0, width, 64):
            prefetch(address + offset)
