"""Backward of the convolution and projections of a pass, in three steps.

1. `project_backward_low_kernel`: what flows back through dt_proj and from B or C, (tokens, R + N).
2. `project_backward_kernel`: through x_proj and the SiLU to the convolution's output, with the
   gradients of x_proj and dt_proj summed in registers over the tokens of a program.
3. `conv_backward_kernel`: the transposed convolutions of all scans that read one grid, summed, and
   the gradients of the convolution's weight and bias.
"""

# Tuples of tensors grow by +: the kernel language has no star.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .gate import gate_gradient
from .project import GRID_SIZES, causal_conv, load_tile, scan_position, store_tile
from .ptx import hold
from .scan import nonzero_gate, sigmoid


@triton.jit(do_not_specialize=["tokens", "blocks"])
def project_backward_low_kernel(
    ddt, dt_proj, dprojected, dlow,
    tokens, E, N, blocks,
    PADDED_R: tl.constexpr,
    PADDED_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # whole tiles
):  # fmt: skip
    """dlow: (scans, tokens, PADDED_R + PADDED_N), from ddt dt_proj and the sum of dprojected.

    ddt: (scans, tokens, E), before the softplus; dprojected: (scans, tokens, blocks, N); dt_proj:
    see `Prepared`.
    """
    local = tl.arange(0, BLOCK_T)
    start = tl.program_id(0) * BLOCK_T
    mask_t = start + local < tokens
    row = tl.program_id(1).to(tl.int64) * tokens + start
    r = tl.arange(0, PADDED_R)
    n = tl.arange(0, PADDED_N)
    lane = tl.arange(0, BLOCK_E)
    tile = local[:, None] * E + lane[None, :]
    low = tl.zeros([BLOCK_T, PADDED_R], tl.float32)
    for first in range(0, E, BLOCK_E):
        mask_e = first + lane < E
        pointers = (ddt + row * E + first) + tile
        value = load_tile(pointers, mask_t[:, None] & mask_e[None, :], EVEN)
        w = load_tile(dt_proj + first + lane[:, None] + r[None, :] * E, mask_e[:, None], EVEN)
        low = tl.dot(value, w, low, input_precision=PRECISION)
    other = tl.zeros([BLOCK_T, PADDED_N], tl.float32)
    mask = mask_t[:, None] & (n < N)[None, :]
    tile_n = local[:, None] * (blocks * N) + n[None, :]
    for block in range(blocks):
        other += tl.load((dprojected + row * blocks * N + block * N) + tile_n, mask, 0.0)
    pointers = (dlow + row * (PADDED_R + PADDED_N)) + local[:, None] * (PADDED_R + PADDED_N)
    store_tile(pointers + r[None, :], low, mask_t[:, None], EVEN)
    store_tile(pointers + PADDED_R + n[None, :], other, mask_t[:, None], EVEN)


