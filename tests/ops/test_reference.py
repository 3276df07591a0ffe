"""The specification itself, against loops written a second time and against closed forms."""

import numpy as np
import pytest
import torch

from helpers import SCAN_ARGUMENTS, random_case, scan_inputs, scan_loops
from v2m.ops import selective_scan


def as_numpy(inputs):
    return {name: None if x is None else x.numpy() for name, x in inputs.items()}


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("seed", range(60))
def test_equals_independent_loops(backend, seed):
    inputs, options = random_case(seed, largest=7)
    expected = scan_loops(**as_numpy(inputs), **options)
    y = selective_scan(**inputs, **options, backend=backend)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-11, atol=1e-12)


def running_sum_arguments(grid: torch.Tensor, states: int = 1):
    """A = 0, dt = 1: nothing decays."""
    channels = grid.shape[-1]
    A = torch.zeros(channels, states, dtype=grid.dtype)
    return {"u": grid, "dt": torch.ones_like(grid), "A": A, "softplus": False}


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("axis", [1, 2])
def test_without_decay_it_is_a_running_sum(backend, axis):
    grid = torch.arange(2 * 3 * 5 * 2, dtype=torch.float64).reshape(2, 3, 5, 2)
    arguments = running_sum_arguments(grid)
    forwards = selective_scan(**arguments, axis=axis, backend=backend)
    assert torch.equal(forwards, grid.cumsum(axis))
    backwards = selective_scan(**arguments, axis=axis, reverse=True, backend=backend)
    assert torch.equal(backwards, grid.flip(axis).cumsum(axis).flip(axis))


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_windows_are_aligned_to_the_grid(backend):
    """Seven ids in windows of three: [0, 3), [3, 6), [6, 7), whichever the sense."""
    line = torch.tensor([1.0, 2, 4, 8, 16, 32, 64], dtype=torch.float64).reshape(1, 1, 7, 1)
    arguments = running_sum_arguments(line)
    forwards = selective_scan(**arguments, axis=2, window=3, backend=backend)
    assert forwards.flatten().tolist() == [1, 3, 7, 8, 24, 56, 64]
    backwards = selective_scan(**arguments, axis=2, window=3, reverse=True, backend=backend)
    assert backwards.flatten().tolist() == [7, 6, 4, 56, 48, 32, 64]
    column = {**arguments, "u": line.transpose(1, 2), "dt": arguments["dt"].transpose(1, 2)}
    down = selective_scan(**column, axis=1, window=3, backend=backend)
    assert torch.equal(down, forwards.transpose(1, 2))


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_geometric_decay(backend):
    """u = 1, dt = 1, A = -log 2, one state: y = 2 - 2^-i, times the states when B = C = 1."""
    u = torch.ones(1, 1, 6, 1, dtype=torch.float64)
    A = torch.full((1, 3), -float(np.log(2)), dtype=torch.float64)
    y = selective_scan(u, torch.ones_like(u), A, softplus=False, axis=2, backend=backend)
    expected = 3 * (2 - 0.5 ** torch.arange(6, dtype=torch.float64))
    torch.testing.assert_close(y.flatten(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_single_line_is_the_one_dimensional_scan(backend):
    """A 1 x W grid along W, the W x 1 grid along H, and each row of a taller grid agree."""
    inputs = scan_inputs(torch.Generator().manual_seed(3), (2, 4, 6, 3), 2)
    whole = selective_scan(**inputs, axis=2, backend=backend)
    grids = [name for name in SCAN_ARGUMENTS if inputs[name].dim() == 4]
    for row in range(4):
        line = {**inputs, **{name: inputs[name][:, row : row + 1] for name in grids}}
        y = selective_scan(**line, axis=2, backend=backend)
        torch.testing.assert_close(y, whole[:, row : row + 1], rtol=1e-13, atol=1e-13)
        column = {**line, **{name: line[name].transpose(1, 2) for name in grids}}
        y = selective_scan(**column, axis=1, backend=backend)
        torch.testing.assert_close(y.transpose(1, 2), whole[:, row : row + 1], rtol=1e-13, atol=0)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("axis", [1, 2])
def test_reverse_is_the_flipped_scan_of_the_flipped_grid(backend, axis):
    inputs = scan_inputs(torch.Generator().manual_seed(4), (2, 3, 5, 2), 3)
    flipped = {n: x.flip(axis) if x.dim() == 4 else x for n, x in inputs.items()}
    y = selective_scan(**flipped, axis=axis, backend=backend).flip(axis)
    backwards = selective_scan(**inputs, axis=axis, reverse=True, backend=backend)
    torch.testing.assert_close(y, backwards, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_is_float32_for_short_types(backend, dtype):
    """2,100 ones: in either type alone the running sum sticks, at 2,048 or at 256."""
    u = torch.ones(1, 1, 2100, 1, dtype=dtype)
    A = torch.zeros(1, 1, dtype=dtype)
    y = selective_scan(u, u, A, softplus=False, axis=2, backend=backend)
    assert y.dtype == dtype
    assert float(y[0, 0, -1, 0]) == float(torch.tensor(2100.0, dtype=dtype))
