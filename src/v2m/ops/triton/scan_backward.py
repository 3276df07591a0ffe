"""The selective scan, backward: states are recomputed, a chunk of steps at a time, into registers.

A program first replays its line and leaves the state at the start of every chunk, in shared memory
where there is room (see states.py); without B, the gradient of C, which depends on the states
alone, is done there, too (see replay.py). Then it walks the chunks from the last to the first: the
states of a chunk and their decays are recomputed forwards into registers and consumed backwards.
With g the gradient with respect to the state after step i and p = decay_{i+1} g_{i+1}:

    g_i = p + C_i dy_i,   p = decay_i g_i,   dC_i = sum_e dy_i h_i,   dB_i = sum_e g_i dt_i u_i
    du_i = dt_i sum_n g_i B_i + D dy_i
    ddt_i = sum_n A p h_{i-1} + u_i sum_n g_i B_i,   dA = sum_i dt_i p h_{i-1}

Sums over channels are left per block of channels and sums over lines per program, to be added up by
the caller in a fixed order: no atomics, so gradients are bit-equal from run to run.

Few warps fit on a multiprocessor, so a load that is waited for is time lost: rows are loaded one
chunk or more ahead, and turned into float32 before the next ones are asked for. Carried over as
they are, 16-bit rows would be copied at the end of the loop, and that copy waits for the load.
"""

# Tuples of tensors grow by +: the kernel language has no star.
# ruff: noqa: RUF005

from __future__ import annotations

import triton
import triton.language as tl

from .channel_sums import picks, store_channel_sum
from .chunks import columns, floats, load_rows, load_steps
from .ptx import far_rows, fetch, packed
from .replay import replay, store_output_gradients, through_gate
from .scan import LN2, LOG2E, SIZES, mirrored, segment_start, sigmoid, step_size
from .states import load_state, near_places, place_before, place_near, within_place


@triton.jit
def softplus_slope(dt):
    """d softplus(x) / dx = 1 - exp(-softplus(x)) from dt = softplus(x), without cancellation."""
    series = dt * (1.0 - dt * (0.5 - dt * (1.0 / 6.0)))
    return tl.where(dt < 0.03, series, 1.0 - tl.exp2(-dt * LOG2E))


FETCHED = tl.constexpr(3)  # chunks ahead that the walk backwards fetches


