"""The V2M token mixer: two selective scans in sequence, from every corner of the grid."""

import math

import torch
from torch import Tensor, nn

from v2m.errors import InputError
from v2m.ops.core import PassWeights, mixer_core

from .directions import get_scan

__all__ = ["Mixer2d"]


class Mixer2d(nn.Module):
    """2-D selective state-space mixer (V2M, arXiv 2410.10382), (B, H, W, D) -> (B, H, W, D).

    `in_proj` gives u and the gate z; pass 1 scans u along the first axis of a direction (C is the
    constant 1), pass 2 scans the result along the other one (B is the constant 1); the K directions
    share all weights, and their sum, scaled by 2 / K, goes through `out_proj`. Parameters carry
    their published names: pass 1 `conv1d, x_proj, dt_proj, A_log, D`, pass 2 the same with `_2`.

    Args:
        dim: width D of the tokens.
        d_state: state size N per channel.
        d_conv: taps of the causal depthwise convolution.
        expand: inner width E = expand * D.
        dt_rank: rank R of the step-size projection; None for ceil(D / 16).
        scan: a name from `v2m.layers.SCANS`.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        scan: str = "corners",
    ):
        super().__init__()
        inner = expand * dim
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.dim = dim
        self.d_state = d_state
        self.scan = scan
        self.directions, self.transpose = get_scan(scan)

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        for suffix in ("", "_2"):
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, rank + d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(rank, inner))
            self.register_parameter(f"A{suffix}_log", nn.Parameter(torch.empty(inner, d_state)))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.empty(inner)))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's initialisation on both passes (the published code forgets pass 2's dt bias)."""
        for module in self.children():
            module.reset_parameters()
        for suffix in ("", "_2"):
            A_log, D = self.get_parameter(f"A{suffix}_log"), self.get_parameter(f"D{suffix}")
            with torch.no_grad():
                steps = torch.arange(1, A_log.shape[1] + 1, dtype=A_log.dtype, device=A_log.device)
                A_log.copy_(steps.log().expand_as(A_log))
                D.fill_(1.0)
            _init_dt(self.get_submodule(f"dt_proj{suffix}"))

    def pass_weights(self, suffix: str) -> PassWeights:
        """The parameters of pass 1 (suffix "") or pass 2 ("_2") as the operator takes them."""
        conv, x_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"x_proj{suffix}")
        dt_proj = getattr(self, f"dt_proj{suffix}")
        return PassWeights(
            conv.weight.squeeze(1),
            conv.bias,
            x_proj.weight,
            dt_proj.weight,
            dt_proj.bias,
            getattr(self, f"A{suffix}_log"),
            getattr(self, f"D{suffix}"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) -> (B, H, W, D).

        Raises:
            InputError: a grid that is not square with scan="release".
        """
        if self.transpose and x.shape[1] != x.shape[2]:
            raise InputError(
                f'scan="release" needs a square grid, since the published code adds a transposed'
                f" result to its input; got {x.shape[1]} x {x.shape[2]} tokens. Use square images,"
                ' or scan="corners", which takes any size.'
            )
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, H, W, E) each
        first, second = self.pass_weights(""), self.pass_weights("_2")
        y = mixer_core(u, z, first, second, self.directions, transpose=self.transpose)
        return self.out_proj(y)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, d_state={self.d_state}, scan={self.scan!r}"


def _init_dt(dt_proj: nn.Linear, smallest: float = 1e-3, largest: float = 1e-1) -> None:
    """softplus(bias) log-uniform in [smallest, largest]; weights uniform in +-R^-0.5."""
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    with torch.no_grad():
        dt = torch.empty_like(dt_proj.bias).uniform_(math.log(smallest), math.log(largest)).exp()
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
