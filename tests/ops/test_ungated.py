"""The core without gate and convolutions as one operator: numbers, every gradient, memory."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import triton_cases
from triton_cases import CORNERS, DIRECTIONS, make_core
from v2m.ops.backend import is_available
from v2m.ops.core import PassWeights, mixer_core

pytestmark = pytest.mark.skipif(not is_available("cpu"), reason="numba is not installed")


def case(shape=(1, 3, 4, 8), states=2, rank=3):
    """u, and the weights of both passes without their convolutions."""
    u, _, _, *weights = make_core(shape, states, rank, torch.float32, "cpu")
    return u, *(PassWeights(None, None, *w[2:]) for w in weights)


@pytest.mark.parametrize("scan", sorted(DIRECTIONS))
@pytest.mark.parametrize("states", [1, 4])
def test_numbers_and_every_gradient(scan, states):
    shape = (2, 4, 4, 12) if scan == "release" else (2, 5, 3, 12)
    errors = triton_cases.ungated_errors(shape, states, 3, scan, backend="cpu")
    triton_cases.assert_accurate(errors)


def test_bfloat16():
    errors = triton_cases.ungated_errors(
        (2, 7, 6, 32), 1, 3, "corners", torch.bfloat16, backend="cpu"
    )
    triton_cases.assert_accurate(errors, trifle=1e-2)


def test_what_is_kept_for_the_backward():
    """The input, the two results of the first pass, and parameters: nothing else of any size."""
    u, first, second = case()
    kept = []
    leaf = u.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        mixer_core(leaf, None, first, second, CORNERS, backend="cpu")
    sizes = sorted(x.numel() for x in kept)
    parameters = [w.numel() for weights in (first, second) for w in weights[2:]]
    assert sizes == sorted([u.numel(), 2 * u.numel(), *parameters])


def test_autocast_lowers_the_grid_alone():
    u, first, second = case()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer_core(u, None, first, second, CORNERS, backend="cpu")
    assert y.dtype == torch.bfloat16
    wanted = mixer_core(u.bfloat16(), None, first, second, CORNERS, backend="cpu")
    assert torch.equal(y, wanted)


def test_opcheck():
    from v2m.ops import library

    u, *weights = case()
    lists = [[x.detach().requires_grad_() for x in w[2:]] for w in weights]
    encoded = library._encode(CORNERS)
    opcheck(torch.ops.v2m.ungated_core.default, (u.requires_grad_(), *lists, encoded, "cpu"))


def test_flops():
    u, first, second = case((1, 3, 4, 8), 2, 3)
    with FlopCounterMode(display=False) as counter:
        mixer_core(u, None, first, second, CORNERS, backend="cpu")
    projections, scans = (3 + 2) + 3, 2 * 2  # a channel: x_proj and dt_proj; states
    wanted = 2 * u.numel() * ((1 + 2) * projections + (2 + 4) * scans)
    assert counter.get_total_flops() == wanted
