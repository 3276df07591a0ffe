"""Resampling of a learnt position embedding to another grid."""

import torch
from torch import Tensor

__all__ = ["resample_grid", "resampling_weights"]


def resample_grid(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, H, W, D) -> (1, *size, D): bicubic with antialiasing, the numbers of `F.interpolate`.

    As two products with constant matrices, since the backward of `F.interpolate` neither compiles
    with dynamic sizes nor repeats bit for bit on a GPU, and knows neither float64 there nor MPS.
    In at least float32 inside, the dtype of the input outside.
    """
    dtype = torch.promote_types(grid.dtype, torch.float32)
    down, across = (
        resampling_weights(old, new, dtype, grid.device) for old, new in zip(grid.shape[1:3], size)
    )
    return torch.einsum("ih,bhwd,jw->bijd", down, grid.to(dtype), across).to(grid.dtype)


def resampling_weights(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(new, old): what each old position gives to each new one; rows sum to 1.

    Keys' cubic kernel with a = -1/2, stretched by the scale where it shrinks (PIL's antialiasing).
    """
    targets = torch.arange(new, dtype=dtype, device=device)
    scale = old / torch.ones_like(targets).sum()  # a tensor, so that `new` may be symbolic
    centres = (targets + 0.5) * scale
    positions = torch.arange(old, dtype=dtype, device=device) + 0.5
    x = ((positions - centres.unsqueeze(1)) / scale.clamp(min=1)).abs()  # (new, old)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)
