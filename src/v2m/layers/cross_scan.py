"""The token mixer of VMamba: four 1-D selective scans over the flattened grid."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v2m.ops import selective_scan

from .grid_conv import GridConv2d
from .two_pass import decay_rates, init_dt_, init_state_

__all__ = ["CrossScan2d"]

ROUTES = 4  # along the rows, along the columns, and both backwards


class CrossScan2d(nn.Module):
    """VMamba's SS2D (arXiv 2401.10166, `forward_type="v05_noz"`), (B, H, W, D) -> (B, H, W, D).

    in_proj, depthwise 3x3 convolution, SiLU; then the grid flattened row by row and column by
    column, each scanned forwards and backwards with weights of its own; the four results on the
    pixels they came from, summed; LayerNorm, out_proj. There is no gate. Names and numbers of the
    published code.

    Args:
        dim: width D of the tokens.
        d_state: state size N per channel.
        expand: inner width E = expand * D.
        dt_rank: rank R of the step-size projection; None for ceil(D / 16).
    """

    def __init__(
        self, dim: int, *, d_state: int = 1, expand: float = 1.0, dt_rank: int | None = None
    ):
        super().__init__()
        inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.dim = dim
        self.d_state = d_state
        self.dt_rank = rank
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.conv2d = GridConv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.x_proj_weight = nn.Parameter(torch.empty(ROUTES, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(ROUTES, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(ROUTES, inner))
        self.A_logs = nn.Parameter(torch.empty(ROUTES * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(ROUTES * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal 0.02 around the scans, Mamba's rules inside them."""
        for module in (self.conv2d, self.out_norm):
            module.reset_parameters()
        nn.init.trunc_normal_(self.in_proj.weight, std=0.02)
        nn.init.trunc_normal_(self.out_proj.weight, std=0.02)
        bound = self.x_proj_weight.shape[2] ** -0.5  # PyTorch's default for a linear layer
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_dt_(self.dt_projs_weight, self.dt_projs_bias)
        init_state_(self.A_logs, self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D)."""
        u = F.silu(self.conv2d(self.in_proj(x)))  # (B, H, W, E)
        by_rows = self._both_ways(u, 0)
        by_columns = self._both_ways(u.transpose(1, 2).contiguous(), 1).transpose(1, 2)
        return self.out_proj(self.out_norm(by_rows + by_columns.contiguous()))

    def _both_ways(self, grid: Tensor, route: int) -> Tensor:
        """The sum of one route and of its reverse, which is two further on, (B, H, W, E)."""
        line = grid.flatten(1, 2).unsqueeze(1)  # (B, 1, L, E)
        y = self._scan(line, route, reverse=False) + self._scan(line, route + 2, reverse=True)
        return y.squeeze(1).unflatten(1, grid.shape[1:3])

    def _scan(self, line: Tensor, route: int, *, reverse: bool) -> Tensor:
        """One scan along the line with the weights of its route, (B, 1, L, E)."""
        projected = F.linear(line, self.x_proj_weight[route].to(line.dtype))
        low_rank, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return selective_scan(
            line,
            F.linear(low_rank, self.dt_projs_weight[route].to(line.dtype)),
            decay_rates(self.A_logs.chunk(ROUTES)[route]),
            B,
            C,
            self.Ds.chunk(ROUTES)[route],
            dt_bias=self.dt_projs_bias[route],
            axis=2,
            reverse=reverse,
        )

    def multiply_adds(self, tokens: int) -> int:
        """Of one forward pass over `tokens` tokens; see `v2m.models.table`."""
        layers = (self.in_proj.weight, self.conv2d.weight, self.x_proj_weight, self.dt_projs_weight)
        weights = sum(weight.numel() for weight in layers) + self.out_proj.weight.numel()
        return tokens * (weights + 2 * self.A_logs.numel())

    def extra_repr(self) -> str:
        return f"dim={self.dim}, d_state={self.d_state}"
