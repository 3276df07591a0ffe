"""The selective scan, backward: states are recomputed, a chunk of steps at a time, into registers.

A program first replays its line and leaves the state at the start of every chunk in its own slice
of a small scratch buffer. Then it walks the chunks from the last to the first: the states of a
chunk and their decays are recomputed forwards into registers and consumed backwards. With g the
gradient with respect to the state after step i and p = decay_{i+1} g_{i+1}:

    g_i = p + C_i dy_i,   p = decay_i g_i,   dC_i = sum_e dy_i h_i,   dB_i = sum_e g_i dt_i u_i
    du_i = dt_i sum_n g_i B_i + D dy_i
    ddt_i = sum_n A p h_{i-1} + u_i sum_n g_i B_i,   dA = sum_i dt_i p h_{i-1}

Sums over channels are left per block of channels and sums over lines per program, to be added up by
the caller in a fixed order: no atomics, so gradients are bit-equal from run to run.
"""

# Tuples of tensors grow by +: the kernel language has no star.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .scan import LOG2E, SIZES, mirrored, nonzero_gate, segment_start, sigmoid, step_size

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus_slope(dt):
    """d softplus(x) / dx = 1 - exp(-softplus(x)) from dt = softplus(x), without cancellation."""
    series = dt * (1.0 - dt * (0.5 - dt * (1.0 / 6.0)))
    return tl.where(dt < 0.03, series, 1.0 - tl.exp2(-dt * LOG2E))


@triton.jit
def store_channel_sum(pointer, values, n, mask_n, TENSOR_CORE: tl.constexpr):
    """Store the sum of (channels, N) values over the channels.

    For 16-bit tensors on the tensor cores, ones times values, in bfloat16 (2) or tf32 (1).
    """
    if TENSOR_CORE > 0:
        row = tl.arange(0, 16)
        if TENSOR_CORE == 2:
            values = values.to(tl.bfloat16)
        ones = tl.full([16, values.shape[0]], 1.0, values.dtype)
        total = tl.dot(ones, values, input_precision="tf32")
        tl.store(
            pointer + n[None, :] + row[:, None] * 0,
            total,
            mask=(row == 0)[:, None] & mask_n[None, :],
        )
    else:
        tl.store(pointer + n, tl.sum(values, axis=0), mask=mask_n)


@triton.jit
def load_steps(pointer, stride, lanes, size, alive, COUNT: tl.constexpr):
    """(size,) rows of COUNT steps, `stride` elements apart; zeros beyond `alive` steps."""
    rows = ()
    for j in tl.static_range(COUNT):
        inside = lanes < tl.where(j < alive, size, 0)
        rows = rows + (tl.load((pointer + j * stride) + lanes, inside, 0.0),)
    return rows


