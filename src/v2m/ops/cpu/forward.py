"""The forward kernel: a whole pass over one line after the other."""

from __future__ import annotations

from . import layout as at
from .functions import device, load_token, store_token
from .layout import CHUNK, FLOAT, VECTOR
from .lines import (
    channel_range,
    convolve,
    first_restart,
    later_restart,
    locate,
    project,
    scale_of,
    slot,
    time_steps,
    weights_at,
    zero,
)
from .states import advance_four, advance_one
from .vector import LANES, atomic_increment, fma, load, splat

__all__ = ["advance", "forward_kernel", "forward_scratch"]


def forward_scratch(channels: int, states: int, padded_columns: int) -> int:
    """Bytes of a worker's memory."""
    return FLOAT * (CHUNK * (channels + padded_columns) + states * channels) + 3 * CHUNK * VECTOR


def forward_kernel(fingerprint):
    """The kernel, to be compiled;

    `fingerprint` of the sources becomes part of its key in numba's cache.
    """

    def kernel(job):
        fingerprint  # noqa: B018
        _work(job)

    return kernel


@device
def _work(job):
    """Take tasks until none is left. `job` is the address of a table as `layout` describes it."""
    scratch = slot(job, at.SCRATCH)
    scratch += atomic_increment(job + 8 * at.NEXT_WORKER) * slot(job, at.SCRATCH_BYTES)
    per_task, splits = slot(job, at.SWEEPS_PER_TASK), slot(job, at.SPLITS)
    lines = slot(job, at.LINES)
    while True:
        task = atomic_increment(job + 8 * at.NEXT_TASK)
        if task >= slot(job, at.TASKS):
            break
        low, high = channel_range(job, task % splits)
        line, first = task // splits % lines, task // splits // lines * per_task
        for index in range(first, first + per_task):
            sweep = slot(job, at.SWEEPS) + 8 * at.SWEEP_SLOTS * index
            images = slot(job, at.IMAGES)
            if line < images * slot(sweep, at.IMAGE_LINES):
                _line(job, sweep, line, low, high, scratch)


@device
def _line(job, sweep, line, low, high, scratch):
    """Convolve, project, scan, gate and store one line."""
    channels, padded = slot(job, at.CHANNELS), slot(job, at.PADDED_COLUMNS)
    u = scratch
    projected = u + FLOAT * CHUNK * channels
    state = projected + FLOAT * CHUNK * padded
    dt = state + FLOAT * slot(job, at.STATES) * channels
    x, y = dt + CHUNK * VECTOR, dt + 2 * CHUNK * VECTOR
    token, step = locate(job, sweep, line, False)
    rows, row, columns = projected, FLOAT * padded, slot(job, at.COLUMNS)
    zero(state, slot(job, at.STATES) * channels // LANES)
    length, window, restart = slot(sweep, at.LENGTH), slot(sweep, at.WINDOW), first_restart(sweep)
    for start in range(0, length, CHUNK):
        steps = min(CHUNK, length - start)
        convolve(job, sweep, token, step, start, steps, low, high, u, 0)
        if slot(job, at.WIDTH):
            project(job, u, steps, rows)
        else:
            rows = slot(job, at.ROWS) + FLOAT * columns * (token + step * start)
            row = FLOAT * columns * step
        for e in range(low, high, LANES):
            time_steps(job, token, step, start, steps, e, u, rows, dt, x, 0)
            zero(y, steps)
            n, h = 0, state + FLOAT * e * slot(job, at.STATES)
            while n < slot(job, at.STATES):
                at_n = h + VECTOR * n
                n += advance(job, n, steps, dt, x, y, e, at_n, rows, row, restart, window, 0)
            _finish(job, sweep, line, start, steps, e, u, y)
        restart = later_restart(restart, window, steps)


@device
def advance(job, n, steps, dt, x, y, e, state, rows, row, restart, window, saved):
    """States n to n + 3, or n alone if fewer are left, of one vector of channels: y += sum of C h,
    as in `states`.

    Returns how many states these were.
    """
    stride, states = FLOAT * slot(job, at.CHANNELS), slot(job, at.STATES)
    _, _, _, _, _, rate, _ = weights_at(job)
    a = slot(job, at.WEIGHTS) + rate + FLOAT * e + stride * n
    b_column, c_column = slot(job, at.B_COLUMN), slot(job, at.C_COLUMN)
    b, c = rows + FLOAT * (b_column + n), rows + FLOAT * (c_column + n)
    if n + 4 > states:
        one, b_row, c_row = job + 8 * at.ONE, row, row
        if b_column < 0:
            b, b_row = one, 0
        if c_column < 0:
            c, c_row = one, 0
        advance_one(steps, dt, x, y, a, state, b, b_row, c, c_row, restart, window, saved)
        return 1
    if c_column < 0:
        advance_four(steps, dt, x, y, a, stride, state, b, None, row, restart, window, saved)
    elif b_column < 0:
        advance_four(steps, dt, x, y, a, stride, state, None, c, row, restart, window, saved)
    else:
        advance_four(steps, dt, x, y, a, stride, state, b, c, row, restart, window, saved)
    return 4


@device
def _finish(job, sweep, line, start, steps, e, u, y):
    """(y + D u) * gate * scale, stored or added at the place where the result belongs."""
    channels, bfloat16 = slot(job, at.CHANNELS), slot(job, at.OUT_BFLOAT16)
    _, _, _, _, _, _, skip = weights_at(job)
    skip_weight, scale = load(slot(job, at.WEIGHTS) + skip + FLOAT * e), splat(scale_of(job))
    token, step = locate(job, sweep, line, False)
    out_token, out_step = locate(job, sweep, line, True)
    gate, out, add = slot(job, at.GATE), slot(sweep, at.OUT), slot(sweep, at.ADD_OUT)
    for t in range(steps):
        value = fma(skip_weight, load(u + FLOAT * (t * channels + e)), load(y + VECTOR * t)) * scale
        if gate:
            value = value * load(gate + FLOAT * ((token + step * (start + t)) * channels + e))
        index = (out_token + out_step * (start + t)) * channels + e
        if add:
            value = value + load_token(out, index, bfloat16)
        store_token(out, index, value, bfloat16)
