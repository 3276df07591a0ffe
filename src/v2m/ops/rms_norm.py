"""Root-mean-square norm: PyTorch's, or the Triton backend's with its much faster backward."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import choose_backend

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in at least float32.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean.
        dtype: of the result; None for that of the weight.
    """
    dtype = weight.dtype if dtype is None else dtype
    # torch.compile merges PyTorch's with what stands around it.
    if choose_backend(None, x) == "triton" and not torch.compiler.is_compiling():
        from .library import rms_norm as fused

        return fused(x, weight, eps, dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(dtype)
