"""A gate over channels, decided from the mean of a feature map."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ChannelGate"]


class ChannelGate(nn.Module):
    """x * sigmoid(expand(gelu(reduce(mean over the tokens of norm(x))))), (B, H, W, E).

    The gate with which LocalMamba (arXiv 2403.09338) merges its directions, without its unused
    spatial half.

    Args:
        channels: E.
        reduction: the gate's inner width is E / reduction.
    """

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.multiply_adds = 2 * channels * hidden  # whatever the number of tokens
        self.norm = nn.LayerNorm(channels)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def reset_parameters(self) -> None:
        """PyTorch's default weights, zero biases: every channel starts half open."""
        for module in self.children():
            module.reset_parameters()
        nn.init.zeros_(self.reduce.bias)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norm(x).mean(dim=(1, 2), keepdim=True)  # (B, 1, 1, E)
        return x * torch.sigmoid(self.expand(F.gelu(self.reduce(mean)))).to(x.dtype)
