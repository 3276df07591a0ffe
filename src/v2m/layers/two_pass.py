"""The parameters of the two selective scans of a V2M mixer, and their initialisation."""

import math

import torch
from torch import Tensor, nn

from v2m.ops.core import PassWeights, distinct_sweeps

__all__ = ["TwoPass", "decay_rates", "init_dt_", "init_state_"]


class TwoPass(nn.Module):
    """Pass 1 along one axis and pass 2 along the other, each with weights of its own.

    Parameters carry their published names: `conv1d, x_proj, dt_proj, A_log, D`, and for pass 2 the
    same with `_2`. A mixer derives from this and adds what stands around the scans.

    Args:
        inner: width E of the scans.
        rank: rank R of the step-size projection.
        d_state: state size N per channel.
        d_conv: taps of the causal convolution of pass 1 and pass 2, 0 for a pass without one.
        skips: whether pass 1 and pass 2 have a skip vector D.
    """

    def __init__(
        self,
        inner: int,
        rank: int,
        d_state: int,
        *,
        d_conv: tuple[int, int],
        skips: tuple[bool, bool] = (True, True),
    ):
        super().__init__()
        for suffix, taps, skip in zip(("", "_2"), d_conv, skips):
            if taps:
                conv = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
                self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, rank + d_state, bias=False))
            self.add_module(f"dt_proj{suffix}", nn.Linear(rank, inner))
            self.register_parameter(f"A{suffix}_log", nn.Parameter(torch.empty(inner, d_state)))
            if skip:
                self.register_parameter(f"D{suffix}", nn.Parameter(torch.empty(inner)))

    def reset_parameters(self) -> None:
        """Mamba's initialisation on both passes (the published code forgets pass 2's dt bias)."""
        for module in self.children():
            module.reset_parameters()
        for suffix in ("", "_2"):
            init_state_(self.get_parameter(f"A{suffix}_log"), getattr(self, f"D{suffix}", None))
            dt_proj = self.get_submodule(f"dt_proj{suffix}")
            init_dt_(dt_proj.weight, dt_proj.bias)

    def pass_weights(self, suffix: str) -> PassWeights:
        """The parameters of pass 1 (suffix "") or pass 2 ("_2") as the operator takes them."""
        conv, dt_proj = getattr(self, f"conv1d{suffix}", None), getattr(self, f"dt_proj{suffix}")
        return PassWeights(
            None if conv is None else conv.weight.squeeze(1),
            None if conv is None else conv.bias,
            getattr(self, f"x_proj{suffix}").weight,
            dt_proj.weight,
            dt_proj.bias,
            getattr(self, f"A{suffix}_log"),
            getattr(self, f"D{suffix}", None),
        )

    def multiply_adds(self, tokens: int) -> int:
        """Of one forward pass over `tokens` tokens: every linear layer and convolution, and two per
        state, channel and scan. Directions that share their first scan run it once.
        """
        return tokens * self._multiply_adds_per_token(len(distinct_sweeps(self.directions)))

    def _multiply_adds_per_token(self, first_scans: int) -> int:
        around = (self.in_proj, self.out_proj, getattr(self, "conv2d", None))
        per_token = sum(module.weight.numel() for module in around if module is not None)
        for suffix, scans in (("", first_scans), ("_2", len(self.directions))):
            weights = self.pass_weights(suffix)
            layers = (weights.conv_weight, weights.x_proj, weights.dt_proj)
            per_scan = sum(weight.numel() for weight in layers if weight is not None)
            per_token += scans * (per_scan + 2 * weights.A_log.numel())
        return per_token


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) in at least float32."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


@torch.no_grad()
def init_state_(A_log: Tensor, D: Tensor | None) -> None:
    """A_log (..., N) = log(1..N), D = 1."""
    steps = torch.arange(1, A_log.shape[-1] + 1, dtype=A_log.dtype, device=A_log.device)
    A_log.copy_(steps.log().expand_as(A_log))
    if D is not None:
        D.fill_(1.0)


@torch.no_grad()
def init_dt_(
    weight: Tensor, bias: Tensor, *, smallest: float = 1e-3, largest: float = 1e-1
) -> None:
    """softplus(bias) log-uniform in [smallest, largest]; weight (..., R) uniform in +-R^-0.5."""
    bound = weight.shape[-1] ** -0.5
    weight.uniform_(-bound, bound)
    dt = torch.empty_like(bias).uniform_(math.log(smallest), math.log(largest)).exp()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