@triton.jit
def replay(
    u, dt, B, at_n, A_block, bias, live, saved, steps, chunks,
    stride_e, stride_n, e, E, n, N,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """Walk a line forwards and save the state after every chunk but the last.

    u, dt: pointers to the line's first row; at_n: elements before it in B. Returns the last chunk's
    rows of u and dt.
    """
    h = tl.zeros(A_block.shape, tl.float32)
    xs = load_steps(u, stride_e, e, E, steps, CHUNK)
    dts = load_steps(dt, stride_e, e, E, steps, CHUNK)
    for c in range(chunks - 1):
        done = (c + 1) * CHUNK
        next_xs = load_steps(u + done * stride_e, stride_e, e, E, steps - done, CHUNK)
        next_dts = load_steps(dt + done * stride_e, stride_e, e, E, steps - done, CHUNK)
        for j in tl.static_range(CHUNK):
            step = step_size(dts[j], bias, SOFTPLUS)
            B_now = live
            if B is not None:
                B_now = tl.load((B + at_n + j * stride_n) + n, n < N, 0.0)
                B_now = B_now.to(tl.float32)[None, :]
            drive = (step * xs[j].to(tl.float32))[:, None]
            h = tl.exp2(step[:, None] * A_block) * h + drive * B_now
        tl.store(saved + c * STATE, h)
        at_n += CHUNK * stride_n
        xs = next_xs
        dts = next_dts
    return xs, dts


@triton.jit
def recompute(
    h, xs, dts, Bs, A_block, bias, live, alive, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr
):
    """Step sizes and decays of a chunk, and its states, the one before it first."""
    # Decays first: they do not wait for the checkpoint to arrive.
    sizes = ()
    decays = ()
    for j in tl.static_range(CHUNK):
        step = tl.where(j < alive, step_size(dts[j], bias, SOFTPLUS), 0.0)
        sizes = sizes + (step,)
        decays = decays + (tl.exp2(step[:, None] * A_block),)
    states = (h,)
    for j in tl.static_range(CHUNK):
        B_now = live
        if Bs is not None:
            B_now = Bs[j].to(tl.float32)[None, :]
        drive = (sizes[j] * xs[j].to(tl.float32))[:, None]
        states = states + (decays[j] * states[j] + drive * B_now,)
    return sizes, decays, states


@triton.jit
def step_gradient(dstep, raw, step, bias, SOFTPLUS: tl.constexpr, SOFTPLUS_DONE: tl.constexpr):
    """Gradient before the softplus, wherever that is applied."""
    if SOFTPLUS:
        raw = raw.to(tl.float32)
        if bias is not None:
            raw += bias
        dstep *= sigmoid(raw)
    if SOFTPLUS_DONE:
        dstep *= softplus_slope(step)
    return dstep


@triton.jit
def consume(
    p, dA_sum, dD_sum, dbias_sum, sizes, decays, states, xs, dts, dys, Bs, Cs,
    A_block, skip, bias, live, z, at_z, dz, du, ddt,
    dB, dC, at_share, stride, stride_e, stride_share,
    e, E, n, N, alive, z_stride, scale, add,
    LEAST_GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SOFTPLUS_DONE: tl.constexpr,
    TENSOR_CORE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Walk a chunk backwards: store its gradients, return p and the sums of the program.

    du, ddt: pointers to the chunk's first row; at_share: elements before it in dB or dC; at_z: its
    token in z and dz.
    """
    for j in tl.static_range(CHUNK - 1, -1, -1):
        inside = e < tl.where(j < alive, E, 0)
        inside_n = n < tl.where(j < alive, N, 0)
        x = xs[j].to(tl.float32)
        step = sizes[j]
        g_out = dys[j].to(tl.float32)
        B_now = live
        C_now = live
        if Bs is not None:
            B_now = Bs[j].to(tl.float32)[None, :]
        if Cs is not None:
            C_now = Cs[j].to(tl.float32)[None, :]
        if z is not None:
            token_z = at_z + j * stride
            gate = tl.load((z + token_z * z_stride) + e, inside, 0.0)
            gate = nonzero_gate(gate, LEAST_GATE)
            g_out *= scale
            open_ = sigmoid(gate)
            out = tl.sum(states[j + 1] * C_now, axis=1) + skip * x
            dgate = g_out * out * open_ * (1.0 + gate * (1.0 - open_))
            before = e < tl.where((j < alive) & add, E, 0)
            dgate += tl.load((dz + token_z * E) + e, before, 0.0).to(tl.float32)
            tl.store((dz + token_z * E) + e, dgate.to(dz.dtype.element_ty), inside)
            g_out *= gate * open_
        at = at_share + j * stride_share
        if Cs is not None:
            store_channel_sum(dC + at, states[j + 1] * g_out[:, None], n, inside_n, TENSOR_CORE)
        g = p + g_out[:, None] * C_now
        if Bs is not None:
            store_channel_sum(dB + at, g * (step * x)[:, None], n, inside_n, TENSOR_CORE)
        g_in = tl.sum(g * B_now, axis=1)
        p = decays[j] * g
        t = p * states[j]
        dA_sum += t * step[:, None]
        dstep = LN2 * tl.sum(A_block * t, axis=1) + x * g_in
        dstep = step_gradient(dstep, dts[j], step, bias, SOFTPLUS, SOFTPLUS_DONE)
        dstep = tl.where(j < alive, dstep, 0.0)
        dx = step * g_in + skip * g_out
        tl.store((ddt + j * stride_e) + e, dstep.to(ddt.dtype.element_ty), inside)
        tl.store((du + j * stride_e) + e, dx.to(du.dtype.element_ty), inside)
        dD_sum += g_out * x
        dbias_sum += dstep
    return p, dA_sum, dD_sum, dbias_sum


@triton.jit(do_not_specialize=[*SIZES, "segments", "scans"])
def scan_backward_kernel(
    dy, u, dt, A, B, C, D, dt_bias, z,
    du, ddt, dA, dB, dC, dD, dbias, dz, checkpoints,
    E, N, tokens, segments, length, inner, outer, window, height, width, z_stride, share, scale,
    scans, slots, reverses,
    DY_SLOTS: tl.constexpr,  # dy is (slots, tokens, E), not common to the scans
    ADD: tl.constexpr,  # add to what dz holds
    LEAST_GATE: tl.constexpr,
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

    dB, dC: (slots, tokens, blocks of channels, N); dA: (N, E) and dD, dbias: (E,), one set a
    program, `share` elements apart; checkpoints: (programs, blocks, chunks, N, BLOCK_E): float32.
    """
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK_E)
    e = block * BLOCK_E + lane
    n = tl.arange(0, PADDED_N)
    mask_e = e < E
    mask_n = n < N
    # The hint keeps as many states of a channel in one thread as there are.
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
    STATE: tl.constexpr = PADDED_N * BLOCK_E
    slice_ = (program * blocks + block).to(tl.int64) * tl.cdiv(window, CHUNK) * STATE
    saved = checkpoints + slice_ + n[None, :] * BLOCK_E + hinted

    dA_sum = tl.zeros([BLOCK_E, PADDED_N], tl.float32)
    dD_sum = tl.zeros([BLOCK_E], tl.float32)
    dbias_sum = tl.zeros([BLOCK_E], tl.float32)

    for k in range(scans):
        reverse = (reverses >> k) & 1
        slot = ((slots >> (4 * k)) & 15) * tokens.to(tl.int64)
        stride = inner.to(tl.int64) * (1 - 2 * reverse)
        stride_e = stride * E
        stride_n = stride * N
        for segment in range(program, segments, tl.num_programs(0)):
            token, steps = segment_start(segment, length, inner, outer, window, reverse)
            y_token = mirrored(token, height, width, MIRROR_H, MIRROR_W)
            stride_y = (mirrored(token + stride, height, width, MIRROR_H, MIRROR_W) - y_token) * E
            if DY_SLOTS:
                y_token += slot
            row = slot + token
            chunks = tl.cdiv(steps, CHUNK)

            at = row * E  # elements: of the chunk's first step in u and dt, and below in B or C
            at_n = row * N
            xs, dts = replay(
                u + at, dt + at, B, at_n, A_block, bias, live, saved, steps, chunks,
                stride_e, stride_n, e, E, n, N, SOFTPLUS, CHUNK, STATE,
            )  # fmt: skip
            first = (chunks - 1) * CHUNK
            at += first * stride_e
            at_n += first * stride_n
            tl.debug_barrier()

            p = tl.zeros([BLOCK_E, PADDED_N], tl.float32)
            at_y = (y_token * E) + first * stride_y
            at_z = token + first * stride
            dys = load_steps(dy + at_y, stride_y, e, E, steps - first, CHUNK)
            for c in range(chunks):
                alive = tl.minimum(steps - first, CHUNK)
                first -= CHUNK
                h = tl.load(
                    saved + (chunks - 2 - c) * STATE,
                    lane[:, None] < tl.where(first >= 0, BLOCK_E, 0),
                    0.0,
                )
                # The chunk that comes next; before the line's first there is none.
                at_next = at - CHUNK * stride_e
                at_y -= CHUNK * stride_y
                coming = tl.where(first >= 0, CHUNK, 0)
                next_xs = load_steps(u + at_next, stride_e, e, E, coming, CHUNK)
                next_dts = load_steps(dt + at_next, stride_e, e, E, coming, CHUNK)
                next_dys = load_steps(dy + at_y, stride_y, e, E, coming, CHUNK)
                Bs = None
                if B is not None:
                    Bs = load_steps(B + at_n, stride_n, n, N, alive, CHUNK)
                Cs = None
                if C is not None:
                    Cs = load_steps(C + at_n, stride_n, n, N, alive, CHUNK)
                sizes, decays, states = recompute(
                    h, xs, dts, Bs, A_block, bias, live, alive, SOFTPLUS, CHUNK
                )
                p, dA_sum, dD_sum, dbias_sum = consume(
                    p, dA_sum, dD_sum, dbias_sum, sizes, decays, states, xs, dts, dys, Bs, Cs,
                    A_block, skip, bias, live, z, at_z, dz, du + at, ddt + at,
                    dB, dC, at_n * blocks + block * N, stride, stride_e, stride_n * blocks,
                    e, E, n, N, alive, z_stride, scale, k + ADD > 0,
                    LEAST_GATE, SOFTPLUS, SOFTPLUS_DONE, TENSOR_CORE, CHUNK,
                )  # fmt: skip
                at = at_next
                at_n -= CHUNK * stride_n
                at_z -= CHUNK * stride
                xs = next_xs
                dts = next_dts
                dys = next_dys
            tl.debug_barrier()

    tl.store(dA + program * share + a_pointers, dA_sum, mask=mask_a)
    if D is not None:
        tl.store(dD + program * share + e, dD_sum, mask=mask_e)
    if dbias is not None:
        tl.store(dbias + program * share + e, dbias_sum, mask=mask_e)
