"""The registered operators, whatever backend is behind them: here the one for CPUs."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from triton_cases import DIRECTIONS, make_core
from v2m.errors import InputError
from v2m.ops import library, selective_scan
from v2m.ops.core import PassWeights, distinct_sweeps, mixer_core

pytest.importorskip("numba")
SHAPE, STATES, RANK = (1, 3, 4, 8), 2, 3


def scan_arguments():
    *grid, channels = SHAPE
    u, dt = (torch.randn(SHAPE, requires_grad=True) for _ in "ud")
    A = (-torch.rand(channels, STATES)).requires_grad_()
    B = torch.randn(*grid, STATES, requires_grad=True)
    return u, dt, A, B, None, None, None, None, True, 1, True, 2, "cpu"


def core_arguments():
    u, z, _, first, second = make_core(SHAPE, STATES, RANK, torch.float32, "cpu")
    grids = [x.detach().requires_grad_() for x in (u, z)]
    weights = [[x.requires_grad_() for x in weights] for weights in (first, second)]
    return (*grids, *weights, library._encode(DIRECTIONS["corners"]), "cpu")


def test_opcheck_of_the_scan():
    opcheck(torch.ops.v2m.selective_scan.default, scan_arguments())


def test_opcheck_of_the_core():
    opcheck(torch.ops.v2m.mixer_core.default, core_arguments())


@pytest.mark.parametrize("shape", [(1, 3, 4, 16), (1, 1, 1, 16), (2, 1, 3, 5)], ids=str)
@pytest.mark.parametrize("states", [1, 2])
def test_opcheck_of_the_gradients(shape, states):
    """Results that fill whole vectors could be views of one table: they must not share memory."""
    *grid, channels = shape
    dy, u, dt, z = (torch.randn(shape) for _ in range(4))
    B, C = (torch.randn(*grid, states) for _ in "BC")
    A, D, bias = -torch.rand(channels, states), torch.randn(channels), torch.randn(channels)
    rest = True, 1, True, 2, "cpu"
    opcheck(torch.ops.v2m.selective_scan_backward.default, (dy, u, dt, A, B, C, D, z, bias, *rest))
    opcheck(
        torch.ops.v2m.selective_scan_backward.default,
        (dy, u, dt, A, None, None, None, None, None, *rest),
    )
    u, z, _, first, second = make_core(shape, states, RANK, torch.float32, "cpu")
    rest = list(first), list(second), library._encode(DIRECTIONS["corners"]), "cpu"
    y, y1 = torch.ops.v2m.mixer_core(u, z, *rest)
    opcheck(torch.ops.v2m.mixer_core_backward.default, (dy, u, z, y, y1, *rest))
    rest = list(first[2:]), list(second[2:]), *rest[2:]
    opcheck(torch.ops.v2m.ungated_core.default, (u, *rest))
    _, y1 = torch.ops.v2m.ungated_core(u, *rest)
    opcheck(torch.ops.v2m.ungated_core_backward.default, (dy, u, y1, *rest))


@pytest.mark.parametrize("name", sorted(DIRECTIONS))
def test_directions_survive_the_schema(name):
    assert library._decode(library._encode(DIRECTIONS[name])) == DIRECTIONS[name]


def test_autocast_lowers_the_grids_and_leaves_the_weights():
    u, z, first, second, _, _ = core_arguments()
    directions = DIRECTIONS["corners"]
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer_core(u, z, PassWeights(*first), PassWeights(*second), directions, backend="cpu")
    assert y.dtype == torch.bfloat16
    low = mixer_core(
        u.bfloat16(), z.bfloat16(), PassWeights(*first), PassWeights(*second), directions,
        backend="cpu",
    )  # fmt: skip
    assert torch.equal(y, low)
    y.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in (u, z, *first))


def test_flops_of_the_scan_forward_and_backward():
    arguments = scan_arguments()
    states = arguments[0].numel() * STATES
    with FlopCounterMode(display=False) as counter:
        y = torch.ops.v2m.selective_scan(*arguments)
    assert counter.get_total_flops() == 4 * states
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 8 * states


def test_flops_of_the_core():
    *_, channels = SHAPE
    tokens = 12
    per_scan = tokens * channels * (4 + (RANK + STATES) + RANK + 2 * STATES)
    scans = len(distinct_sweeps(DIRECTIONS["corners"])) + 4
    with FlopCounterMode(display=False) as counter:
        torch.ops.v2m.mixer_core(*core_arguments())
    assert counter.get_total_flops() == 2 * scans * per_scan


def test_no_second_derivative():
    u = torch.randn(SHAPE, requires_grad=True)
    A = -torch.rand(SHAPE[-1], STATES)
    (du,) = torch.autograd.grad(
        selective_scan(u, u, A, axis=1, backend="cpu").sum(), u, create_graph=True
    )
    with pytest.raises(InputError, match="second derivative"):
        du.sum().backward()


def test_unknown_implementation():
    with pytest.raises(InputError, match="'cpu' or 'triton'"):
        torch.ops.v2m.selective_scan(*scan_arguments()[:-1], "metal")
