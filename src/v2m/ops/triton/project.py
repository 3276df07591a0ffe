"""Convolution, SiLU, x_proj, dt_proj and softplus of every scan of a pass, in one kernel.

They reduce over the channels, so they stand apart from the scan, but for memory they are one step:
the grid is read once a scan, and what the scan needs per token and channel (its input and step size)
is written once. The special functions of the SiLU and softplus also cost nothing here, where memory
is the limit; in the scan they would compete with the exponentials of the states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scan import sigmoid, softplus

GRID_SIZES = ["tokens", "height", "width"]


@triton.jit
def scan_position(token, height, width, column, reverse):
    """Position of tokens along their line in scan order, the line's length, and tokens a step."""
    if column:
        position = (token // width) % height
        length = height
        stride = width.to(tl.int64)
    else:
        position = token % width
        length = width
        stride = tl.full((), 1, tl.int64)
    if reverse:
        position = length - 1 - position
        stride = -stride
    return position, length, stride


@triton.jit
def causal_conv(
    x, weight, bias, token, position, stride, x_stride, mask_t, e, mask_e, WIDTH: tl.constexpr
):  # fmt: skip
    """Depthwise convolution over the current and the WIDTH - 1 tokens before it in scan order."""
    total = tl.load(bias + e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        taken = mask_t & (position >= tap)
        value = tl.load(
            x + (token - tap * stride)[:, None] * x_stride + e[None, :],
            mask=taken[:, None] & mask_e[None, :],
            other=0.0,
        ).to(tl.float32)
        w = tl.load(weight + e * WIDTH + (WIDTH - 1 - tap), mask=mask_e, other=0.0).to(tl.float32)
        total += value * w[None, :]
    return total


@triton.jit(do_not_specialize=GRID_SIZES)
def project_kernel(
    x, conv_weight, conv_bias, x_proj, dt_proj, dt_bias,
    u, dt, low_rank, projected,
    tokens, E, N, R, height, width, x_stride,
    SOURCES: tl.constexpr,  # 4 bits a scan: which slab of x it reads
    COLUMNS: tl.constexpr,  # 1 bit a scan: along the columns, not the rows
    REVERSE: tl.constexpr,  # 1 bit a scan
    WIDTH: tl.constexpr,
    PADDED_R: tl.constexpr,
    PADDED_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x: (sources, tokens, E), rows x_stride apart. conv_weight: (E, WIDTH), x_proj: (R + N, E), dt_proj: (E, R).

    u = silu(conv(x)) and dt = softplus(dt_proj(low rank) + dt_bias): (scans, tokens, E);
    low_rank: (scans, tokens, R) or None; projected: B or C, (scans, tokens, N), float32.
    """
    scan = tl.program_id(1)
    slab = tokens.to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = token < tokens
    r = tl.arange(0, PADDED_R)
    n = tl.arange(0, PADDED_N)
    mask_r = r < R
    mask_n = n < N
    x += ((SOURCES >> (4 * scan)) & 15) * slab * x_stride
    out = scan * slab + token
    position, _, stride = scan_position(
        token, height, width, (COLUMNS >> scan) & 1, (REVERSE >> scan) & 1
    )

    low = tl.zeros([BLOCK_T, PADDED_R], tl.float32)
    other = tl.zeros([BLOCK_T, PADDED_N], tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        mask_e = e < E
        conv = causal_conv(
            x, conv_weight, conv_bias, token, position, stride, x_stride,
            mask_t, e, mask_e, WIDTH,
        )  # fmt: skip
        value = (conv * sigmoid(conv)).to(u.dtype.element_ty)
        mask = mask_t[:, None] & mask_e[None, :]
        tl.store(u + out[:, None] * E + e[None, :], value, mask=mask)
        w_low = tl.load(
            x_proj + r[None, :] * E + e[:, None], mask=mask_e[:, None] & mask_r[None, :], other=0.0
        ).to(value.dtype)
        w_other = tl.load(
            x_proj + (R + n)[None, :] * E + e[:, None],
            mask=mask_e[:, None] & mask_n[None, :],
            other=0.0,
        ).to(value.dtype)
        low = tl.dot(value, w_low, low, input_precision=PRECISION)
        other = tl.dot(value, w_other, other, input_precision=PRECISION)

    tl.store(
        projected + out[:, None] * N + n[None, :], other, mask=mask_t[:, None] & mask_n[None, :]
    )
    low = low.to(u.dtype.element_ty)
    if low_rank is not None:
        tl.store(
            low_rank + out[:, None] * R + r[None, :], low, mask=mask_t[:, None] & mask_r[None, :]
        )
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        mask_e = e < E
        w = tl.load(
            dt_proj + e[None, :] * R + r[:, None], mask=mask_r[:, None] & mask_e[None, :], other=0.0
        ).to(low.dtype)
        bias = tl.load(dt_bias + e, mask=mask_e, other=0.0).to(tl.float32)
        step = softplus(tl.dot(low, w, input_precision=PRECISION) + bias[None, :])
        tl.store(
            dt + out[:, None] * E + e[None, :],
            step.to(dt.dtype.element_ty),
            mask=mask_t[:, None] & mask_e[None, :],
        )
