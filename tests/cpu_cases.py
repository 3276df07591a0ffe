"""Small mixer cores for the tests of the CPU kernels."""

import torch

from v2m.ops.core import Direction, PassWeights, Sweep
from v2m.ops.cpu import core_backward, core_forward

NAMES = ("u", "z", *(f"{p}.{n}" for p in ("first", "second") for n in PassWeights._fields))


def corners(first_window: int = 0, second_window: int = 0) -> tuple[Direction, ...]:
    return tuple(
        Direction(Sweep(2, left, first_window), Sweep(1, up, second_window))
        for left in (False, True)
        for up in (False, True)
    )


RELEASE = (
    Direction(Sweep(2), Sweep(1)),
    Direction(Sweep(1), Sweep(2)),
    Direction(Sweep(2, True), Sweep(1), (1,)),
    Direction(Sweep(1, True), Sweep(2), (2,)),
)


def make_weights(inner: int, states: int, rank: int, width: int) -> PassWeights:
    """Decays from one that forgets at once to one that remembers a hundred steps."""
    rates = torch.linspace(-3, 2, states).expand(inner, states)
    return PassWeights(
        torch.randn(inner, width) / width**0.5,
        0.3 * torch.randn(inner),
        torch.randn(rank + states, inner) / inner**0.5,
        torch.randn(inner, rank) / rank**0.5,
        torch.randn(inner) - 2,
        rates + 0.1 * torch.randn(inner, states),
        torch.randn(inner),
    )


def make_case(batch, height, width, inner, states=4, rank=2, taps=4):
    grids = [torch.randn(batch, height, width, inner) for _ in range(3)]
    return (
        *grids,
        make_weights(inner, states, rank, taps),
        make_weights(inner, states, rank, taps),
    )


def by_kernels(u, z, dy, first, second, directions):
    """The same from the four functions of the backend."""
    y, y1 = core_forward(u, z, first, second, directions)
    du, dz, d_first, d_second = core_backward(dy, u, z, y1, first, second, directions)
    return {"y": y, **dict(zip(NAMES, (du, dz, *d_first, *d_second)))}