@triton.jit
def recompute(
    h, xs, dts, Bs, A_block, bias, live, alive,
    COUNT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CHUNK: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Step sizes and decays of a chunk, and its states, COUNT of them, from the one before it."""
    # Decays first: they do not wait for the checkpoint to arrive.
    sizes = ()
    decays = ()
    for j in tl.static_range(CHUNK):
        step = step_size(dts[j], bias, SOFTPLUS)
        if MASK:
            step = tl.where(j < alive, step, 0.0)
        sizes = sizes + (step,)
        decays = decays + (tl.exp2(step[:, None] * A_block),)
    states = (h,)
    for j in tl.static_range(COUNT - 1):
        B_now = live
        if Bs is not None:
            B_now = Bs[j].to(tl.float32)[None, :]
        drive = (sizes[j] * xs[j])[:, None]
        states = states + (decays[j] * states[j] + drive * B_now,)
    return sizes, decays, states


@triton.jit
def step_gradient(dstep, raw, step, bias, SOFTPLUS: tl.constexpr, SOFTPLUS_DONE: tl.constexpr):
    """Gradient before the softplus, wherever that is applied."""
    if SOFTPLUS:
        if bias is not None:
            raw += bias
        dstep *= sigmoid(raw)
    if SOFTPLUS_DONE:
        dstep *= softplus_slope(step)
    return dstep


@triton.jit
def consume(
    p, dA_sum, dD_sum, dbias_sum, sizes, decays, states, xs, dts, dys, Bs, Cs,
    A_block, skip, bias, live, ones, z, dz, du, ddt, dB, dC, stride_e, stride_z, stride_share,
    e, E, n, N, alive, scale,
    ADD: tl.constexpr,
    LEAST_GATE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SOFTPLUS_DONE: tl.constexpr,
    SUM_BY_PRODUCT: tl.constexpr,
    CHUNK: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Walk a chunk backwards: store its gradients, return p and the sums of the program.

    xs, dts, dys: its rows in float32; z, dz, du, ddt, dB, dC: pointers to its first row; dz and dC
    are none where the replay has stored them.
    """
    for j in tl.static_range(CHUNK - 1, -1, -1):
        inside = None
        if MASK == 1:
            inside = j < alive
        elif MASK == 2:
            inside = e < tl.where(j < alive, E, 0)
        x = xs[j]
        step = sizes[j]
        g_out = dys[j]
        B_now = live
        C_now = live
        if Bs is not None:
            B_now = Bs[j].to(tl.float32)[None, :]
        if Cs is not None:
            C_now = Cs[j].to(tl.float32)[None, :]
        if len(states) > CHUNK:
            g_out = store_output_gradients(
                j, states[j + 1], x, g_out, C_now, z, dz, dC, skip, ones,
                stride_e, stride_z, stride_share, e, E, n, N, j < alive, scale,
                ADD, LEAST_GATE, SUM_BY_PRODUCT, MASK,
            )  # fmt: skip
        elif z is not None:
            gate = tl.load(z + j * stride_z, inside)
            g_out, _, _ = through_gate(g_out, gate, scale, LEAST_GATE)
        g = p + g_out[:, None] * C_now
        if Bs is not None:
            store_channel_sum(
                dB + j * stride_share, g * (step * x)[:, None], ones, n, N, j < alive,
                SUM_BY_PRODUCT, MASK,
            )  # fmt: skip
        g_in = tl.sum(g * B_now, axis=1)
        p = decays[j] * g
        t = p * states[j]
        dA_sum += t * step[:, None]
        dstep = LN2 * tl.sum(A_block * t, axis=1) + x * g_in
        dstep = step_gradient(dstep, dts[j], step, bias, SOFTPLUS, SOFTPLUS_DONE)
        if MASK:
            dstep = tl.where(j < alive, dstep, 0.0)
        dx = step * g_in + skip * g_out
        tl.store(ddt + j * stride_e, dstep.to(ddt.dtype.element_ty), inside)
        tl.store(du + j * stride_e, dx.to(du.dtype.element_ty), inside)
        dD_sum += g_out * x
        dbias_sum += dstep
    return p, dA_sum, dD_sum, dbias_sum


@triton.jit(do_not_specialize=[*SIZES, "segments", "scans", "places"])
def scan_backward_kernel(
    dy, u, dt, A, B, C, D, dt_bias, z,
    du, ddt, dA, dB, dC, dD, dbias, dz, checkpoints,
    E, N, tokens, segments, length, inner, outer, window, height, width, z_stride, share, scale,
    places, scans, sources, slots, reverses,
    SHARED: tl.constexpr,  # u, dt, B, C are (sources, ...), not (slots, ...) like their gradients
    DY_SLOTS: tl.constexpr,  # dy is (slots, tokens, E), not common to the scans
    ADD: tl.constexpr,  # add to what dz holds
    LEAST_GATE: tl.constexpr,
    MIRROR_H: tl.constexpr,
    MIRROR_W: tl.constexpr,
    SOFTPLUS: tl.constexpr,  # softplus is applied here: see step_size
    SOFTPLUS_DONE: tl.constexpr,  # dt has been through softplus; return the gradient before it
    SUM_BY_PRODUCT: tl.constexpr,  # sums over channels: see channel_sums.py
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,  # chunks that the replay loads at a time
    NEAR: tl.constexpr,  # places for states in shared memory: see states.py; 0: there are none
    FETCH: tl.constexpr,  # rows are brought to the L2 some chunks ahead
    PADDED_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHANNELS_PER_THREAD: tl.constexpr,
    MASK: tl.constexpr,  # 0: lines are whole chunks, blocks of channels and of states whole; 1:
    # only blocks are, no line is shorter than a chunk, and GROUP is 1; 2: nothing is sure
):  # fmt: skip
    """Shapes as in the forward kernel; du, ddt: (slots, tokens, E); dz: (tokens, E).

    dB, dC: (slots, tokens, blocks of channels, N); dA: (N, E) and dD, dbias: (E,), one set a
    program, `share` elements apart; checkpoints: (programs, blocks, places) of the scratch buffer,
    or none if the states of every line have room in shared memory.
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
    ones = picks(BLOCK_E)
    # Who stores the gradients of C and gate: the replay, or the walk back with one more state.
    EARLY: tl.constexpr = B is None
    LATE: tl.constexpr = B is not None and (C is not None or z is not None)
    # With 16 states a chunk is of 2 to 4 steps, whose rows of B and C are loaded a chunk ahead too.
    AHEAD: tl.constexpr = PADDED_N == 16
    WITHIN: tl.constexpr = MASK if MASK == 2 else 0  # before its last chunk a line has whole ones
    PLACE: tl.constexpr = PADDED_N * BLOCK_E // 2 if NEAR else PADDED_N * BLOCK_E
    far = None
    if checkpoints is not None:
        far = checkpoints.to(tl.pointer_type(tl.uint32)) if NEAR else checkpoints
        far += (program * blocks + block).to(tl.int64) * (places * PLACE)
    near = near_places(scans, NEAR) if NEAR else 0
    within = within_place(packed(A_block)) if NEAR else n[None, :] * BLOCK_E + hinted

    dA_sum = tl.zeros([BLOCK_E, PADDED_N], tl.float32)
    dD_sum = tl.zeros([BLOCK_E], tl.float32)
    dbias_sum = tl.zeros([BLOCK_E], tl.float32)

    each = tl.cdiv(segments * scans, tl.num_programs(0))
    begin = program * each
    end = tl.minimum(begin + each, segments * scans)
    k = begin // segments
    segment = begin - k * segments
    for _ in range(begin, end):
        reverse = (reverses >> k) & 1
        slot = ((slots >> (4 * k)) & 15) * tokens.to(tl.int64)
        stride = inner * (1 - 2 * reverse)
        stride_e = stride * E
        stride_n = stride * N
        token, steps = segment_start(segment, length, inner, outer, window, reverse)
        y_token = mirrored(token, height, width, MIRROR_H, MIRROR_W)
        stride_y = (mirrored(token + stride, height, width, MIRROR_H, MIRROR_W) - y_token) * E
        if DY_SLOTS:
            y_token += slot
        row = slot + token
        source = row
        if SHARED:
            source = ((sources >> (4 * k)) & 15) * tokens.to(tl.int64) + token
        chunks = tl.cdiv(steps, CHUNK)
        first = (chunks - 1) * CHUNK  # step of the chunk at hand, from the last to the first
        corner = source * E + block * BLOCK_E
        u_at = u + corner + lane
        dt_at = dt + corner + lane
        last = first * stride_e.to(tl.int64)
        us = load_steps(u_at + last, stride_e, e, E, steps - first, CHUNK, MASK)
        dts = load_steps(dt_at + last, stride_e, e, E, steps - first, CHUNK, MASK)
        dy_at = dy + (y_token * E + first * stride_y) + e
        dys = load_steps(dy_at, stride_y, e, E, steps - first, CHUNK, MASK)
        z_at = None
        dz_at = None
        stride_z = stride * z_stride
        if z is not None:
            z_at = z + (token * z_stride + block * BLOCK_E) + lane
            dz_at = dz + (token * E + block * BLOCK_E) + lane
        B_at = None
        if B is not None:
            B_at = B + source * N
        C_at = None
        dC_at = None
        if C is not None:
            C_at = C + source * N
            dC_at = dC + (row * blocks + block) * N
        replay(
            u_at, dt_at, dy + y_token * E + e, B_at, C_at, z_at if EARLY else None,
            dz_at if EARLY else None, dC_at if EARLY else None, us, dts, dys, A_block, skip, bias,
            live, ones, chunks + 1, far, near, within, steps, stride_e, stride_y, stride_n,
            stride_z, stride_n * blocks, e, E, n, N, scale, ADD, LEAST_GATE, SOFTPLUS,
            SUM_BY_PRODUCT, CHUNK, GROUP, PLACE, NEAR, AHEAD, FETCH, MASK,
        )  # fmt: skip
        u_at += last
        dt_at += last
        du_at = du + (row * E + last) + e
        ddt_at = ddt + (row * E + last) + e
        at_n = (source + first * stride.to(tl.int64)) * N
        share_n = (row - source) * N  # from there to the gradients' slab
        if z is not None:
            z_at += first * stride_z.to(tl.int64)
            dz_at += last
        p = tl.zeros([BLOCK_E, PADDED_N], tl.float32)
        B_rows = None
        C_rows = None
        if AHEAD:
            if B is not None:
                B_rows = load_rows(B + at_n, stride_n, N, steps - first, PADDED_N, CHUNK)
            if C is not None:
                C_rows = load_rows(C + at_n, stride_n, N, steps - first, PADDED_N, CHUNK)
        if FETCH:
            lines_at = dy + (y_token * E + block * BLOCK_E), u + corner, dt + corner
            to_fetch, fetch_step = far_rows(
                lines_at, (stride_y, stride_e, stride_e), first - FETCHED * CHUNK, CHUNK
            )
        tl.debug_barrier()
        at = place_near(chunks, near, NEAR)
        for chunk in range(chunks - 1, -1, -1):
            alive = tl.minimum(steps - first, CHUNK)
            if FETCH:
                fetch(to_fetch, (tl.arange(0, 32) < 3 * CHUNK) & (first >= FETCHED * CHUNK))
                to_fetch -= fetch_step
            first -= CHUNK
            # The chunk that comes next; before the line's first there is none.
            back = tl.where(first >= 0, CHUNK, 0)
            u_at -= back * stride_e
            dt_at -= back * stride_e
            dy_at -= back * stride_y
            xs = floats(us)
            raw = floats(dts)
            g_outs = floats(dys)
            behind = at
            at = place_before(at, far, near, NEAR)
            h = load_state(chunk, at, behind, far, within, PLACE, NEAR)
            back_n = at_n - back * stride_n
            Bs = None
            dB_at = None
            if B is not None:
                dB_at = dB + ((at_n + share_n) * blocks + block * N)
                if AHEAD:
                    Bs = columns(B_rows)
                    B_rows = load_rows(B + back_n, stride_n, N, back, PADDED_N, CHUNK)
                else:
                    Bs = load_steps(B + at_n + n, stride_n, n, N, alive, CHUNK, MASK)
            Cs = None
            late_dC = None
            if C is not None:
                if LATE:
                    late_dC = dC + ((at_n + share_n) * blocks + block * N)
                if AHEAD:
                    Cs = columns(C_rows)
                    C_rows = load_rows(C + back_n, stride_n, N, back, PADDED_N, CHUNK)
                else:
                    Cs = load_steps(C + at_n + n, stride_n, n, N, alive, CHUNK, MASK)
            us = load_steps(u_at, stride_e, e, E, back, CHUNK, WITHIN)
            dts = load_steps(dt_at, stride_e, e, E, back, CHUNK, WITHIN)
            dys = load_steps(dy_at, stride_y, e, E, back, CHUNK, WITHIN)
            sizes, decays, states = recompute(
                h, xs, raw, Bs, A_block, bias, live, alive,
                CHUNK + 1 if LATE else CHUNK, SOFTPLUS, CHUNK, MASK,
            )  # fmt: skip
            tl.debug_barrier()  # or the compiler puts the loads of the next chunk off
            p, dA_sum, dD_sum, dbias_sum = consume(
                p, dA_sum, dD_sum, dbias_sum, sizes, decays, states, xs, raw, g_outs, Bs, Cs,
                A_block, skip, bias, live, ones, z_at, dz_at, du_at, ddt_at, dB_at, late_dC,
                stride_e, stride_z, stride_n * blocks, e, E, n, N, alive, scale, ADD,
                LEAST_GATE, SOFTPLUS, SOFTPLUS_DONE, SUM_BY_PRODUCT, CHUNK, MASK,
            )  # fmt: skip
            du_at -= CHUNK * stride_e
            ddt_at -= CHUNK * stride_e
            at_n -= CHUNK * stride_n
            if z is not None:
                z_at -= CHUNK * stride_z
                dz_at -= CHUNK * stride_e
        tl.debug_barrier()
        segment += 1
        k += tl.where(segment == segments, 1, 0)
        segment = tl.where(segment == segments, 0, segment)

    tl.store(dA + program * share + a_pointers, dA_sum, mask=mask_a)
    if D is not None:
        tl.store(dD + program * share + e, dD_sum, mask=mask_e)
    if dbias is not None:
        tl.store(dbias + program * share + e, dbias_sum, mask=mask_e)
