"""The selective scan, forward: one program a line (or window) and block of channels.

The states of a channel stay in registers and the line is a plain loop; direction and axis are index
arithmetic. The loads of the next step are issued before the work of this one, since the loop is
bound by their latency otherwise.
"""

# Tuples of tensors grow by +: the kernel language has no star.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .ptx import far_rows, fetch, reciprocal

FETCHED = tl.constexpr(3)  # steps ahead
LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    return reciprocal(1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def nonzero_gate(z, LEAST: tl.constexpr):
    """z, but at least LEAST in size: see gate.py."""
    z = z.to(tl.float32)
    return tl.where(tl.abs(z) < LEAST, LEAST, z)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log(1 + e), e = exp(-|x|), accurate however small e is.

    log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1 / 3: a series, where a logarithm would cost more.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e * reciprocal(2.0 + e)
    q = s * s
    series = 1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11)))
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + q * (1.0 / 3 + q * series))


@triton.jit
def softplus_in_16_bits(x):
    """`softplus` in half the instructions, with a relative error of 2^-16.

    log(1 + e) / e on 0 <= e <= 1 by the polynomial whose largest relative error is least.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    q = 0.1012222990 - 0.0238691531 * e
    q = 0.3252066970 - e * (0.2100487202 - e * q)
    q = 0.9999915957 - e * (0.4993613660 - e * q)
    return tl.maximum(x, 0.0) + e * q


@triton.jit
def segment_start(segment, length, inner, outer, window, reverse):
    """First token in scan order, number of steps and stride in tokens of one line or window.

    Tokens are numbered (b, i, j) row by row. Successive steps of a line lie `inner` tokens apart;
    the lines of an image start at 0..inner-1 (columns), or every `outer` tokens (rows, inner = 1).
    """
    line = segment
    start = 0
    if window < length:  # a division takes as many instructions as a step
        windows = tl.cdiv(length, window)
        line = segment // windows
        start = (segment - line * windows) * window
    steps = tl.minimum(window, length - start)
    block = line
    place = 0
    if inner > 1:
        block = line // inner
        place = line - block * inner
    token = tl.cast(block, tl.int64) * outer + place + tl.cast(start, tl.int64) * inner
    if reverse:
        token += (steps - 1).to(tl.int64) * inner
    return token, steps


@triton.jit
def mirrored(token, height, width, MIRROR_H: tl.constexpr, MIRROR_W: tl.constexpr):
    """The token at the mirrored place of the same image."""
    if MIRROR_H:
        row = (token // width) % height
        token += (height - 1 - 2 * row) * width
    if MIRROR_W:
        token += width - 1 - 2 * (token % width)
    return token


@triton.jit
def step_size(dt, bias, SOFTPLUS: tl.constexpr):
    """dt in float32 with its bias; SOFTPLUS: 1 for the exact one, 2 for that of 16 bits."""
    dt = dt.to(tl.float32)
    if bias is not None:
        dt += bias
    if SOFTPLUS == 1:
        dt = softplus(dt)
    elif SOFTPLUS == 2:
        dt = softplus_in_16_bits(dt)
    return dt


@triton.jit
def halves(pointer, stride, BLOCK_E: tl.constexpr):
    """Where both halves of a row of channels lie, to be fetched: a row may take a cache line."""
    return (pointer, pointer + BLOCK_E // 2), (stride, stride)


# Whole numbers that vary freely: no version of a kernel for each that is 1 or a multiple of 16.
SIZES = ["tokens", "length", "inner", "outer", "window", "height", "width"]
SIZES += ["sources", "slots", "reverses"]


@triton.jit(do_not_specialize=SIZES)
def scan_forward_kernel(
    u, dt, A, B, C, D, dt_bias, z, y,
    E, N, tokens, length, inner, outer, window, height, width, z_stride, scale,
    sources,  # 4 bits a scan: which slab of u, dt, B and C
    slots,  # 4 bits a scan: which slab of y, where it has more than one
    reverses,  # 1 bit a scan
    SCANS: tl.constexpr,  # how many scans one program runs in sequence
    SUMMED: tl.constexpr,  # into one y; otherwise y has a slab a scan
    ADD: tl.constexpr,  # add to what y holds
    GATE_SUM: tl.constexpr,  # gate the sum of the scans, not each one
    LEAST_GATE: tl.constexpr,
    MIRROR_H: tl.constexpr,
    MIRROR_W: tl.constexpr,
    SOFTPLUS: tl.constexpr,  # see step_size
    FETCH: tl.constexpr,  # rows are brought to the L2 some steps ahead
    PADDED_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """u, dt: (sources, tokens, E); B, C: (sources, tokens, N); A: (N, E) times log2(e).

    z: (tokens, E), rows z_stride apart; y: (tokens, E) if SUMMED, else (slots, tokens, E). The
    grid's third axis counts the scans that are not in one program.
    """
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, PADDED_N)
    mask_e = e < E
    mask_n = n < N
    # The hint keeps two channels and all their states in one thread.
    a_pointers = A + n[None, :] * E + tl.max_contiguous(tl.multiple_of(e, 2), 2)[:, None]
    A_block = tl.load(a_pointers, mask=mask_e[:, None] & mask_n[None, :], other=0.0)
    if D is not None:
        skip = tl.load(D + e, mask=mask_e, other=0.0).to(tl.float32)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + e, mask=mask_e, other=0.0).to(tl.float32)
    live = tl.where(mask_n, 1.0, 0.0)[None, :]
    slab = tokens.to(tl.int64)

    for k in tl.static_range(SCANS):
        scan = tl.program_id(2) + k
        reverse = (reverses >> scan) & 1
        source = (sources >> (4 * scan)) & 15
        token, steps = segment_start(tl.program_id(0), length, inner, outer, window, reverse)
        stride = inner.to(tl.int64) * (1 - 2 * reverse)
        y_token = mirrored(token, height, width, MIRROR_H, MIRROR_W)
        y_stride = mirrored(token + stride, height, width, MIRROR_H, MIRROR_W) - y_token
        offset = (source * slab + token) * E
        offset_n = (source * slab + token) * N
        offset_z = token * z_stride
        offset_y = y_token * E
        if not SUMMED:
            offset_y += ((slots >> (4 * scan)) & 15) * slab * E
        if FETCH:
            block = tl.program_id(1) * BLOCK_E
            rows, strides = halves(u + (offset + block), stride * E, BLOCK_E)
            found = halves(dt + (offset + block), stride * E, BLOCK_E)
            rows, strides = rows + found[0], strides + found[1]
            if z is not None and (k == SCANS - 1 or not GATE_SUM):
                found = halves(z + (offset_z + block), stride * z_stride, BLOCK_E)
                rows, strides = rows + found[0], strides + found[1]
            if ADD or k > 0:
                found = halves(y + (offset_y + block), y_stride * E, BLOCK_E)
                rows, strides = rows + found[0], strides + found[1]
            if B is not None:
                rows, strides = rows + (B + offset_n,), strides + (stride * N,)
            if C is not None:
                rows, strides = rows + (C + offset_n,), strides + (stride * N,)
            far, far_step = far_rows(rows, strides, FETCHED, 1)
        u_next = tl.load(u + offset + e, mask=mask_e, other=0.0)
        dt_next = tl.load(dt + offset + e, mask=mask_e, other=0.0)
        if z is not None and (k == SCANS - 1 or not GATE_SUM):
            z_next = tl.load(z + offset_z + e, mask=mask_e, other=0.0)
        if B is not None:
            B_next = tl.load(B + offset_n + n, mask=mask_n, other=0.0)
        if C is not None:
            C_next = tl.load(C + offset_n + n, mask=mask_n, other=0.0)
        if ADD or k > 0:
            y_next = tl.load(y + offset_y + e, mask=mask_e, other=0.0)
        h = tl.zeros([BLOCK_E, PADDED_N], tl.float32)
        for i in range(steps):
            if FETCH:
                fetch(far, (tl.arange(0, 32) < len(rows)) & (i + FETCHED < steps))
                far += far_step
            more_e = e < tl.where(i + 1 < steps, E, 0)
            more_n = n < tl.where(i + 1 < steps, N, 0)
            x = u_next.to(tl.float32)
            step = step_size(dt_next, bias, SOFTPLUS)
            offset += stride * E
            offset_n += stride * N
            u_next = tl.load(u + offset + e, mask=more_e, other=0.0)
            dt_next = tl.load(dt + offset + e, mask=more_e, other=0.0)
            if B is not None:
                B_now = B_next.to(tl.float32)[None, :]
                B_next = tl.load(B + offset_n + n, mask=more_n, other=0.0)
            else:
                B_now = live
            if C is not None:
                C_now = C_next.to(tl.float32)[None, :]
                C_next = tl.load(C + offset_n + n, mask=more_n, other=0.0)
            if z is not None and (k == SCANS - 1 or not GATE_SUM):
                gate = nonzero_gate(z_next, LEAST_GATE)
                offset_z += stride * z_stride
                z_next = tl.load(z + offset_z + e, mask=more_e, other=0.0)
            decay = tl.exp2(step[:, None] * A_block)
            h = decay * h + (step * x)[:, None] * B_now
            if C is not None:
                out = tl.sum(h * C_now, axis=1)
            else:
                out = tl.sum(h, axis=1)
            if D is not None:
                out += skip * x
            if ADD or k > 0:
                before = y_next.to(tl.float32)
                y_next = tl.load(y + offset_y + y_stride * E + e, mask=more_e, other=0.0)
                if GATE_SUM:
                    out += before
            if z is not None and (k == SCANS - 1 or not GATE_SUM):
                out *= gate * sigmoid(gate) * scale
            if (ADD or k > 0) and not GATE_SUM:
                out += before
            tl.store(y + offset_y + e, out.to(y.dtype.element_ty), mask=mask_e)
            offset_y += y_stride * E
