"""The gate silu(z) and its gradient from the gated results.

A mixer keeps the results of its passes after the gate, y = x silu(z), where the gradient of z needs
x. It is had back as y / silu(z), so that nothing more is kept and the scans of the backward need
not form their sums again: dz = dy x silu'(z) = dy y (1 + z (1 - sigmoid(z))) / z. For that the gate
is never exactly zero: the forward takes z of less than `least_gate` in size for `least_gate`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .scan import nonzero_gate, sigmoid


def least_gate(dtype: torch.dtype) -> float:
    """Where |z| is less than this, the gate is taken there: small, yet y keeps its precision."""
    return 2.0**-14 if dtype == torch.float16 else 2.0**-66


@triton.jit
def gate_gradient(product, z):
    """dz from the sum of dy y over all y = x silu(z)."""
    return product * ((1.0 + z * (1.0 - sigmoid(z))) / z)


@triton.jit(do_not_specialize=["tokens"])
def gate_kernel(
    dy, z, out, tokens, E, z_stride, scale,
    LEAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out = dy silu(z) scale, (tokens, E)."""
    local = tl.arange(0, BLOCK_T)
    start = tl.program_id(0) * BLOCK_T
    first = tl.program_id(1) * BLOCK_E
    lane = tl.arange(0, BLOCK_E)
    mask = (start + local < tokens)[:, None] & (first + lane < E)[None, :]
    row = tl.program_id(0).to(tl.int64) * BLOCK_T
    tile = local[:, None] * E + lane[None, :]
    gate = tl.load(
        (z + row * z_stride + first) + (local[:, None] * z_stride + lane[None, :]), mask, 1.0
    )
    gate = nonzero_gate(gate, LEAST)
    value = tl.load((dy + row * E + first) + tile, mask, 0.0).to(tl.float32)
    value *= gate * sigmoid(gate) * scale
    tl.store((out + row * E + first) + tile, value.to(out.dtype.element_ty), mask)
