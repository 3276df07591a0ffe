"""Convolution, SiLU, x_proj, dt_proj and softplus of every scan of a pass, in one kernel.

They reduce over the channels, so they stand apart from the scan, but for memory they are one step:
the grid is read once a scan, and what the scan needs per token and channel (its input and step
size) is written once. The special functions of the SiLU and softplus also cost less here, where
memory is the limit; in the scan they would compete with the exponentials of the states.

Addresses are a 64-bit scalar for the tile and 32-bit offsets inside it.
"""

# Tuples of tensors grow by +: the kernel language has no star.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .ptx import hold
from .scan import sigmoid, step_size

GRID_SIZES = ["tokens", "height", "width", "sources", "downs", "reverses"]


@triton.jit
def scan_position(row, column, height, width, down, reverse):
    """Position of tokens along their line in scan order, the line's length, and tokens a step.

    row, column: of the tokens in their grid; `down`: the line is a column.
    """
    position = tl.where(down, row, column)
    length = tl.where(down, height, width)
    stride = tl.where(down, width, 1)
    position = tl.where(reverse, length - 1 - position, position)
    return position, length, tl.where(reverse, -stride, stride)


@triton.jit
def load_tile(pointers, mask, EVEN: tl.constexpr):
    """EVEN: every element is there, so nothing is masked; else zeros where the mask is not."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask, 0.0)


@triton.jit
def store_tile(pointers, values, mask, EVEN: tl.constexpr):
    values = values.to(pointers.dtype.element_ty)
    if EVEN:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask)


@triton.jit
def conv_tap(
    pointers, step, weight, position, e, mask_t, mask_e, tap, e_stride, tap_stride,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """What lies `tap` tokens before, zeros where the line begins later, and its weights."""
    taken = (position >= tap)[:, None]
    if not EVEN:
        taken = (mask_t[:, None] & mask_e[None, :]) & taken
    value = tl.load(pointers - tap * step, mask=taken, other=0.0)
    w = load_tile(weight + e * e_stride + (WIDTH - 1 - tap) * tap_stride, mask_e, EVEN)
    return value, w.to(tl.float32)[None, :]


@triton.jit
def causal_conv(
    pointers, step, weight, bias, position, e, E, mask_t, mask_e,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Depthwise convolution over the current and the WIDTH - 1 tokens before it in scan order.

    pointers: (tokens, channels), to the current tokens; the one before lies `step` elements lower.
    AT_ONCE: all taps are loaded before one is used, and weight is (WIDTH, E), to be loaded more at
    a time. Else it is (E, WIDTH), and the taps are a loop on purpose: unrolled, the compiler would
    move the layout a matrix product wants up to the loads and compute everything twice.
    """
    first = load_tile(bias + e, mask_e, EVEN).to(tl.float32)
    total = tl.broadcast_to(first[None, :], pointers.shape)
    if AT_ONCE:
        values = ()
        weights = ()
        for tap in tl.static_range(WIDTH):
            value, w = conv_tap(
                pointers, step, weight, position, e, mask_t, mask_e, tap, 1, E, WIDTH, EVEN
            )
            values = values + (value,)
            weights = weights + (w,)
        for tap in tl.static_range(WIDTH):
            total += values[tap].to(tl.float32) * weights[tap]
        return hold(total)
    for tap in range(WIDTH):
        value, w = conv_tap(
            pointers, step, weight, position, e, mask_t, mask_e, tap, WIDTH, 1, WIDTH, EVEN
        )
        total += value.to(tl.float32) * w
    return total


@triton.jit(do_not_specialize=GRID_SIZES)
def project_kernel(
    x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias,
    u, dt, low_rank, projected,
    tokens, E, N, height, width, x_stride,
    sources,  # 4 bits a scan: which slab of x it reads
    downs,  # 1 bit a scan: along the columns, not the rows
    reverses,  # 1 bit a scan
    WIDTH: tl.constexpr,
    PADDED_R: tl.constexpr,
    PADDED_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # whole tiles
):  # fmt: skip
    """x: (sources, tokens, E), rows x_stride apart. conv_weight: (E, WIDTH); x_proj, dt_proj: see
    `Prepared`.

    u = silu(conv(x)) and dt = softplus(dt_proj(low rank) + dt_bias): (scans, tokens, E);
    low_rank: (scans, tokens, PADDED_R) or None; projected: B or C, (scans, tokens, N), float32.
    """
    scan = tl.program_id(1)
    local = tl.arange(0, BLOCK_T)
    start = tl.program_id(0) * BLOCK_T
    mask_t = start + local < tokens
    r = tl.arange(0, PADDED_R)
    n = tl.arange(0, PADDED_N)
    row_in = ((sources >> (4 * scan)) & 15).to(tl.int64) * tokens + start
    row_out = scan.to(tl.int64) * tokens + start
    row, column = ((start + local) // width) % height, (start + local) % width
    position, _, stride = scan_position(
        row, column, height, width, (downs >> scan) & 1 == 1, (reverses >> scan) & 1 == 1
    )
    step = stride.to(tl.int64) * x_stride
    lane = tl.arange(0, BLOCK_E)
    tile_in = local[:, None] * x_stride + lane[None, :]
    tile_out = local[:, None] * E + lane[None, :]
    dtype = u.dtype.element_ty

    low = tl.zeros([BLOCK_T, PADDED_R], tl.float32)
    other = tl.zeros([BLOCK_T, PADDED_N], tl.float32)
    for first in range(0, E, BLOCK_E):
        e = first + lane
        mask_e = e < E
        pointers = (x + row_in * x_stride + first) + tile_in
        conv = causal_conv(
            pointers, step, conv_weight, conv_bias, position, e, E, mask_t, mask_e, WIDTH, False,
            EVEN,
        )  # fmt: skip
        value = (conv * sigmoid(conv)).to(dtype)
        mask = mask_t[:, None] & mask_e[None, :]
        store_tile((u + row_out * E + first) + tile_out, value, mask, EVEN)
        weights = x_proj + e[:, None]
        w_low = load_tile(weights + r[None, :] * E, mask_e[:, None], EVEN)
        w_other = load_tile(weights + (PADDED_R + n)[None, :] * E, mask_e[:, None], EVEN)
        low = tl.dot(value, w_low, low, input_precision=PRECISION)
        other = tl.dot(value, w_other, other, input_precision=PRECISION)

    mask_tn = mask_t[:, None] & (n < N)[None, :]
    tl.store((projected + row_out * N) + (local[:, None] * N + n[None, :]), other, mask_tn)
    low = low.to(dtype)
    if low_rank is not None:
        rows = (low_rank + row_out * PADDED_R) + (local[:, None] * PADDED_R + r[None, :])
        store_tile(rows, low, mask_t[:, None], EVEN)
    for first in range(0, E, BLOCK_E):
        e = first + lane
        mask_e = e < E
        w = load_tile(dt_proj + r[:, None] * E + e[None, :], mask_e[None, :], EVEN)
        bias = load_tile(dt_bias + e, mask_e, EVEN).to(tl.float32)
        size = tl.dot(low, w, input_precision=PRECISION)
        size = step_size(size, bias[None, :], 1 if dtype == tl.float32 else 2)
        mask = mask_t[:, None] & mask_e[None, :]
        store_tile((dt + row_out * E + first) + tile_out, size, mask, EVEN)
