"""The 2-D token mixer of the hierarchical models: no gate, a 3x3 convolution before the scans."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from v2m.errors import InputError
from v2m.ops.core import mixer_core

from .directions import get_scan
from .grid_conv import GridConv2d
from .two_pass import TwoPass

__all__ = ["UngatedMixer2d"]


class UngatedMixer2d(TwoPass):
    """VMamba's ungated block (`v05_noz`) around V2M's 2-D scan, (B, H, W, D) -> (B, H, W, D).

    in_proj, depthwise 3x3 convolution, SiLU, the two scans from every corner with one set of
    weights and neither gate nor causal convolutions, LayerNorm, out_proj. No code of V2M-S* and B*
    was ever published; this is their description (arXiv 2410.10382, section 4: VMamba with its scan
    replaced by the 2-D one). Names as in VMamba and V2M.

    Args:
        dim: width D of the tokens.
        d_state: state size N per channel.
        expand: inner width E = expand * D.
        dt_rank: rank R of the step-size projection; None for ceil(D / 16).
        scan: a name from `v2m.layers.SCANS`.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 1,
        expand: float = 1.0,
        dt_rank: int | None = None,
        scan: str = "corners",
    ):
        inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        super().__init__(inner, rank, d_state, d_conv=(0, 0))
        self.dim = dim
        self.d_state = d_state
        self.scan = scan
        self.directions, self.transpose = get_scan(scan)
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.conv2d = GridConv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As VMamba: truncated normal 0.02 around the scans, Mamba's rules inside them."""
        super().reset_parameters()
        nn.init.trunc_normal_(self.in_proj.weight, std=0.02)
        nn.init.trunc_normal_(self.out_proj.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D).

        Raises:
            InputError: a grid that is not square with scan="release".
        """
        if self.transpose and x.shape[1] != x.shape[2]:
            raise InputError(
                f'scan="release" needs a square grid; got {x.shape[1]} x {x.shape[2]} tokens. Use'
                ' square images, or scan="corners", which takes any size.'
            )
        u = F.silu(self.conv2d(self.in_proj(x)))  # (B, H, W, E)
        first, second = self.pass_weights(""), self.pass_weights("_2")
        y = mixer_core(u, None, first, second, self.directions, transpose=self.transpose)
        return self.out_proj(self.out_norm(y))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, d_state={self.d_state}, scan={self.scan!r}"
