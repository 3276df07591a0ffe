"""Root-mean-square norm over the channels, forward and backward, a tile of tokens at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .finish import Shares, finish
from .launch import on_device, padded, processors

_ELEMENTS = 4096  # of a tile


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(
    x, weight, y, scales, tokens, D, eps, BLOCK_T: tl.constexpr, PADDED_D: tl.constexpr
):
    """y = x scale weight, (tokens, D); scales: 1 / sqrt(mean(x^2) + eps), (tokens,)."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, PADDED_D)
    mask = (t < tokens)[:, None] & (d < D)[None, :]
    at = t[:, None] * D + d[None, :]
    value = tl.load(x + at, mask, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / D + eps)
    w = tl.load(weight + d, d < D, 0.0).to(tl.float32)
    tl.store(y + at, (value * scale[:, None] * w[None, :]).to(y.dtype.element_ty), mask)
    tl.store(scales + t, scale, t < tokens)


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_backward_kernel(
    dy, x, weight, scales, dx, partial, tokens, D, BLOCK_T: tl.constexpr, PADDED_D: tl.constexpr
):
    """dx = scale (g - v mean(g v)), with v = x scale and g = dy weight; partial: (programs, D),
    one program's share of the gradient of the weight, the sum of dy v."""
    local = tl.arange(0, BLOCK_T)
    d = tl.arange(0, PADDED_D)
    w = tl.load(weight + d, d < D, 0.0).to(tl.float32)
    share = tl.zeros([BLOCK_T, PADDED_D], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        t = tl.cast(tile, tl.int64) * BLOCK_T + local
        mask = (t < tokens)[:, None] & (d < D)[None, :]
        at = t[:, None] * D + d[None, :]
        gradient = tl.load(dy + at, mask, 0.0).to(tl.float32)
        scale = tl.load(scales + t, t < tokens, 0.0)[:, None]
        unit = tl.load(x + at, mask, 0.0).to(tl.float32) * scale
        share += gradient * unit
        gradient *= w[None, :]
        mean = tl.sum(gradient * unit, axis=1) / D
        tl.store(dx + at, (scale * (gradient - unit * mean[:, None])).to(dx.dtype.element_ty), mask)
    tl.store(partial + tl.program_id(0) * D + d, tl.sum(share, axis=0), d < D)


def _tile(channels: int) -> dict[str, int]:
    width = padded(channels)
    return {"BLOCK_T": max(1, _ELEMENTS // width), "PADDED_D": width, "num_warps": 4}


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype):
    """The norm over the last dimension, in dtype, and the scale of each token in float32."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        tile = _tile(x.shape[-1])
        with on_device(x):
            rms_norm_kernel[(triton.cdiv(scales.numel(), tile["BLOCK_T"]),)](
                x, weight.contiguous(), y, scales, scales.numel(), x.shape[-1], eps, **tile
            )
    return y, scales


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scales: Tensor):
    """Gradients of x and of the weight."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight)
    channels, tile = x.shape[-1], _tile(x.shape[-1])
    programs = min(triton.cdiv(scales.numel(), tile["BLOCK_T"]), 4 * processors(x.device))
    partial = torch.empty(programs, 1, channels, dtype=torch.float32, device=x.device)
    with on_device(x):
        rms_norm_backward_kernel[(programs,)](
            dy, x, weight.contiguous(), scales, dx, partial, scales.numel(), channels, **tile
        )
        ((_, dweight),) = finish(Shares(partial))
    return dx, dweight.view(channels).to(weight.dtype)
