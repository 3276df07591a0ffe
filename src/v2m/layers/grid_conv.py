"""A 2-D convolution of a channels-last grid."""

from torch import Tensor, nn

__all__ = ["GridConv2d"]


class GridConv2d(nn.Conv2d):
    """`nn.Conv2d`, (B, H, W, C) -> (B, H', W', C').

    The permutation around it is a change of strides: PyTorch's convolutions run on the channels
    -last layout as it is.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