@triton.jit(do_not_specialize=[*GRID_SIZES, "scans"])
def project_backward_kernel(
    x, taps, conv_bias, x_proj, low_rank, ddt, dlow, du, partial,
    tokens, E, N, R, height, width, x_stride,
    scans, sources, downs, reverses,
    WIDTH: tl.constexpr,
    PADDED_R: tl.constexpr,
    PADDED_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # whole tiles
):  # fmt: skip
    """du: (scans, tokens, E), in: gradient of the scan's input, out: of the convolution's output.

    taps, x_proj: see `Prepared`; low_rank and dlow: as the kernels that make them leave them.
    partial: (programs, R + R + N, E), float32: one program's share of the gradients of
    dt_proj (transposed) and x_proj.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_E)
    first = tl.program_id(1) * BLOCK_E
    e = first + lane
    mask_e = e < E
    r = tl.arange(0, PADDED_R)
    n = tl.arange(0, PADDED_N)
    w_low = load_tile(x_proj + r[:, None] * E + e[None, :], mask_e[None, :], EVEN)
    w_other = load_tile(x_proj + (PADDED_R + n)[:, None] * E + e[None, :], mask_e[None, :], EVEN)
    dtype = w_low.dtype
    local = tl.arange(0, BLOCK_T)
    tile_in = local[:, None] * x_stride + lane[None, :]
    tile = local[:, None] * E + lane[None, :]
    d_low = tl.zeros([PADDED_R, BLOCK_E], tl.float32)
    d_other = tl.zeros([PADDED_N, BLOCK_E], tl.float32)
    d_dt_proj = tl.zeros([PADDED_R, BLOCK_E], tl.float32)

    for scan in range(scans):
        source = x + ((sources >> (4 * scan)) & 15).to(tl.int64) * tokens * x_stride + first
        for block in range(program, tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
            start = block * BLOCK_T
            mask_t = start + local < tokens
            mask = mask_t[:, None] & mask_e[None, :]
            position, _, stride = scan_position(
                ((start + local) // width) % height, (start + local) % width, height, width,
                (downs >> scan) & 1 == 1, (reverses >> scan) & 1 == 1,
            )  # fmt: skip
            row = scan * tokens.to(tl.int64) + start
            # All loads before the first use of one.
            dlow_rows = dlow + row * (PADDED_R + PADDED_N) + local[:, None] * (PADDED_R + PADDED_N)
            low = load_tile(dlow_rows + r[None, :], mask_t[:, None], EVEN)
            other = load_tile(dlow_rows + PADDED_R + n[None, :], mask_t[:, None], EVEN)
            x_low_rows = low_rank + row * PADDED_R + local[:, None] * PADDED_R
            x_low = load_tile(x_low_rows + r[None, :], mask_t[:, None], EVEN)
            du_pointers = (du + row * E + first) + tile
            d_value = load_tile(du_pointers, mask, EVEN)
            d_step = load_tile((ddt + row * E + first) + tile, mask, EVEN)
            pointers = (source + start * tl.cast(x_stride, tl.int64)) + tile_in
            conv = causal_conv(
                pointers, stride.to(tl.int64) * x_stride, taps, conv_bias,
                position, e, E, mask_t, mask_e, WIDTH, True, EVEN,
            )  # fmt: skip
            low = hold(low)
            other = hold(other)
            x_low = hold(x_low)
            d_step = hold(d_step)
            gate = sigmoid(conv)
            slope = gate * (1.0 + conv * (1.0 - gate))  # one tile to bring to the products' layout
            d_input = tl.dot(low, w_low, d_value.to(tl.float32), input_precision=PRECISION)
            d_input = tl.dot(other, w_other, d_input, input_precision=PRECISION)
            if dtype != tl.float32:
                slope = slope.to(tl.float16)
            store_tile(du_pointers, d_input * slope.to(tl.float32), mask, EVEN)
            # Rows past the end count for nothing: `low`, `other` and `x_low` are zero there.
            value = (conv * gate).to(dtype)
            d_low = tl.dot(tl.trans(low), value, d_low, input_precision=PRECISION)
            d_other = tl.dot(tl.trans(other), value, d_other, input_precision=PRECISION)
            d_dt_proj = tl.dot(tl.trans(x_low), d_step, d_dt_proj, input_precision=PRECISION)

    out = partial + program * (R + N + R) * E + e[None, :]
    mask_r = (r < R)[:, None] & mask_e[None, :]
    tl.store(out + r[:, None] * E, d_dt_proj, mask_r)
    tl.store(out + (R + r)[:, None] * E, d_low, mask_r)
    tl.store(out + (R + R + n)[:, None] * E, d_other, (n < N)[:, None] & mask_e[None, :])


@triton.jit(do_not_specialize=["tokens", "height", "width"])
def conv_backward_kernel(
    d_out, x, conv_weight, z, dy, y, dx, dz, partial,
    tokens, E, height, width, x_stride, z_stride,
    sources: tl.constexpr,  # known when compiled, so that no load waits for a branch
    downs: tl.constexpr,
    reverses: tl.constexpr,
    COUNT: tl.constexpr,
    SCANS: tl.constexpr,
    LEAST_GATE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dx: (COUNT, tokens, E), of each source, from d_out (SCANS, tokens, E) of its scans.

    With z, x is the gated result of the pass before: dx is the gradient before that gate, and dz
    (tokens, E) becomes that of z, from this gate and from y's; if y is None, it is added to.
    partial: (COUNT, programs, WIDTH + 1, E), float32, one program's share of the gradients of the
    convolution's weight (transposed) and bias. It is summed over tokens at the very end: what a
    tile adds stays where its threads are.
    """
    local = tl.arange(0, BLOCK_T)
    lane = tl.arange(0, BLOCK_E)
    first = tl.program_id(1) * BLOCK_E
    e = first + lane
    mask_e = e < E
    tile = local[:, None] * E + lane[None, :]
    tile_x = local[:, None] * x_stride + lane[None, :]
    tile_z = local[:, None] * z_stride + lane[None, :]
    weights = ()
    for tap in tl.static_range(WIDTH):
        w = tl.load(conv_weight + e * WIDTH + (WIDTH - 1 - tap), mask_e, 0.0)
        weights = weights + (w.to(tl.float32)[None, :],)
    shares = ()
    for _ in tl.static_range(COUNT * (WIDTH + 1)):
        shares = shares + (tl.zeros([BLOCK_T, BLOCK_E], tl.float32),)
    for block in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        start = block * BLOCK_T
        mask_t = start + local < tokens
        mask = mask_t[:, None] & mask_e[None, :]
        grid_row, grid_column = ((start + local) // width) % height, (start + local) % width
        corner = start * tl.cast(E, tl.int64) + first
        if z is not None:
            gate = tl.load((z + start * tl.cast(z_stride, tl.int64) + first) + tile_z, mask, 1.0)
            gate = nonzero_gate(gate, LEAST_GATE)
            product = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
            if y is not None:
                product += tl.load((dy + corner) + tile, mask, 0.0).to(tl.float32) * tl.load(
                    (y + corner) + tile, mask, 0.0
                ).to(tl.float32)
        added = ()
        for source in tl.static_range(COUNT):
            row = source * tokens.to(tl.int64) + start
            value = tl.load((x + row * x_stride + first) + tile_x, mask, 0.0).to(tl.float32)
            later = ()  # the gradient 0 .. WIDTH - 1 tokens on in scan order, over the scans
            for _ in tl.static_range(WIDTH):
                later = later + (tl.zeros([BLOCK_T, BLOCK_E], tl.float32),)
            for scan in tl.static_range(SCANS):
                if (sources >> (4 * scan)) & 15 == source:
                    position, length, stride = scan_position(
                        grid_row, grid_column, height, width,
                        (downs >> scan) & 1 == 1, (reverses >> scan) & 1 == 1,
                    )  # fmt: skip
                    ahead = length - position
                    moved = (scan * tokens.to(tl.int64) + start) * E + first
                    found = ()
                    for tap in tl.static_range(WIDTH):
                        taken = (mask_t & (ahead > tap))[:, None] & mask_e[None, :]
                        at = moved + tap * stride.to(tl.int64) * E
                        share_of_scan = tl.load((d_out + at) + tile, taken, 0.0).to(tl.float32)
                        found = found + (later[tap] + share_of_scan,)
                    later = found
            total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
            for tap in tl.static_range(WIDTH):
                total += later[tap] * weights[tap]
                added = added + (shares[source * (WIDTH + 1) + tap] + later[tap] * value,)
            added = added + (shares[source * (WIDTH + 1) + WIDTH] + later[0],)
            if z is not None:
                product += total * value
                total *= gate * sigmoid(gate)
            tl.store((dx + row * E + first) + tile, total.to(dx.dtype.element_ty), mask)
        shares = added
        if z is not None:
            dgate = gate_gradient(product, gate)
            if y is None:
                dgate += tl.load((dz + corner) + tile, mask, 0.0).to(tl.float32)
            tl.store((dz + corner) + tile, dgate.to(dz.dtype.element_ty), mask)
    for source in tl.static_range(COUNT):
        share = partial + (source * tl.num_programs(0) + tl.program_id(0)) * (WIDTH + 1) * E + e
        for tap in tl.static_range(WIDTH):
            found = tl.sum(shares[source * (WIDTH + 1) + tap], axis=0)
            tl.store(share + (WIDTH - 1 - tap) * E, found, mask_e)
        tl.store(share + WIDTH * E, tl.sum(shares[source * (WIDTH + 1) + WIDTH], axis=0), mask_e)
