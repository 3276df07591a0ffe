"""The core of a V2M mixer, one call a layer: what lies between `in_proj` and `out_proj`.

Two selective scans in sequence, along the rows and then along the columns (arXiv 2410.10382), from
several starting points that share one set of weights, summed. A compiled backend runs the whole of
it as one operator; the composition below, on top of the plain scans, says what it has to compute.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from v2m.errors import InputError

from . import eager, reference
from .backend import choose_backend, is_exporting

__all__ = ["Direction", "PassWeights", "Sweep", "causal_conv", "distinct_sweeps", "mixer_core"]


class PassWeights(NamedTuple):
    """The parameters of one pass. E inner width, N state size, R rank of dt.

    A pass without a convolution (both its tensors None) scans what it is given, with no silu.
    """

    conv_weight: Tensor | None  # (E, width): causal depthwise taps, the last on the current token
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (R + N, E): the low-rank dt, then B (first pass) or C (second pass)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A_log: Tensor  # (E, N), A = -exp(A_log)
    D: Tensor  # (E,)


class Sweep(NamedTuple):
    """One scan over a (B, H, W, E) grid."""

    axis: int  # 1: down the columns, along H; 2: along the rows, W
    reverse: bool = False
    window: int = 0  # the state restarts every `window` steps; 0: never


class Direction(NamedTuple):
    """A first and a second sweep, and the grid axes along which the result is mirrored."""

    first: Sweep
    second: Sweep
    mirror: tuple[int, ...] = ()


def distinct_sweeps(directions: tuple[Direction, ...]) -> tuple[Sweep, ...]:
    """The different first sweeps, in order of appearance: with shared weights, each runs once."""
    return tuple(dict.fromkeys(direction.first for direction in directions))


def mixer_core(
    u: Tensor,
    z: Tensor | None,
    first: PassWeights,
    second: PassWeights,
    directions: tuple[Direction, ...],
    *,
    transpose: bool = False,
    backend: str | None = None,
) -> Tensor:
    """2 / K times the sum over the K directions of the second pass over the first.

    u, z: (B, H, W, E), the two halves of `in_proj`; z is None where there is no gate. Returns
    (B, H, W, E) in the dtype of u, or (B, W, H, E) with `transpose`, which the published code's
    misalignment needs.

    Raises:
        InputError (a ValueError): shapes that do not fit, or a backend that cannot do it.
    """
    _check(u, z, first, second)
    name = choose_backend(backend, u)
    if name == "eager" and is_exporting():
        from .exported import compose  # fewer and larger loops

        y = compose(u, z, first, second, directions)
    elif name in ("reference", "eager"):
        scan = reference.selective_scan if name == "reference" else eager.selective_scan
        y = _compose(scan, u, z, first, second, directions)
    else:
        from . import library  # registers the compiled operators, so only where one is wanted

        if z is None and first.conv_weight is None and second.conv_weight is None:
            y = library.ungated_core(u, first, second, directions, name)
        elif z is None or first.conv_weight is None or second.conv_weight is None:
            scan = partial(_compiled_scan, library.selective_scan, name)
            y = _compose(scan, u, z, first, second, directions)
        else:
            y = library.mixer_core(u, z, first, second, directions, name)
    return y.transpose(1, 2) if transpose else y


def _check(u: Tensor, z: Tensor | None, first: PassWeights, second: PassWeights) -> None:
    """The kernels take shapes at their word and addresses from them."""
    if u.dim() != 4 or (z is not None and z.shape != u.shape):
        got = tuple(u.shape) if z is None else f"{tuple(u.shape)} and {tuple(z.shape)}"
        raise InputError(f"`u` and `z` must both be (B, H, W, E); got {got}.")
    channels = u.shape[-1]
    for which, weights in (("first", first), ("second", second)):
        width = 0 if weights.conv_weight is None else weights.conv_weight.shape[-1]
        rank, states = weights.dt_proj.shape[-1], weights.A_log.shape[-1]
        wanted = PassWeights(
            (channels, width), (channels,), (rank + states, channels), (channels, rank),
            (channels,), (channels, states), (channels,),
        )  # fmt: skip
        for name, tensor, shape in zip(PassWeights._fields, weights, wanted):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise InputError(
                    f"`{name}` of the {which} pass must be of shape {shape}; got"
                    f" {tuple(tensor.shape)}."
                )


def _compiled_scan(scan, name, *arguments):
    return scan(*arguments, name)


def _compose(scan, u, z, first, second, directions):
    """The definition of `mixer_core` for a backend that has only a scan."""
    handed_over, inputs = {}, {}
    for sweep in distinct_sweeps(directions):
        # Without a convolution, what enters the scan does not depend on the sweep.
        order = None if first.conv_weight is None else sweep[:2]
        if order not in inputs:
            inputs[order] = pass_inputs(u, first, sweep)
        y = one_pass(scan, inputs[order], z, first, sweep, is_first=True)
        handed_over[sweep] = y.to(u.dtype)
    total, inputs = None, {}
    for start, sweep, mirror in directions:
        order = start, None if second.conv_weight is None else sweep[:2]
        if order not in inputs:
            inputs[order] = pass_inputs(handed_over[start], second, sweep)
        y = one_pass(scan, inputs[order], z, second, sweep, is_first=False)
        y = y.flip(mirror) if mirror else y
        total = y if total is None else total + y  # in the dtype of the state
    return (total * (2 / len(directions))).to(u.dtype)


def pass_inputs(u, weights, sweep):
    """What one sweep scans, its step sizes, and its B or C: convolution and projections."""
    if weights.conv_weight is not None:
        u = F.silu(causal_conv(u, weights.conv_weight, weights.conv_bias, *sweep[:2])).to(u.dtype)
    rank = weights.dt_proj.shape[1]
    low_rank, B_or_C = F.linear(u, weights.x_proj.to(u.dtype)).split(
        [rank, weights.x_proj.shape[0] - rank], dim=-1
    )  # (B, H, W, R), (B, H, W, N)
    return u, F.linear(low_rank, weights.dt_proj.to(u.dtype)), B_or_C


def one_pass(scan, inputs, z, weights, sweep, *, is_first):
    """Scan, skip and gate of one sweep, in the dtype of the state."""
    u, dt, B_or_C = inputs
    A = -torch.exp(weights.A_log.to(torch.promote_types(u.dtype, torch.float32)))
    B, C = (B_or_C, None) if is_first else (None, B_or_C)
    axis, reverse, window = sweep
    return scan(u, dt, A, B, C, weights.D, z, weights.dt_bias, True, axis, reverse, window or None)


def causal_conv(u: Tensor, weight: Tensor, bias: Tensor, axis: int, reverse: bool) -> Tensor:
    """Depthwise convolution along one axis, causal in scan order, zeros before the first token.

    u: (B, H, W, E), weight: (E, width) with the last tap on the current token, bias: (E,).
    Returns (B, H, W, E) in at least float32.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, weight = u.to(dtype), weight.to(dtype)
    length, width = u.shape[axis], weight.shape[1]
    before = (0, width - 1) if reverse else (width - 1, 0)
    padding = (0, 0, *before) if axis == 2 else (0, 0, 0, 0, *before)
    padded = F.pad(u, padding)
    y = bias.to(dtype)
    for tap in range(width):
        start = width - 1 - tap if reverse else tap
        y = y + padded.narrow(axis, start, length) * weight[:, tap]
    return y
