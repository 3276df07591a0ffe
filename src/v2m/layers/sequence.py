"""The token mixer of Vim: selective scans of a 1-D sequence, forward and backward."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from v2m.ops import selective_scan
from v2m.ops.core import causal_conv

from .two_pass import decay_rates, init_dt_, init_state_

__all__ = ["BidirectionalMixer"]


class BidirectionalMixer(nn.Module):
    """Vim's mixer (arXiv 2401.09417), (B, 1, L, D) -> (B, 1, L, D).

    A Mamba mixer along the sequence and another one, with weights of its own (`_b`), against it;
    the gate is common, and so are `in_proj` and `out_proj`, on half the sum of the two. Names and
    numbers of the published code, `mamba_simple.py` with bimamba_type="v2" and if_divide_out.

    Args:
        dim: width D of the tokens.
        d_state: state size N per channel.
        d_conv: taps of the causal depthwise convolution.
        expand: inner width E = expand * D.
        dt_rank: rank R of the step-size projection; None for ceil(D / 16).
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
    ):
        super().__init__()
        inner = expand * dim
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.dim = dim
        self.d_state = d_state
        self.dt_rank = rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        for suffix in ("", "_b"):
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(rank, inner))
            self.register_parameter(f"A{suffix}_log", nn.Parameter(torch.empty(inner, d_state)))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.empty(inner)))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's initialisation in both senses."""
        for module in self.children():
            module.reset_parameters()
        for suffix in ("", "_b"):
            init_state_(getattr(self, f"A{suffix}_log"), getattr(self, f"D{suffix}"))
            dt_proj = self.get_submodule(f"dt_proj{suffix}")
            init_dt_(dt_proj.weight, dt_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, L, D) -> (B, 1, L, D)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, 1, L, E) each
        y = self._scan(u, z, "", reverse=False) + self._scan(u, z, "_b", reverse=True)
        return self.out_proj(y / 2)

    def _scan(self, u: Tensor, z: Tensor, suffix: str, *, reverse: bool) -> Tensor:
        """One sense of the sequence, (B, 1, L, E)."""
        conv, dt_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"dt_proj{suffix}")
        u = F.silu(causal_conv(u, conv.weight.squeeze(1), conv.bias, 2, reverse)).to(z.dtype)
        low_rank, B, C = getattr(self, f"x_proj{suffix}")(u).split(
            [self.dt_rank, self.d_state, self.d_state], dim=-1
        )  # (B, 1, L, R), (B, 1, L, N) twice
        return selective_scan(
            u,
            F.linear(low_rank, dt_proj.weight),
            decay_rates(getattr(self, f"A{suffix}_log")),
            B,
            C,
            getattr(self, f"D{suffix}"),
            z,
            dt_bias=dt_proj.bias,
            axis=2,
            reverse=reverse,
        )

    def multiply_adds(self, tokens: int) -> int:
        """Of one forward pass over `tokens` tokens; see `v2m.models.table`."""
        scans = sum(
            module.weight.numel()
            for suffix in ("", "_b")
            for module in map(
                self.get_submodule, (f"conv1d{suffix}", f"x_proj{suffix}", f"dt_proj{suffix}")
            )
        )
        states = 2 * (self.A_log.numel() + self.A_b_log.numel())
        return tokens * (
            self.in_proj.weight.numel() + self.out_proj.weight.numel() + scans + states
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, d_state={self.d_state}"
