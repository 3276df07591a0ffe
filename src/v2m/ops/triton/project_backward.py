"""Backward of the convolution and projections of a pass, in three steps.

1. `project_backward_low_kernel`: what flows back through dt_proj and from B or C, (tokens, R + N).
2. `project_backward_kernel`: through x_proj and the SiLU to the convolution's output, with all weight
   gradients of the pass summed in registers over the tokens of a program.
3. `conv_backward_kernel`: the transposed convolutions of all scans that read one grid, summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .project import GRID_SIZES, scan_position
from .scan import sigmoid


@triton.jit(do_not_specialize=["tokens", "blocks"])
def project_backward_low_kernel(
    ddt, dt_proj, dprojected, dlow,
    tokens, E, N, R, blocks,
    PADDED_R: tl.constexpr,
    PADDED_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dlow: (scans, tokens, R + N) = [ddt dt_proj, sum over the blocks of dprojected].

    ddt: (scans, tokens, E), before the softplus; dprojected: (scans, tokens, blocks, N).
    """
    slab = tokens.to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = token < tokens
    row = tl.program_id(1) * slab + token
    r = tl.arange(0, PADDED_R)
    n = tl.arange(0, PADDED_N)
    mask_r = r < R
    mask_n = n < N
    low = tl.zeros([BLOCK_T, PADDED_R], tl.float32)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        mask_e = e < E
        value = tl.load(
            ddt + row[:, None] * E + e[None, :], mask=mask_t[:, None] & mask_e[None, :], other=0.0
        )
        w = tl.load(
            dt_proj + e[:, None] * R + r[None, :], mask=mask_e[:, None] & mask_r[None, :], other=0.0
        ).to(value.dtype)
        low = tl.dot(value, w, low, input_precision=PRECISION)
    other = tl.zeros([BLOCK_T, PADDED_N], tl.float32)
    mask = mask_t[:, None] & mask_n[None, :]
    for block in range(blocks):
        other += tl.load(
            dprojected + (row * blocks + block)[:, None] * N + n[None, :], mask=mask, other=0.0
        )
    dlow_pointers = dlow + row[:, None] * (R + N)
    dtype = dlow.dtype.element_ty
    tl.store(dlow_pointers + r[None, :], low.to(dtype), mask=mask_t[:, None] & mask_r[None, :])
    tl.store(dlow_pointers + R + n[None, :], other.to(dtype), mask=mask)


