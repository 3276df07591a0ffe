"""The backward kernel: recomputes a line's pass, then runs it in reverse.

A task is a group of lines. Each group sums the weights' gradients in memory of its own, and the
groups depend on the shapes alone, so the gradients are bit-equal from run to run, whatever the
number of threads.
"""

from __future__ import annotations

from . import layout as at
from .adjoints import deconvolve, gate_gradients, project_back, time_step_gradients
from .forward import advance
from .functions import device
from .layout import FLOAT, SAVED_CHUNK, TOKENS_AT_ONCE, VECTOR
from .lines import (
    channel_range,
    convolve,
    first_restart,
    later_restart,
    locate,
    prefetch_line,
    project,
    slot,
    time_steps,
    weights_at,
    zero,
)
from .states import retreat_four, retreat_one
from .vector import LANES, atomic_increment, load, load_float, store, store_float, total

__all__ = ["backward_kernel", "backward_scratch"]

LINE_VECTORS = 8  # dt, x, dt's slope, g, d out, y, dx, d dt: a vector a step each


def backward_scratch(length: int, channels: int, columns: int, padded_columns: int) -> int:
    """Bytes of a worker's memory, for lines of up to `length` steps."""
    rounded = -(-length // TOKENS_AT_ONCE) * TOKENS_AT_ONCE
    grids = FLOAT * rounded * (3 * channels + padded_columns + columns)
    vectors = rounded * (LINE_VECTORS + columns) + 8 * (SAVED_CHUNK + 1) + SAVED_CHUNK + 8
    return grids + VECTOR * (vectors + 4 * (length // SAVED_CHUNK + 2))


def backward_kernel(fingerprint):
    """The kernel, to be compiled;

    `fingerprint` of the sources becomes part of its key in numba's cache.
    """

    def kernel(job):
        fingerprint  # noqa: B018
        _work(job)

    return kernel


@device
def _work(job):
    """Take groups of lines until none is left."""
    scratch = slot(job, at.SCRATCH)
    scratch += atomic_increment(job + 8 * at.NEXT_WORKER) * slot(job, at.SCRATCH_BYTES)
    splits, groups = slot(job, at.SPLITS), slot(job, at.GROUPS)
    lines, size = slot(job, at.LINES), FLOAT * slot(job, at.WEIGHT_SIZE)
    while True:
        task = atomic_increment(job + 8 * at.NEXT_TASK)
        if task >= slot(job, at.TASKS):
            break
        group, part = task // splits, task % splits
        sums = slot(job, at.GRADIENTS) + size * group
        for line in range(lines * group // groups, lines * (group + 1) // groups):
            for index in range(slot(job, at.SWEEP_COUNT)):
                prefetch_line(job, slot(job, at.SWEEPS) + 8 * at.SWEEP_SLOTS * index, line + 1)
            for index in range(slot(job, at.SWEEP_COUNT)):
                sweep = slot(job, at.SWEEPS) + 8 * at.SWEEP_SLOTS * index
                _line(job, sweep, line, part, sums, scratch)


@device
def _line(job, sweep, line, part, sums, scratch):
    """All gradients of one line of one sweep."""
    channels, padded = slot(job, at.CHANNELS), slot(job, at.PADDED_COLUMNS)
    columns, length = slot(job, at.COLUMNS), slot(sweep, at.LENGTH)
    low, high = channel_range(job, part)
    token, step = locate(job, sweep, line, False)
    rounded = (length + TOKENS_AT_ONCE - 1) // TOKENS_AT_ONCE * TOKENS_AT_ONCE
    u = scratch
    slope = u + FLOAT * rounded * channels
    du = slope + FLOAT * rounded * channels
    projected = du + FLOAT * rounded * channels
    d_rows = projected + FLOAT * rounded * padded
    row_sums = d_rows + FLOAT * rounded * columns
    vectors = row_sums + VECTOR * rounded * columns
    zero(row_sums, length * columns)
    convolve(job, sweep, token, step, 0, length, low, high, u, slope)
    if slot(job, at.WIDTH):
        project(job, u, length, projected)
        rows, row = projected, FLOAT * padded
    else:
        rows, row = slot(job, at.ROWS) + FLOAT * columns * token, FLOAT * columns * step
    for e in range(low, high, LANES):
        _channels(job, sweep, line, e, u, du, rows, row, row_sums, sums, vectors)
    if slot(job, at.WIDTH):
        for i in range(length * columns):
            store_float(d_rows + FLOAT * i, total(load(row_sums + VECTOR * i)))
        project_back(job, length, u, du, d_rows, sums)
        deconvolve(job, sweep, token, step, slope, du, sums)
        return
    given = slot(job, at.D_ROWS) + FLOAT * columns * part * slot(job, at.IMAGE_TOKENS) * slot(
        job, at.IMAGES
    )
    add = slot(sweep, at.ADD_SOURCE)
    for t in range(length):
        for e in range(low, high, LANES):
            out = slot(sweep, at.D_SOURCE) + FLOAT * ((token + step * t) * channels + e)
            change = load(du + FLOAT * (t * channels + e))
            store(out, change + load(out) if add else change)
        for k in range(columns):
            out = given + FLOAT * ((token + step * t) * columns + k)
            change = total(load(row_sums + VECTOR * (t * columns + k)))
            store_float(out, change + load_float(out) if add else change)


@device
def _channels(job, sweep, line, e, u, du, rows, row, row_sums, sums, vectors):
    """The recurrence and its adjoint for one vector of channels."""
    length, states = slot(sweep, at.LENGTH), slot(job, at.STATES)
    token, step = locate(job, sweep, line, False)
    size = VECTOR * ((length + TOKENS_AT_ONCE - 1) // TOKENS_AT_ONCE * TOKENS_AT_ONCE)
    dt, x, dt_slope, g = vectors, vectors + size, vectors + 2 * size, vectors + 3 * size
    d_out, y, dx, ddt = g + size, g + 2 * size, g + 3 * size, g + 4 * size
    saved = g + 5 * size
    time_steps(job, token, step, 0, length, e, u, rows, dt, x, dt_slope)
    gate_gradients(job, sweep, line, e, g, d_out)
    zero(y, length)
    zero(dx, length)
    zero(ddt, length)
    n = 0
    while n < states:
        n += _states(job, sweep, n, e, dt, x, g, y, dx, ddt, rows, row, row_sums, sums, saved)
    time_step_gradients(
        job, sweep, line, e, u, du, rows, dt, dt_slope, g, d_out, y, dx, ddt, row_sums, sums
    )


@device
def _states(job, sweep, n, e, dt, x, g, y, dx, ddt, rows, row, row_sums, sums, saved):
    """Up to four states, forward over all chunks of the line and back. Returns how many states.

    Only the state at the start of each chunk is kept on the way forward; on the way back every
    chunk but the last is run once more to have its states.
    """
    length, window = slot(sweep, at.LENGTH), slot(sweep, at.WINDOW)
    state = saved + VECTOR * 8 * (SAVED_CHUNK + 1)
    adjoint, unused = state + 4 * VECTOR, state + 8 * VECTOR
    starts = unused + SAVED_CHUNK * VECTOR
    chunks = (length + SAVED_CHUNK - 1) // SAVED_CHUNK
    zero(starts, 4)
    zero(adjoint, 4)
    count = 0
    for visit in range(2 * chunks - 1):
        chunk = min(visit, 2 * chunks - 2 - visit)
        start = chunk * SAVED_CHUNK
        steps = min(SAVED_CHUNK, length - start)
        restart = later_restart(first_restart(sweep), window, start)
        offset = VECTOR * start
        _copy(starts + 4 * VECTOR * chunk, state)
        out = y + offset if visit < chunks else unused
        count = advance(
            job, n, steps, dt + offset, x + offset, out, e, state, rows + row * start, row,
            restart, window, saved,
        )  # fmt: skip
        if visit < chunks:
            _copy(state, starts + 4 * VECTOR * (chunk + 1))
        if visit >= chunks - 1:
            _retreat(
                job, n, steps, start, dt + offset, x + offset, g + offset, dx + offset,
                ddt + offset, e, adjoint, rows + row * start, row, row_sums, sums, restart, window,
                saved,
            )  # fmt: skip
    return count


@device
def _copy(source, target):
    """Four vectors."""
    for i in range(4):
        store(target + VECTOR * i, load(source + VECTOR * i))


@device
def _retreat(
    job, n, steps, start, dt, x, g, dx, ddt, e, adjoint, rows, row, row_sums, sums, restart, window,
    saved,
):  # fmt: skip
    """The adjoint of `advance`."""
    if restart < steps:
        restart += (steps - 1 - restart) // window * window  # the last one
    stride, columns = FLOAT * slot(job, at.CHANNELS), slot(job, at.COLUMNS)
    b_column, c_column = slot(job, at.B_COLUMN), slot(job, at.C_COLUMN)
    _, _, _, _, _, rate, _ = weights_at(job)
    a = slot(job, at.WEIGHTS) + rate + FLOAT * e + stride * n
    d_rate = sums + rate + FLOAT * e + stride * n
    b, c = rows + FLOAT * (b_column + n), rows + FLOAT * (c_column + n)
    d_row = VECTOR * columns
    db = row_sums + VECTOR * (start * columns + b_column + n)
    dc = row_sums + VECTOR * (start * columns + c_column + n)
    if n + 4 > slot(job, at.STATES):
        one, unused = job + 8 * at.ONE, adjoint + 4 * VECTOR
        b_row, c_row, db_row, dc_row = row, row, d_row, d_row
        if b_column < 0:
            b, b_row, db, db_row = one, 0, unused, 0
        if c_column < 0:
            c, c_row, dc, dc_row = one, 0, unused, 0
        retreat_one(
            steps, dt, x, g, dx, ddt, a, adjoint, d_rate, b, b_row, c, c_row, db, db_row, dc,
            dc_row, restart, window, saved,
        )  # fmt: skip
    elif c_column < 0:
        retreat_four(
            steps, dt, x, g, dx, ddt, a, stride, adjoint, d_rate, b, None, row, db, None, d_row,
            restart, window, saved,
        )  # fmt: skip
    elif b_column < 0:
        retreat_four(
            steps, dt, x, g, dx, ddt, a, stride, adjoint, d_rate, None, c, row, None, dc, d_row,
            restart, window, saved,
        )  # fmt: skip
    else:
        retreat_four(
            steps, dt, x, g, dx, ddt, a, stride, adjoint, d_rate, b, c, row, db, dc, d_row, restart,
            window, saved,
        )  # fmt: skip
