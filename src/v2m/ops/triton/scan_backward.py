"""The selective scan, backward: states are recomputed, a chunk of steps at a time, into registers.

A program first replays its line and leaves the state at the start of every chunk in its own slice of
a small scratch buffer. Then it walks the chunks from the last to the first: the states of a chunk
and their decays are recomputed forwards into registers and consumed backwards. With g the gradient
with respect to the state after step i and p = decay_{i+1} g_{i+1}:

    g_i = p + C_i dy_i,   p = decay_i g_i,   dC_i = sum_e dy_i h_i,   dB_i = sum_e g_i dt_i u_i
    du_i = dt_i sum_n g_i B_i + D dy_i
    ddt_i = sum_n A p h_{i-1} + u_i sum_n g_i B_i,   dA = sum_i dt_i p h_{i-1}

Sums over channels are left per block of channels and sums over lines per program, to be added up by
the caller in a fixed order: no atomics, so gradients are bit-equal from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scan import SIZES, mirrored, segment_start, sigmoid, step_size

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus_slope(dt):
    """d softplus(x) / dx = 1 - exp(-softplus(x)) from dt = softplus(x), without cancellation."""
    series = dt * (1.0 - dt * (0.5 - dt * (1.0 / 6.0)))
    return tl.where(dt < 0.03, series, 1.0 - tl.exp(-dt))


@triton.jit
def store_channel_sum(pointer, values, n, mask_n, TENSOR_CORE: tl.constexpr):
    """Store the sum of (channels, N) values over the channels.

    On the tensor cores where tf32 operands are precise enough (16-bit tensors): ones times values.
    """
    if TENSOR_CORE:
        row = tl.arange(0, 16)
        ones = tl.full([16, values.shape[0]], 1.0, tl.float32)
        total = tl.dot(ones, values, input_precision="tf32")
        tl.store(
            pointer + n[None, :] + row[:, None] * 0, total, mask=(row == 0)[:, None] & mask_n[None, :]
        )
    else:
        tl.store(pointer + n, tl.sum(values, axis=0), mask=mask_n)


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(
    dy, u, dt, A, B, C, D, dt_bias, z,
    du, ddt, dA, dB, dC, dD, dbias, dz, checkpoints,
    E, N, tokens, segments, length, inner, outer, window, height, width, z_stride, share, scale,
    SCANS: tl.constexpr,
    SLOTS: tl.constexpr,
    REVERSE: tl.constexpr,
    DY_SLOTS: tl.constexpr,  # dy is (slots, tokens, E), not common to the scans
    ADD: tl.constexpr,  # add to what dz holds
    MIRROR_H: tl.constexpr,
    MIRROR_W: tl.constexpr,
    SOFTPLUS: tl.constexpr,  # softplus is applied here
    SOFTPLUS_DONE: tl.constexpr,  # dt has been through softplus; return the gradient before it
    TENSOR_CORE: tl.constexpr,
    CHUNK: tl.constexpr,
    PADDED_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHANNELS_PER_THREAD: tl.constexpr,
):  # fmt: skip
    """Shapes as in the forward kernel; du, ddt: (slots, tokens, E); dz: (tokens, E).

    dB, dC: (slots, tokens, blocks of channels, N); dA: (N, E) and dD, dbias: (E,), one set a program,
    `share` elements apart; checkpoints: (programs, blocks, chunks, N, BLOCK_E), all float32.
    """
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_E)
    e = block * BLOCK_E + lane
    n = tl.arange(0, PADDED_N)
    mask_e = e < E
    mask_n = n < N
    # The hint keeps all states of a channel in one thread.
    hinted = tl.multiple_of(tl.arange(0, BLOCK_E), CHANNELS_PER_THREAD)[:, None]
    a_pointers = n[None, :] * E + (hinted + block * BLOCK_E)
    mask_a = mask_e[:, None] & mask_n[None, :]
    A_block = tl.load(A + a_pointers, mask=mask_a, other=0.0)
    skip = tl.zeros([BLOCK_E], tl.float32)
    if D is not None:
        skip = tl.load(D + e, mask=mask_e, other=0.0).to(tl.float32)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + e, mask=mask_e, other=0.0).to(tl.float32)
    live = tl.where(mask_n, 1.0, 0.0)[None, :]
    slab = tokens.to(tl.int64)
    all_chunks = tl.cdiv(window, CHUNK)
    checkpoint = (program * blocks + block).to(tl.int64) * all_chunks * (PADDED_N * BLOCK_E)
    checkpoint_pointers = checkpoints + checkpoint + n[None, :] * BLOCK_E + hinted

    dA_sum = tl.zeros([BLOCK_E, PADDED_N], tl.float32)
    dD_sum = tl.zeros([BLOCK_E], tl.float32)
    dbias_sum = tl.zeros([BLOCK_E], tl.float32)

    for k in tl.static_range(SCANS):
        reverse = (REVERSE >> k) & 1
        slot = (SLOTS >> (4 * k)) & 15
        stride = inner.to(tl.int64) * (1 - 2 * reverse)
        for segment in range(program, segments, tl.num_programs(0)):
            token, steps = segment_start(segment, length, inner, outer, window, reverse)
            y_token = mirrored(token, height, width, MIRROR_H, MIRROR_W)
            y_stride = mirrored(token + stride, height, width, MIRROR_H, MIRROR_W) - y_token
            if DY_SLOTS:
                y_token += slot * slab
            row = slot * slab + token
            chunks = tl.cdiv(steps, CHUNK)

            h = tl.zeros([BLOCK_E, PADDED_N], tl.float32)
            for c in range(0, chunks - 1):
                for j in tl.static_range(CHUNK):
                    at = row + (c * CHUNK + j) * stride
                    x = tl.load(u + at * E + e, mask=mask_e, other=0.0).to(tl.float32)
                    step = step_size(
                        tl.load(dt + at * E + e, mask=mask_e, other=0.0), bias, SOFTPLUS
                    )
                    B_now = live
                    if B is not None:
                        B_now = tl.load(B + at * N + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
                    h = tl.exp2(step[:, None] * A_block) * h + (step * x)[:, None] * B_now
                tl.store(checkpoint_pointers + c * (PADDED_N * BLOCK_E), h)
            tl.debug_barrier()

            p = tl.zeros([BLOCK_E, PADDED_N], tl.float32)
            for c in range(0, chunks):
                first = (chunks - 1 - c) * CHUNK
                h = tl.load(
                    checkpoint_pointers + (chunks - 2 - c) * (PADDED_N * BLOCK_E),
                    mask=lane[:, None] < tl.where(c < chunks - 1, BLOCK_E, 0),
                    other=0.0,
                )
                states = (h,)
                decays = ()
                xs = ()
                dts = ()
                zs = ()
                dys = ()
                for j in tl.static_range(CHUNK):
                    mask = e < tl.where(first + j < steps, E, 0)
                    at = (row + (first + j) * stride) * E
                    at_y = (y_token + (first + j) * y_stride) * E
                    at_z = (token + (first + j) * stride) * z_stride
                    xs = xs + (tl.load(u + at + e, mask=mask, other=0.0),)
                    dts = dts + (tl.load(dt + at + e, mask=mask, other=0.0),)
                    dys = dys + (tl.load(dy + at_y + e, mask=mask, other=0.0),)
                    if z is not None:
                        zs = zs + (tl.load(z + at_z + e, mask=mask, other=0.0),)
                for j in tl.static_range(CHUNK):
                    alive = first + j < steps
                    at = row + (first + j) * stride
                    step = tl.where(alive, step_size(dts[j], bias, SOFTPLUS), 0.0)
                    B_now = live
                    if B is not None:
                        B_now = tl.load(B + at * N + n, mask=n < tl.where(alive, N, 0), other=0.0)
                        B_now = B_now.to(tl.float32)[None, :]
                    decay = tl.exp2(step[:, None] * A_block)
                    h = decay * h + (step * xs[j].to(tl.float32))[:, None] * B_now
                    decays = decays + (decay,)
                    states = states + (h,)
                for j in tl.static_range(CHUNK - 1, -1, -1):
                    alive = first + j < steps
                    mask = e < tl.where(alive, E, 0)
                    alive_n = n < tl.where(alive, N, 0)
                    at = row + (first + j) * stride
                    x = xs[j].to(tl.float32)
                    step = tl.where(alive, step_size(dts[j], bias, SOFTPLUS), 0.0)
                    g_out = dys[j].to(tl.float32) * scale
                    if C is not None:
                        C_now = tl.load(C + at * N + n, mask=alive_n, other=0.0).to(tl.float32)[None, :]
                    else:
                        C_now = live
                    if z is not None:
                        gate = zs[j].to(tl.float32)
                        open_ = sigmoid(gate)
                        out = tl.sum(states[j + 1] * C_now, axis=1) + skip * x
                        dgate = g_out * out * open_ * (1.0 + gate * (1.0 - open_))
                        dz_pointers = dz + (token + (first + j) * stride) * E + e
                        if ADD or k > 0:
                            dgate += tl.load(dz_pointers, mask=mask, other=0.0).to(tl.float32)
                        tl.store(dz_pointers, dgate.to(dz.dtype.element_ty), mask=mask)
                        g_out *= gate * open_
                    if C is not None:
                        store_channel_sum(
                            dC + (at * blocks + block) * N,
                            states[j + 1] * g_out[:, None], n, alive_n, TENSOR_CORE,
                        )  # fmt: skip
                    g = p + g_out[:, None] * C_now
                    if B is not None:
                        B_now = tl.load(B + at * N + n, mask=alive_n, other=0.0).to(tl.float32)[None, :]
                        store_channel_sum(
                            dB + (at * blocks + block) * N,
                            g * (step * x)[:, None], n, alive_n, TENSOR_CORE,
                        )  # fmt: skip
                        g_in = tl.sum(g * B_now, axis=1)
                    else:
                        g_in = tl.sum(g * live, axis=1)
                    p = decays[j] * g
                    t = p * states[j]
                    dA_sum += t * step[:, None]
                    dstep = LN2 * tl.sum(A_block * t, axis=1) + x * g_in
                    if SOFTPLUS:
                        raw = dts[j].to(tl.float32)
                        if bias is not None:
                            raw += bias
                        dstep *= sigmoid(raw)
                    if SOFTPLUS_DONE:
                        dstep *= softplus_slope(step)
                    dstep = tl.where(alive, dstep, 0.0)
                    dx = step * g_in + skip * g_out
                    tl.store(ddt + at * E + e, dstep.to(ddt.dtype.element_ty), mask=mask)
                    tl.store(du + at * E + e, dx.to(du.dtype.element_ty), mask=mask)
                    dD_sum += g_out * x
                    dbias_sum += dstep
            tl.debug_barrier()

    tl.store(dA + program * share + a_pointers, dA_sum, mask=mask_a)
    if D is not None:
        tl.store(dD + program * share + e, dD_sum, mask=mask_e)
    if dbias is not None:
        tl.store(dbias + program * share + e, dbias_sum, mask=mask_e)