@triton.jit(do_not_specialize=GRID_SIZES)
def project_backward_kernel(
    x, conv_weight, conv_bias, x_proj, low_rank, ddt, dlow, du, partial,
    tokens, E, N, R, height, width, x_stride,
    SCANS: tl.constexpr,
    SOURCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    PADDED_R: tl.constexpr,
    PADDED_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """du: (scans, tokens, E), in: gradient of the scan's input, out: of the convolution's output.

    partial: (programs, WIDTH + 1 + R + N + R, E), float32: one program's share of the gradients of
    conv_weight (transposed), conv_bias, x_proj and dt_proj (transposed).
    """
    program = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = e < E
    r = tl.arange(0, PADDED_R)
    n = tl.arange(0, PADDED_N)
    k = tl.arange(0, PADDED_WIDTH)
    mask_r = r < R
    mask_n = n < N
    slab = tokens.to(tl.int64)
    dtype = x.dtype.element_ty
    w_low = tl.load(
        x_proj + r[:, None] * E + e[None, :], mask=mask_r[:, None] & mask_e[None, :], other=0.0
    ).to(dtype)
    w_other = tl.load(
        x_proj + (R + n)[:, None] * E + e[None, :],
        mask=mask_n[:, None] & mask_e[None, :],
        other=0.0,
    ).to(dtype)
    bias = tl.load(conv_bias + e, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    d_conv = tl.zeros([PADDED_WIDTH, BLOCK_E], tl.float32)
    d_bias = tl.zeros([BLOCK_E], tl.float32)
    d_low = tl.zeros([PADDED_R, BLOCK_E], tl.float32)
    d_other = tl.zeros([PADDED_N, BLOCK_E], tl.float32)
    d_dt_proj = tl.zeros([PADDED_R, BLOCK_E], tl.float32)

    for scan in tl.static_range(SCANS):
        source = x + ((SOURCES >> (4 * scan)) & 15) * slab * x_stride
        for block in range(program, tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
            token = block * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
            mask_t = token < tokens
            mask = mask_t[:, None] & mask_e[None, :]
            position, _, stride = scan_position(
                token, height, width, (COLUMNS >> scan) & 1, (REVERSE >> scan) & 1
            )
            taps = ()
            conv = tl.zeros([BLOCK_T, BLOCK_E], tl.float32) + bias
            for tap in tl.static_range(WIDTH):
                taken = mask_t & (position >= tap)
                value = tl.load(
                    source + (token - tap * stride)[:, None] * x_stride + e[None, :],
                    mask=taken[:, None] & mask_e[None, :],
                    other=0.0,
                )
                w = tl.load(conv_weight + e * WIDTH + (WIDTH - 1 - tap), mask=mask_e, other=0.0)
                conv += value.to(tl.float32) * w.to(tl.float32)[None, :]
                taps = taps + (value,)
            gate = sigmoid(conv)
            row = scan * slab + token
            low = tl.load(
                dlow + row[:, None] * (R + N) + r[None, :],
                mask=mask_t[:, None] & mask_r[None, :], other=0.0,
            )  # fmt: skip
            other = tl.load(
                dlow + row[:, None] * (R + N) + R + n[None, :],
                mask=mask_t[:, None] & mask_n[None, :], other=0.0,
            )  # fmt: skip
            x_low = tl.load(
                low_rank + row[:, None] * R + r[None, :],
                mask=mask_t[:, None] & mask_r[None, :], other=0.0,
            )  # fmt: skip
            du_pointers = du + row[:, None] * E + e[None, :]
            d_input = tl.load(du_pointers, mask=mask, other=0.0).to(tl.float32)
            d_input = tl.dot(low, w_low, d_input, input_precision=PRECISION)
            d_input = tl.dot(other, w_other, d_input, input_precision=PRECISION)
            value = tl.where(mask, conv * gate, 0.0).to(dtype)
            d_low = tl.dot(tl.trans(low), value, d_low, input_precision=PRECISION)
            d_other = tl.dot(tl.trans(other), value, d_other, input_precision=PRECISION)
            step = tl.load(ddt + row[:, None] * E + e[None, :], mask=mask, other=0.0)
            d_dt_proj = tl.dot(tl.trans(x_low), step, d_dt_proj, input_precision=PRECISION)
            d_out = tl.where(mask, d_input * gate * (1.0 + conv * (1.0 - gate)), 0.0)
            tl.store(du_pointers, d_out.to(du.dtype.element_ty), mask=mask)
            d_bias += tl.sum(d_out, axis=0)
            for tap in tl.static_range(WIDTH):
                share = tl.sum(d_out * taps[tap].to(tl.float32), axis=0)
                d_conv += tl.where(k == WIDTH - 1 - tap, 1.0, 0.0)[:, None] * share[None, :]

    out = partial + program * (WIDTH + 1 + R + N + R) * E + e[None, :]
    mask = mask_e[None, :]
    tl.store(out + k[:, None] * E, d_conv, mask=(k < WIDTH)[:, None] & mask)
    tl.store(out + WIDTH * E, d_bias[None, :], mask=mask)
    out += (WIDTH + 1) * E
    tl.store(out + r[:, None] * E, d_low, mask=mask_r[:, None] & mask)
    tl.store(out + (R + n)[:, None] * E, d_other, mask=mask_n[:, None] & mask)
    tl.store(out + (R + N + r)[:, None] * E, d_dt_proj, mask=mask_r[:, None] & mask)


@triton.jit(do_not_specialize=GRID_SIZES)
def conv_backward_kernel(
    d_out, conv_weight, dx,
    tokens, E, height, width,
    SCANS: tl.constexpr,
    SOURCES: tl.constexpr,
    COLUMNS: tl.constexpr,
    REVERSE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx: (sources, tokens, E), the sum over the scans that read each source. d_out: (scans, ...)."""
    slab = tokens.to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    source = tl.program_id(2)
    mask_t = token < tokens
    mask_e = e < E
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for scan in tl.static_range(SCANS):
        if ((SOURCES >> (4 * scan)) & 15) == source:
            position, length, stride = scan_position(
                token, height, width, (COLUMNS >> scan) & 1, (REVERSE >> scan) & 1
            )
            for tap in tl.static_range(WIDTH):
                taken = mask_t & (position + tap < length)
                value = tl.load(
                    d_out + (scan * slab + token + tap * stride)[:, None] * E + e[None, :],
                    mask=taken[:, None] & mask_e[None, :],
                    other=0.0,
                ).to(tl.float32)
                w = tl.load(conv_weight + e * WIDTH + (WIDTH - 1 - tap), mask=mask_e, other=0.0)
                total += value * w.to(tl.float32)[None, :]
    tl.store(
        dx + (source * slab + token)[:, None] * E + e[None, :],
        total.to(dx.dtype.element_ty),
        mask=mask_t[:, None] & mask_e[None, :],
    )
