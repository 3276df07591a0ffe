"""What Python hands to a kernel: a table of 64-bit integers, by slot, and one more table per sweep.

Addresses are in bytes, sizes in elements. The kernels read slots with `load_int(job + 8 * SLOT)`;
SCALE and ONE are fp32 numbers in the lower halves of their slots.
"""

from __future__ import annotations

from .vector import LANES

FLOAT = 4  # bytes of an fp32 number
VECTOR = FLOAT * LANES  # bytes of a vector
TOKENS_AT_ONCE = 8  # tokens that share a load of x_proj's weights
CHUNK = 32  # steps of a line that a forward kernel works on at once
SAVED_CHUNK = 256  # steps whose states a backward kernel keeps at once

# The job. Counters that the threads share come first.
(
    NEXT_TASK,
    NEXT_WORKER,
    TASKS,
    GROUPS,  # backward: groups of lines, each with its own sums of the weights' gradients
    SPLITS,  # parts of the channels that are tasks of their own; 1 where the channels are projected
    SCRATCH,  # address of the workers' memory
    SCRATCH_BYTES,  # of each worker
    SWEEPS,  # address of the table of sweeps
    SWEEP_COUNT,
    SWEEPS_PER_TASK,
    IMAGES,
    LINES,  # lines in the batch, of the sweep that has most
    IMAGE_TOKENS,
    CHANNELS,  # E, a multiple of LANES
    STATES,  # N
    RANK,  # R; 0 where dt is given
    COLUMNS,  # K, entries of a token's row: dt's low rank, B, C
    PADDED_COLUMNS,  # K rounded up to a multiple of LANES
    B_COLUMN,  # where B begins in a row; -1: B is the constant 1
    C_COLUMN,  # where C begins in a row; -1: C is the constant 1
    WIDTH,  # of the convolution; 0: no convolution and no projections, dt, B and C are given
    SOFTPLUS,
    BFLOAT16,  # the grids that are scanned and given dt are bfloat16, else fp32
    OUT_BFLOAT16,
    SCALE,  # factor of the result, fp32
    ONE,  # the number 1, fp32
    WEIGHTS,  # packed as `packing` says; where WIDTH is 0 without x_proj and dt_proj
    X_PROJ,  # x_proj once more, (E, padded columns)
    WEIGHT_SIZE,  # elements of WEIGHTS
    GRADIENTS,  # sums of the groups, (GROUPS, WEIGHT_SIZE)
    GATE,  # silu(z), fp32, (B, H, W, E); 0: no gate
    D_GATE,
    DT,  # given dt, (B, H, W, E), where WIDTH is 0
    D_DT,
    ROWS,  # given B and C, (B, H, W, K), where WIDTH is 0
    D_ROWS,  # (SPLITS, B, H, W, K)
    JOB_SLOTS,
) = range(37)

# One sweep.
(
    SOURCE,  # the grid that is scanned
    SOURCE_PITCH,  # elements from a token of it to the next
    OUT,  # its result
    D_SOURCE,
    D_OUT,
    LENGTH,  # steps of a line
    IMAGE_LINES,  # lines of one image
    LINE_STEP,  # tokens from a line to the next
    STEP,  # tokens from a position to the next
    REVERSE,
    WINDOW,  # LENGTH + 1 where the state never restarts
    MIRROR_LINES,  # the result lies on the line opposite
    MIRROR_STEPS,  # the result lies at the position opposite
    ADD_OUT,  # add to what OUT holds
    ADD_SOURCE,  # likewise D_SOURCE, and D_DT and D_ROWS where dt, B and C are given
    ADD_GATE,
    SWEEP_SLOTS,
) = range(17)
