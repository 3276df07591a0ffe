"""Pre-norm residual block around a mixer, and its norm."""

import torch
from torch import Tensor, nn

from v2m.ops.rms_norm import rms_norm

__all__ = ["Block", "RMSNorm"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in at least float32.

    The result has the dtype of the weight, so that a residual in float32 enters a layer in the
    precision of its parameters. With `lower` it has autocast's type, where that is on: what a
    linear layer behind it would turn it into.
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, lower: bool = False):
        super().__init__()
        self.eps = eps
        self.lower = lower
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        dtype, device = self.weight.dtype, x.device.type
        lowered = self.lower and dtype != torch.float64 and not x.is_meta
        if lowered and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return rms_norm(x, self.weight, self.eps, dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Block(nn.Module):
    """residual + drop_path(mixer(norm(residual))); the residual keeps its dtype, float32."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, drop_path: nn.Module):
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = drop_path

    def forward(self, residual: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        return residual + self.drop_path(self.mixer(self.norm(residual)))
