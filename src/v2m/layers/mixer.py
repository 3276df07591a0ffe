"""The V2M token mixer: two selective scans in sequence, from every corner of the grid."""

import math

from torch import Tensor, nn

from v2m.errors import InputError
from v2m.ops.core import Direction, mixer_core
from v2m.ops.full_state import full_state_core

from .channel_gate import ChannelGate
from .directions import Scan, get_scan, in_windows
from .two_pass import TwoPass

__all__ = ["HAND_OVERS", "Mixer2d"]

HAND_OVERS = ("sum", "state")


class Mixer2d(TwoPass):
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
        windows: for each direction of the scan the width of the windows in which its state lives,
            0 for the whole grid; None for the whole grid in all.
        channel_gate: pass each direction through a gate over its channels before the sum; the
            directions over the whole grid share one gate, those in windows another.
        hand_over: "sum", the published mixer, hands one number per channel from pass 1 to pass 2;
            "state" hands over all N states, the reduced Roesser model itself (see
            `v2m.ops.full_state`), and has neither a second convolution nor a second skip.
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
        windows: tuple[int, ...] | None = None,
        channel_gate: bool = False,
        hand_over: str = "sum",
    ):
        if hand_over not in HAND_OVERS:
            raise InputError(
                f"`hand_over` must be one of {', '.join(HAND_OVERS)}; got {hand_over!r}."
            )
        inner = expand * dim
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        whole_state = hand_over == "state"
        super().__init__(
            inner,
            rank,
            d_state,
            d_conv=(d_conv, 0 if whole_state else d_conv),
            skips=(True, not whole_state),
        )
        self.dim = dim
        self.d_state = d_state
        self.scan = scan
        self.windows = windows
        self.hand_over = hand_over
        self.directions, self.transpose = _windowed(get_scan(scan), windows)

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.channel_gate = channel_gate
        for name in sorted({_gate_of(d) for d in self.directions}) if channel_gate else ():
            self.add_module(name, ChannelGate(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

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
        return self.out_proj(self._merge(u, z))

    def _merge(self, u: Tensor, z: Tensor) -> Tensor:
        """The directions of the core, summed or gated and summed, (B, H, W, E)."""
        core = mixer_core if self.hand_over == "sum" else full_state_core
        weights = self.pass_weights(""), self.pass_weights("_2")
        if not self.channel_gate:
            return core(u, z, *weights, self.directions, transpose=self.transpose)
        total = None
        for direction in self.directions:
            y = core(u, z, *weights, (direction,), transpose=self.transpose)
            y = getattr(self, _gate_of(direction))(y)
            total = y if total is None else total + y
        return total / len(self.directions)  # one direction alone is doubled already

    def multiply_adds(self, tokens: int) -> int:
        """As `TwoPass.multiply_adds`; gated directions run one by one and share no scan."""
        if not self.channel_gate:
            return super().multiply_adds(tokens)
        gates = sum(getattr(self, _gate_of(d)).multiply_adds for d in self.directions)
        return tokens * self._multiply_adds_per_token(len(self.directions)) + gates

    def extra_repr(self) -> str:
        windows = "" if self.windows is None else f", windows={self.windows}"
        return f"dim={self.dim}, d_state={self.d_state}, scan={self.scan!r}{windows}"


def _gate_of(direction: Direction) -> str:
    """The gate a direction goes through: none is there that no direction needs."""
    return "window_gate" if direction.first.window else "gate"


def _windowed(scan: Scan, windows: tuple[int, ...] | None) -> Scan:
    """The scan with a window on each of its directions."""
    if windows is None:
        return scan
    if len(windows) != len(scan.directions):
        raise InputError(
            f"`windows` must have one width for each of the {len(scan.directions)} directions of"
            f" the scan, 0 for the whole grid; got {tuple(windows)}."
        )
    directions = map(in_windows, scan.directions, windows)
    return Scan(tuple(directions), scan.transpose)
